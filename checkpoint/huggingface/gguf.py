"""Weights in GGUF files of llama.cpp: tensors and their dequantisation. Only what the llama family needs.

Block layouts: ggml/src/ggml-common.h of github.com/ggml-org/ggml. Places are checked against the file before memory is
taken; the header is read by runtime/gguf.py.
"""

import math
from pathlib import Path

import ml_dtypes
import numpy as np

from checkpoint.huggingface.families import LLAMA, Family
from model.config import ModelConfig, RopeScaling
from runtime.gguf import Tensor, read_header

BLOCK = 32  # weights that share a scale
# type -> (name, weights in a block, bytes of a block)
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", BLOCK, 18), 3: ("Q4_1", BLOCK, 20), 8: ("Q8_0", BLOCK, 34),
    30: ("BF16", 1, 2),
}  # fmt: skip
AT = "blk.{layer}"
NAMES = {
    "tokens": "token_embd",
    "layers/attention_norm": f"{AT}.attn_norm",
    "layers/attention/query": f"{AT}.attn_q",
    "layers/attention/key": f"{AT}.attn_k",
    "layers/attention/value": f"{AT}.attn_v",
    "layers/attention/out": f"{AT}.attn_output",
    "layers/ffn_norm": f"{AT}.ffn_norm",
    "layers/ffn/gate": f"{AT}.ffn_gate",
    "layers/ffn/up": f"{AT}.ffn_up",
    "layers/ffn/down": f"{AT}.ffn_down",
    "final_norm": "output_norm",
    "head": "output",
}
assert set(NAMES) | {"layers/attention/query_norm", "layers/attention/key_norm"} == set(LLAMA)
FAMILY = Family("llama (GGUF)", "", NAMES, {}, rotary_pairs=True)


class Gguf:
    """One file. Raises ValueError in one line for a file that is not whole, or holds what is not known here."""

    def __init__(self, path: Path):
        self._path = Path(path)
        header = read_header(self._path)
        self.metadata, self._begin, self._size = header.metadata, header.begin, self._path.stat().st_size
        self._tensors = {name: self._checked(name, tensor) for name, tensor in header.tensors.items()}

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor, if it is of a kind known here and lies in the file."""
        if tensor.kind not in TYPES:
            known = ", ".join(entry[0] for entry in TYPES.values())
            raise ValueError(f"{self._path}: {name[:80]!r} is of type {tensor.kind}; known here are {known}")
        (quantisation, weights, size), shape = TYPES[tensor.kind], tensor.shape
        at, needed = self._begin + tensor.offset, math.prod(shape) // weights * size
        if not shape or shape[-1] % weights or at + needed > self._size:
            raise ValueError(
                f"{self._path}: {name[:80]!r} of {quantisation} {shape} does not fit: {needed:,} bytes from {at:,} in "
                f"a file of {self._size:,}: cut short or damaged"
            )
        return tensor

    def names(self) -> set[str]:
        """The names in the header."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """What a tensor is read as; float32 for what is stored in blocks of few bits."""
        stored = TYPES[self._tensors[name].kind][0]
        return np.dtype({"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(stored, np.float32))

    def tensor(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32 where it is stored in blocks."""
        shape, kind, offset = self._tensors[name]
        quantisation, weights, size = TYPES[kind]
        raw = np.memmap(self._path, np.uint8, "r", self._begin + offset, (math.prod(shape) // weights * size,))
        if weights == 1:
            return raw.view(self.dtype(name)).reshape(shape)
        return dequantise(raw.reshape(-1, size), quantisation).reshape(shape)

    def files(self) -> list[Path]:
        """The one file."""
        return [self._path]


def dequantise(blocks: np.ndarray, quantisation: str) -> np.ndarray:
    """Blocks (n, bytes) of 32 weights each to float32 (n, 32).

    Q8_0: a float16 scale d, 32 int8 q; d q. Q4_0: d and 16 bytes, whose low halves are weights 0 to 15 and whose high
    ones 16 to 31; d (q - 8). Q4_1: also a float16 minimum m; d q + m.
    """
    half = lambda at: blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)
    scale = half(0)
    if quantisation == "Q8_0":
        return scale * blocks[:, 2:].view(np.int8).astype(np.float32)
    packed = blocks[:, 4 if quantisation == "Q4_1" else 2 :]
    values = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)
    return scale * values + half(2) if quantisation == "Q4_1" else scale * (values - 8)


def read_gguf_config(gguf: Gguf) -> ModelConfig:
    """The ModelConfig of a file of the llama family. Raises ValueError for another, and for what is missing."""
    m = gguf.metadata
    if (architecture := m.get("general.architecture")) != "llama":
        raise ValueError(f"general.architecture={architecture!r}: only llama is read from GGUF files")

    def value(key: str, default=None):
        found = m.get(f"llama.{key}", default)
        if not isinstance(found, int | float) or isinstance(found, bool) or found <= 0:
            raise ValueError(f"llama.{key}={found!r} should be a number above 0")
        return found

    if m.get("llama.expert_count"):
        raise ValueError(f"llama.expert_count={m['llama.expert_count']}: experts are not read from GGUF files")
    heads, width = value("attention.head_count"), value("embedding_length")
    head_dim = value("attention.key_length", width // heads)
    if "token_embd.weight" not in gguf.names():
        raise ValueError("there is no tensor token_embd.weight")
    return ModelConfig(
        layers=value("block_count"), width=width, heads=heads, kv_heads=value("attention.head_count_kv", heads),
        head_dim=head_dim, ffn=value("feed_forward_length"), vocab_size=gguf.shape("token_embd.weight")[0],
        tied_embeddings="output.weight" not in gguf.names(), norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_theta=float(value("rope.freq_base", 10000.0)), rope_scaling=_scaling(gguf, head_dim),
        rope_fraction=value("rope.dimension_count", head_dim) / head_dim,
        bias=_bias(gguf),
    )  # fmt: skip


def _bias(gguf: Gguf) -> str:
    there = tuple(f"blk.0.{part}.bias" in gguf.names() for part in ("attn_q", "attn_output", "ffn_up"))
    kinds = {(True, False, False): "qkv", (True, True, False): "attention", (False, False, True): "ffn"}
    return kinds.get(there, "all" if all(there) else "none")


def _scaling(gguf: Gguf, head_dim: int) -> RopeScaling:
    m = gguf.metadata
    if "rope_freqs.weight" in gguf.names():  # a divisor for each pair, whatever scaling gave it
        factors = tuple(map(float, gguf.tensor("rope_freqs.weight")))
        return RopeScaling("longrope", attention_factor=1.0, short_factors=factors, long_factors=factors)
    kind = m.get("llama.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ValueError(f"llama.rope.scaling.type={kind!r} is not one of none, linear")
    return RopeScaling("linear", float(m.get("llama.rope.scaling.factor", 1.0))) if kind == "linear" else RopeScaling()
