"""A decoder for ONNX Runtime: the folder that edge/run.py opens, and what is checked of it.

FOLDER/model.onnx, model.onnx.data   the graph of export/decoder.py and its weights
FOLDER/tokenizer.json                how texts become tokens
FOLDER/manifest.json                 sizes, special tokens, versions, a digest of every file and of itself
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from checkpoint.digests import seal, write_manifest
from export.decoder import cache_names, decoder
from model.config import ModelConfig

FORMAT = 1
MODEL, TOKENIZER = "model.onnx", "tokenizer.json"
INLINE = 1024  # bytes of the largest array that stands in the graph itself


def save(folder: Path, config: ModelConfig, arrays: dict, length: int, tokenizer: str, about: dict[str, Any]) -> None:
    """Fills a folder. arrays: as export.weights.as_arrays. length: of the longest sequence. about: what else the
    manifest says, of it `begin` and `ends`, the tokens before every text and those that end one.
    """
    model = decoder(config, arrays, length)
    where = {"all_tensors_to_one_file": True, "location": f"{MODEL}.data", "size_threshold": INLINE}
    onnx.save_model(model, folder / MODEL, save_as_external_data=True, **where)
    (folder / where["location"]).chmod(0o644)  # onnx keeps it to its owner
    onnx.checker.check_model(folder / MODEL, full_check=True)
    (folder / TOKENIZER).write_text(tokenizer)
    sizes = {"layers": config.layers, "kv_heads": config.kv_heads, "head_dim": config.head_dim}
    body = {"format": FORMAT, **sizes, "vocab_size": config.vocab_size, "length": length}
    body |= {"versions": {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}}
    write_manifest(folder, {**body, **about, "files": seal(folder)})


class Session:
    """The graph of a folder in ONNX Runtime, on the CPU, a sequence at a time."""

    def __init__(self, folder: Path, config: ModelConfig):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(folder / MODEL, options, providers=["CPUExecutionProvider"])
        self._names = cache_names(config.layers)
        self._empty = np.zeros((1, config.kv_heads, 0, config.head_dim), np.float32)

    def read(self, tokens: list[int], cache: list[np.ndarray] | None = None) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits (T, V) of tokens behind those that the cache holds, and the cache with them."""
        cache = cache or [self._empty] * len(self._names)
        past = {name: array for (name, _), array in zip(self._names, cache, strict=True)}
        logits, *cache = self._session.run(None, {"input_ids": np.array([tokens], np.int64), **past})
        return logits[0], cache

    def greedy(self, prompt: list[int], count: int) -> tuple[list[int], np.ndarray]:
        """New tokens, each the likeliest, and the logits that they were chosen by, (count, V)."""
        logits_TV, cache = self.read(prompt)
        chosen, seen = [], []
        for _ in range(count):
            seen.append(logits_TV[-1])
            chosen.append(int(logits_TV[-1].argmax()))
            logits_TV, cache = self.read(chosen[-1:], cache)
        return chosen, np.stack(seen)
