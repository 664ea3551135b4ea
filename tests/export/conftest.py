"""Folders of the golden models, with a tokenizer as small as they are; and what transformers says of them."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from data.tokenizer import BYTE_OF
from data.tokenizers.patterns import GPT2, Words, added_token, byte_level_spec
from tests.checkpoint.huggingface.configurations import VOCABULARY

GOLDEN = Path(__file__).parent.parent / "golden" / "huggingface"
LETTERS = " \n,.abcdefghijklmnopqrstuvwxyzTABCDEFGHIJKLMNOPQRSUVWXYZ01234"


@pytest.fixture(autouse=True, scope="session")
def _fast_compile():
    """Tiny programs run once: compiling them is most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def tokenizer() -> str:
    """A byte-level BPE of few bytes, as a tokenizer.json."""
    of_byte = {byte: character for character, byte in BYTE_OF.items()}
    spelled = [of_byte[ord(letter)] for letter in LETTERS]
    vocab = {token: i for i, token in enumerate([*spelled, "Th", "Ġi", "<|endoftext|>"])}
    assert len(vocab) <= VOCABULARY
    end = added_token(vocab["<|endoftext|>"], "<|endoftext|>", special=True)
    return byte_level_spec(vocab, [("T", "h"), ("Ġ", "i")], [end], Words((GPT2,)))


@pytest.fixture(scope="session")
def golden(tmp_path_factory):
    """Of a family the folder of its model."""
    made = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("golden") / family
            shutil.copytree(GOLDEN / family, made[family])
            (made[family] / "tokenizer.json").write_text(tokenizer())
        return made[family]

    return folder


@pytest.fixture(scope="session")
def changed(golden, tmp_path_factory):
    """Of a family its model with other settings in its config.json, which name no other tensors."""

    def folder(family: str, **settings) -> Path:
        path = tmp_path_factory.mktemp("changed") / "model"
        shutil.copytree(golden(family), path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | settings))
        return path

    return folder


def expected(family: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (B, T), and what transformers says of them, (B, T, V)."""
    with np.load(GOLDEN / family / "expected.npz") as found:
        return found["tokens_BT"], found["logits_BTV"]


def assert_agree(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Within 1e-4 of the largest."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))
