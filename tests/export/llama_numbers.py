"""What llama.cpp computes of a GGUF file of its llama architecture on a CPU, in NumPy: an independent reference.

Its matmuls round what a matrix is multiplied with to the kind of that matrix (ggml/src/ggml-cpu of github.com/ggml-org/
ggml, `vec_dot_type`): to float16 beside float16, and beside Q8_0 to blocks of 32 int8 with a float16 scale each. Keys
and values are kept in float16, so that queries and attention weights are rounded to it, too. Sums are in float32; only
their order is not that of llama.cpp.
"""

from pathlib import Path

import gguf
import numpy as np

BLOCK, LARGEST = 32, 127
KINDS = gguf.GGMLQuantizationType


class Numbers:
    """One file. With `exact` nothing but weights is rounded: the model that the file stands for, in float32."""

    def __init__(self, path: Path, *, exact: bool = False):
        reader = gguf.GGUFReader(path)
        value = lambda key: reader.get_field(f"llama.{key}").contents()
        self.exact, self.layers, self.eps = exact, value("block_count"), value("attention.layer_norm_rms_epsilon")
        self.heads, self.kv_heads = value("attention.head_count"), value("attention.head_count_kv")
        self.head_dim, self.theta = value("attention.key_length"), value("rope.freq_base")
        self.kinds = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
        self.weights = {one.name: gguf.dequantize(one.data, one.tensor_type) for one in reader.tensors}

    def logits(self, tokens_T: list[int]) -> np.ndarray:
        """Of every place, (T, V)."""
        w, x_TD = self.weights, self.weights["token_embd.weight"][tokens_T].astype(np.float32)
        for layer in range(self.layers):
            at = f"blk.{layer}"
            y_TD = self.norm(x_TD, f"{at}.attn_norm")
            query, key, value = (self.times(y_TD, f"{at}.attn_{name}") for name in "qkv")
            x_TD = x_TD + self.times(self.attend(query, key, value), f"{at}.attn_output")
            y_TD = self.norm(x_TD, f"{at}.ffn_norm")
            gate_TF, up_TF = self.times(y_TD, f"{at}.ffn_gate"), self.times(y_TD, f"{at}.ffn_up")
            x_TD = x_TD + self.times(gate_TF / (1 + np.exp(-gate_TF)) * up_TF, f"{at}.ffn_down")
        head = "output" if "output.weight" in w else "token_embd"
        return self.times(self.norm(x_TD, "output_norm"), head)

    def times(self, x_TN: np.ndarray, name: str) -> np.ndarray:
        """x times the transposed matrix of this name, x rounded as its kind wants it, and its bias if there is one."""
        kind, w_MN = self.kinds[f"{name}.weight"], self.weights[f"{name}.weight"].astype(np.float32)
        if kind == KINDS.Q8_0 and not self.exact:
            x_TN = blocks_of_int8(x_TN)
        y_TM = (self.half(x_TN) if kind == KINDS.F16 else x_TN) @ w_MN.T
        return y_TM + self.weights.get(f"{name}.bias", np.float32(0))

    def attend(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Causal attention of one sequence, heads side by side."""
        T, H = len(query), self.head_dim
        query, key = self.half(self.turned(query)), self.half(self.turned(key))
        key_TKH, value_TKH = key.reshape(T, -1, H), self.half(value).reshape(T, -1, H)
        out, each = np.empty((T, self.heads, H), np.float32), self.heads // self.kv_heads
        for head in range(self.heads):
            score_TS = query.reshape(T, -1, H)[:, head] @ key_TKH[:, head // each].T / np.sqrt(np.float32(H))
            score_TS = np.where(np.tri(T, dtype=bool), score_TS, -np.inf)
            share_TS = np.exp(score_TS - score_TS.max(-1, keepdims=True))
            share_TS /= share_TS.sum(-1, keepdims=True)
            out[:, head] = self.half(share_TS) @ value_TKH[:, head // each]
        return out.reshape(T, -1)

    def turned(self, x: np.ndarray) -> np.ndarray:
        """Rotary positions of neighbouring pairs."""
        pairs = x.reshape(len(x), -1, self.head_dim // 2, 2)
        frequency = self.theta ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        if "rope_freqs.weight" in self.weights:
            frequency = frequency / self.weights["rope_freqs.weight"]
        angle = (np.arange(len(x))[:, None] * frequency)[:, None]
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        a, b = pairs[..., 0], pairs[..., 1]
        return np.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)

    def norm(self, x_TD: np.ndarray, name: str) -> np.ndarray:
        """Over the root of the mean square."""
        scale = np.sqrt(np.mean(np.square(x_TD), -1, keepdims=True) + np.float32(self.eps))
        return x_TD / scale * self.weights[f"{name}.weight"]

    def half(self, x: np.ndarray) -> np.ndarray:
        """Rounded to float16."""
        return x if self.exact else x.astype(np.float16).astype(np.float32)


def blocks_of_int8(x_TN: np.ndarray) -> np.ndarray:
    """Rounded to blocks of int8: codes by the float32 scale, which is then kept in float16."""
    block = x_TN.reshape(len(x_TN), -1, BLOCK)
    largest = np.abs(block).max(-1, keepdims=True)
    codes = np.round(block * np.divide(LARGEST, largest, out=np.zeros_like(largest), where=largest > 0))
    return (codes * (largest / LARGEST).astype(np.float16).astype(np.float32)).reshape(x_TN.shape)
