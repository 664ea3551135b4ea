"""Weights and tokens that can be drawn again from a name and a shape, without the framework that used them."""

import hashlib

import numpy as np

VOCABULARY = 61


def _generator(label: str) -> np.random.Generator:
    return np.random.default_rng(list(hashlib.sha256(label.encode()).digest()))


def weight(case: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 weight: matrices N(0, 2 / (rows + columns)), biases N(0, 0.2^2), norm scales N(1, 0.2^2)."""
    noise = _generator(f"{case}/{name}").standard_normal(shape)
    if len(shape) > 1:
        return (noise * (2 / sum(shape)) ** 0.5).astype(np.float32)
    return (0.2 * noise + name.endswith("weight")).astype(np.float32)


def tokens(case: str) -> np.ndarray:
    """Two sequences of 24 tokens, int32."""
    return _generator(f"{case}/tokens").integers(VOCABULARY, size=(2, 24), dtype=np.int32)
