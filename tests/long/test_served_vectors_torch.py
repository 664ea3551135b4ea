"""What whole texts are said to be, through the engine: hidden states and labels as transformers has them."""

import threading

import jax
import numpy as np
import pytest
import torch
from tokenizers_of_all_kinds import word_piece
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
)

from inference.engine import Engine
from inference.engine_options import EngineOptions
from inference.opening import classes_of, find_model
from inference.requests import EncodeRequest

VOCABULARY, REACH = 90, 64
NAMES = {0: "bad", 1: "good", 2: "neither"}


def llama(kind, **more):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=REACH, initializer_range=0.3, pad_token_id=0, **more,
    )  # fmt: skip
    return kind(config).eval()


def saved(model, folder):
    model.save_pretrained(folder)
    word_piece().save(folder / "tokenizer.json")


def engine_of(folder, *words, **options):
    mesh = words or ("mesh.data=8", "mesh.fsdp=1")
    found = find_model(folder, [f"runtime.cpu_devices={len(jax.devices())}", *mesh])
    engine = Engine(found.open(), EngineOptions(**{"max_running": 4, "chunk": 16, "block": 4} | options))
    engine.start()
    return engine, found


def vectors_of(engine, sequences):
    """Sent all at once."""
    heard, done = {}, threading.Semaphore(0)
    for index, tokens in enumerate(sequences):

        def hear(answer, index=index):
            heard[index] = answer
            done.release()

        engine.submit(EncodeRequest(f"{index}", tuple(tokens)), hear)
    for _ in sequences:
        assert done.acquire(timeout=120)
    return [np.array(heard[index].vector) for index in range(len(sequences))]


def sequences(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, int(rng.integers(1, REACH + 1))).tolist() for _ in range(count)]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("mean", ("mesh.data=8", "mesh.fsdp=1")),
        ("last", ("mesh.tensor=2", "mesh.fsdp=4")),
        ("last", ("mesh.data=4", "mesh.fsdp=2")),
    ],
)
def test_vectors_of_a_decoder_are_hidden_states_of_transformers(tmp_path, how, words):
    """Lengths from one token to the longest, in parts of 16; 1e-5 of vectors of length 1."""
    model = llama(LlamaModel, tie_word_embeddings=True)
    saved(model, tmp_path)
    model.config.architectures = ["LlamaForCausalLM"]  # whose weights these are, with tied tables
    model.config.save_pretrained(tmp_path)
    engine, _ = engine_of(tmp_path, *words, pooling=how)
    assert not engine.encoder
    asked = [*sequences(12), [5], list(range(3, 3 + REACH))]
    for tokens, vector in zip(asked, vectors_of(engine, asked), strict=True):
        with torch.no_grad():
            x_TD = model(torch.tensor([tokens])).last_hidden_state[0]
        pooled = x_TD.mean(0) if how == "mean" else x_TD[-1]
        theirs = torch.nn.functional.normalize(pooled, dim=0).numpy()
        np.testing.assert_allclose(vector, theirs, rtol=0, atol=1e-5)
    assert engine.state().compiles == 0
    assert engine.stop(10)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_logits_of_labels_are_those_of_transformers(tmp_path, family):
    about = {"num_labels": 3, "id2label": NAMES, "label2id": {name: number for number, name in NAMES.items()}}
    if family == "llama":
        model = llama(LlamaForSequenceClassification, **about)
    else:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=REACH, initializer_range=0.2, **about,
        )  # fmt: skip
        model = BertForSequenceClassification(config).eval()
    saved(model, tmp_path)
    engine, found = engine_of(tmp_path, max_length=REACH)
    assert classes_of(found) == (("bad", "good", "neither"), "one")
    assert engine.classifies
    asked = sequences(10, seed=1)
    for tokens, logits in zip(asked, vectors_of(engine, asked), strict=True):
        with torch.no_grad():
            theirs = model(torch.tensor([tokens])).logits[0].numpy()
        np.testing.assert_allclose(logits, theirs, rtol=0, atol=1e-5 * max(1, np.abs(theirs).max()))
    assert engine.state().compiles == 0
    assert engine.stop(10)
