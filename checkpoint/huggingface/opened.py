"""A published model on disk, opened and checked but not read: a Hugging Face folder or a GGUF file. No JAX here.

Only safetensors and GGUF are read. A pickle can run code when it is opened: it is refused unless asked for.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint.huggingface import gguf
from checkpoint.huggingface.config_json import family_of, read_config
from checkpoint.huggingface.families import Family
from checkpoint.huggingface.places import Place, place_of
from checkpoint.huggingface.safetensors import Source, open_folder
from model.config import ModelConfig
from model.specs import ParameterSpec, leaves, parameter_specs

# Tensors that are no parameters: masks and tables that follow from the sizes.
BUFFERS = re.compile(r"(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$|position_ids$|^rope_freqs\.weight$")
PAGE = 4096  # bytes of each tensor that the fingerprint takes
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
SMALL_FILES = (  # what goes with the weights of a Hugging Face model, and out again with an export
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "vocab.json", "vocab.txt", "merges.txt"),
)


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A published model whose tensors are all there and have the shapes that its config asks for."""

    path: Path
    config: ModelConfig
    family: Family
    source: Source
    json: dict[str, Any]  # config.json; empty for a GGUF file
    tokenizer: Path | None  # what tokenizer.path may name

    @property
    def length(self) -> int:
        """The longest sequence that the model is meant for."""
        metadata = getattr(self.source, "metadata", {})
        known = self.json.get("max_position_embeddings") or metadata.get("llama.context_length")
        return self.config.max_positions if self.config.positions == "learned" else known or self.config.max_positions

    @cached_property
    def places(self) -> dict[tuple[str, ...], tuple[ParameterSpec, Place]]:
        """Of each parameter of ours, by its path."""
        found = leaves(parameter_specs(self.config))
        return {path: (spec, place_of(self.family, self.config, path)) for path, spec in found}

    @cached_property
    def _names(self) -> set[str]:
        return self.source.names()

    def find(self, name: str) -> str:
        """The name that a tensor has in these files, where it may lack the model's prefix or have an older ending.

        Raises ValueError where there is none.
        """
        base, shorter = self.family.base, name.removeprefix(self.family.base)
        for candidate in (name, shorter, f"{base}{name}" if base else name):
            for new, old in (("", ""), ("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
                if candidate.endswith(new) and candidate.removesuffix(new) + old in self._names:
                    return candidate.removesuffix(new) + old
        raise ValueError(f"{self.path}: there is no tensor {name}")

    def tensors(self) -> Iterator[tuple[ParameterSpec, Place, str]]:
        """Each tensor that a parameter is read from, a layer and an expert at a time."""
        for spec, place in self.places.values():
            layers = spec.shape[0] if spec.axes[0] == "layers" else 1
            one = spec.of_one_layer() if spec.axes[0] == "layers" else spec
            for layer in range(layers):
                for expert in range(one.shape[0] if place.by_expert else 1):
                    yield one, place, self.find(place.of(layer, expert))

    def is_tied(self) -> bool:
        """Whether the tables are one, as the config says: not where the files have two that differ."""
        head = f"{self.family.names_for(self.config.head).get('head', '-')}.weight"
        if not self.config.tied_embeddings or head not in self._names:
            return self.config.tied_embeddings
        return np.array_equal(
            self.source.tensor(head), self.source.tensor(self.find(f"{self.family.names['tokens']}.weight"))
        )

    def check(self) -> None:
        """Raises ValueError for the first tensor that is missing or has another shape."""
        for spec, place, name in self.tensors():
            if self.source.dtype(name).kind not in "fV" or self.source.dtype(name).itemsize < 2:
                raise ValueError(f"{self.path}: {name} is {self.source.dtype(name)}, not float32, bfloat16 or float16")
            if (there := self.source.shape(name)) != (wanted := place.shape(spec)):
                raise ValueError(f"{self.path}: {name} is {there}, and its config asks for {wanted}")

    def check_layers(self) -> None:
        """Raises ValueError where there are tensors of more layers than the config has: it would be cut short."""
        numbered = [place.name for _, place in self.places.values() if "{layer}" in place.name]
        before = {name.partition("{layer}")[0] for name in numbered}
        for name in self.left_out():
            for prefix in (p for base in before for p in (base, base.removeprefix(self.family.base))):
                number = name.removeprefix(prefix).partition(".")[0]
                if name.startswith(prefix) and number.isdecimal() and int(number) >= self.config.layers:
                    raise ValueError(f"{self.path}: {name} is there, and its config has {self.config.layers} layers")

    def left_out(self) -> list[str]:
        """Tensors that no parameter is read from, but for buffers and copies of tied tables."""
        read = {name for *_, name in self.tensors()}
        head = self.family.names_for(self.config.head).get("head", "-")
        copies = {f"{head}.weight", f"{head}.bias"} if self.config.tied_embeddings else set()
        return sorted(name for name in self._names - read - copies if not BUFFERS.search(name))

    @cached_property
    def dtype(self) -> str:
        """What most tensors are stored as."""
        stored = [str(self.source.dtype(name)) for name in sorted(self._names)]
        return max(sorted(set(stored)), key=stored.count)

    def fingerprint(self) -> str:
        """Tells these weights from others: a digest of the names, dtypes, shapes and first bytes of all tensors."""
        digest = hashlib.sha256()
        for file in self.source.files():
            size = file.stat().st_size
            with file.open("rb") as opened:
                digest.update(f"{size}\n".encode() + opened.read(min(size, 1 << 20)))
        if not isinstance(self.source, gguf.Gguf):
            for name in sorted(self._names):
                tensor = self.source.tensor(name)
                first = tensor.reshape(-1)[: PAGE // tensor.dtype.itemsize]
                digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode() + first.tobytes())
        return digest.hexdigest()[:32]


def open_pretrained(path: str | Path, *, allow_pickle: bool = False) -> Pretrained:
    """Opens a folder, a .gguf file or the name of a model on the hub. Raises ValueError in one line."""
    path = _located(str(path))
    try:
        opened = _open_gguf(path) if path.is_file() else _open_folder(path, allow_pickle)
        opened.check()
        opened.check_layers()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    return opened


def _open_gguf(path: Path) -> Pretrained:
    if path.suffix != ".gguf":
        raise ValueError("is a file, but no .gguf; a Hugging Face model is named by its folder")
    opened = gguf.Gguf(path)
    return Pretrained(path, gguf.read_gguf_config(opened), gguf.FAMILY, opened, {}, path)


def _open_folder(path: Path, allow_pickle: bool) -> Pretrained:
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise ValueError("has no config.json, so it is no Hugging Face model") from None
    except ValueError as error:
        raise ValueError(f"config.json is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError("config.json is no table of keys")
    family = family_of(config)
    source = open_folder(path) or _pickle(path, allow_pickle)
    tokenizer = next((path for name in ("tokenizer.json", "vocab.json") if (path / name).exists()), None)
    if tokenizer is not None and (path / "tokenizer.json").exists():
        tokenizer = path / "tokenizer.json"
    opened = Pretrained(path, read_config(config, source.names()), family, source, config, tokenizer)
    return opened if opened.is_tied() else replace(opened, config=replace(opened.config, tied_embeddings=False))


def _pickle(path: Path, allow_pickle: bool) -> Source:
    pickles = sorted(p for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
    if not pickles:
        raise ValueError("holds no model.safetensors")
    if not allow_pickle:
        raise ValueError(
            f"holds {pickles[0].name} and no safetensors: a pickle can run code when it is opened; if you trust it, "
            "add --allow-pickle to `python -m checkpoint.huggingface import`"
        )
    return Pickled(pickles)


class Pickled:
    """Tensors of PyTorch files, read by PyTorch's loader for weights alone.

    Raises ValueError without PyTorch, and for a file that holds more than that loader allows.
    """

    def __init__(self, paths: list[Path]):
        try:
            import torch
        except ImportError:
            raise ValueError("reading a pickle needs PyTorch: install the extra `compare`") from None
        self._paths, self._tensors = paths, {}
        for path in paths:
            try:
                read = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                self._tensors |= {name: value for name, value in read.items() if isinstance(value, torch.Tensor)}
            except Exception as error:  # the unpickler raises many kinds
                raise ValueError(f"{path.name}: {' '.join(str(error).split())[:120]}") from None

    def names(self) -> set[str]:
        """The names of all tensors of all files."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> np.dtype:
        """What a tensor is stored as."""
        return self.tensor(name).dtype

    def tensor(self, name: str) -> np.ndarray:
        """A tensor, in PyTorch's own memory."""
        import ml_dtypes
        import torch

        tensor = self._tensors[name]
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def files(self) -> list[Path]:
        """The PyTorch files."""
        return self._paths


def _located(name: str) -> Path:
    """The local path of a name, which may be that of a model on the hub."""
    path = Path(name).expanduser()
    if path.exists() or not HUB_NAME.fullmatch(name):
        if not path.exists():
            raise ValueError(f"{name}: there is no such folder or file")
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=["*.safetensors", INDEX_PATTERN, *SMALL_FILES]))
    except ImportError:
        reason = "to ask the hub for it, install huggingface_hub"
    except Exception as error:  # of the network, and of the hub
        reason = f"the hub was not reached, or has no such model ({type(error).__name__})"
    raise ValueError(f"{name}: there is no such folder here, and {reason}")


INDEX_PATTERN = "*.safetensors.index.json"
