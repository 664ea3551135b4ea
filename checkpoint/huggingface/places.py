"""Where a parameter of ours lies in a family's tensors, and how one becomes the other. Pure NumPy, both directions.

Ours are (*in, *out); a tensor of theirs is (out, in), or (in, out) in GPT-2, with the dims of heads run together, and
may hold several of ours as ranges of its outputs.
"""

import math
import re
from dataclasses import dataclass

import numpy as np

from checkpoint.huggingface.families import Family
from model.config import ModelConfig
from model.specs import ParameterSpec

FUSED = (("query", "key", "value"), ("gate", "up"))  # what one matrix of theirs may hold, in order
SUFFIXES = {"weight": ".weight", "bias": ".bias", "scale": ".weight"}


@dataclass(frozen=True)
class Place:
    """Where one parameter lies; layer by layer and expert by expert, if its name says so."""

    name: str  # of the tensor, with {layer} and {expert}
    out_first: bool  # a matrix is (out, in)
    first: int = 0  # of the outputs that are this parameter's
    rows: int = 0  # how many these are; 0: all
    total: int = 0  # outputs of the whole tensor
    heads: tuple[int, int, int] | None = None  # (heads, which part of a head's outputs, dims of a head): by head
    rotary_pairs: int = 0  # heads whose outputs stand in pairs (i, i + 1) and not (i, i + H/2); 0: none

    def of(self, layer: int, expert: int) -> str:
        """The tensor's name in a layer and an expert, counted from 0; what the name does not ask for is not used."""
        return self.name.format(layer=layer, expert=expert)

    @property
    def by_expert(self) -> bool:
        """Whether each expert has a tensor of its own."""
        return "{expert}" in self.name

    def slot(self, tensor: np.ndarray) -> np.ndarray:
        """The view of this parameter's outputs in a whole tensor, whose first dim they are: (outputs, ...).

        Where they are interleaved by head it is (heads, outputs of a head, ...).
        """
        if self.heads:
            heads, part, size = self.heads
            return tensor.reshape(heads, -1, size, *tensor.shape[1:])[:, part]
        return tensor[self.first : self.first + self.rows] if self.rows else tensor

    def ours(self, tensor: np.ndarray, spec: ParameterSpec) -> np.ndarray:
        """The parameter of one layer (and expert), in our shape; a view where that can be. Tables are not padded."""
        if spec.is_table:
            return tensor
        matrix = spec.is_matrix
        tensor = self.slot(tensor.T if matrix and not self.out_first else tensor)
        tensor = tensor.reshape(-1, tensor.shape[-1]) if matrix else tensor.reshape(-1)
        if self.rotary_pairs:
            pairs = tensor.reshape(self.rotary_pairs, -1, 2, *tensor.shape[1:])
            tensor = pairs.swapaxes(1, 2).reshape(tensor.shape)
        return (tensor.T if matrix else tensor).reshape(_shape(spec))

    def put(self, whole: np.ndarray, value: np.ndarray, spec: ParameterSpec) -> None:
        """The inverse of `ours`: writes the parameter into its place in a whole tensor of theirs."""
        if spec.is_table:
            whole[...] = value
            return
        matrix = spec.is_matrix
        slot = self.slot(whole.T if matrix and not self.out_first else whole)
        value = value.reshape(_inputs(spec), -1).T if matrix else value.reshape(-1)
        if self.rotary_pairs:
            halves = value.reshape(self.rotary_pairs, 2, -1, *value.shape[1:])
            value = halves.swapaxes(1, 2)
        slot[...] = value.reshape(slot.shape)

    def shape(self, spec: ParameterSpec) -> tuple[int, ...]:
        """The shape of the whole tensor that holds the parameter, without padding."""
        if spec.is_table:
            return (_rows(spec), spec.shape[1])
        outputs = self.total or math.prod(_shape(spec)) // (_inputs(spec) if spec.is_matrix else 1)
        if not spec.is_matrix:
            return (outputs,)
        return (outputs, _inputs(spec)) if self.out_first else (_inputs(spec), outputs)


def _rows(spec: ParameterSpec) -> int:
    return spec.shape[0] if spec.rows is None else spec.rows


def _shape(spec: ParameterSpec) -> tuple[int, ...]:
    """Of one layer's or expert's parameter, without padding."""
    shape = spec.shape[len(spec.batch) :]
    return shape if spec.rows is None else (spec.rows, *shape[1:])


def _inputs(spec: ParameterSpec) -> int:
    return math.prod(spec.shape[dim] for dim in spec.contracted)


def place_of(family: Family, config: ModelConfig, path: tuple[str, ...]) -> Place:
    """The place of a parameter, by its path in the tree of specifications. Raises ValueError if the family has none."""
    names, leaf = family.names_for(config.head, config.tied_embeddings), path[-1]
    module = "/".join(path[:-1] if leaf in SUFFIXES else path)
    if module not in names:
        raise ValueError(f"{family.model_type} has no place for {'/'.join(path)}")
    name, part = re.fullmatch(r"(.*?)(?:\[(\w+)\])?", names[module]).groups()
    suffix = SUFFIXES.get(leaf, ".bias" if leaf == "head_bias" else ".weight")
    pairs = {"query": config.heads, "key": config.kv_heads}.get(module.rpartition("/")[2], 0)
    more = _part(family, config, part) if part else {}
    return Place(name + suffix, family.out_first, rotary_pairs=pairs if family.rotary_pairs else 0, **more)


def _part(family: Family, config: ModelConfig, part: str) -> dict:
    """Which outputs of a matrix for several are those of one of them."""
    c = config
    sizes = {
        "query": c.heads * c.head_dim, "key": c.kv_heads * c.head_dim, "value": c.kv_heads * c.head_dim,
        "gate": c.ffn, "up": c.ffn,
    }  # fmt: skip
    group = next(group for group in FUSED if part in group)
    at = group.index(part)
    if family.by_head:
        return {"heads": (c.heads, at, c.head_dim), "rows": sizes[part], "total": sum(sizes[name] for name in group)}
    return {
        "first": sum(sizes[name] for name in group[:at]),
        "rows": sizes[part],
        "total": sum(sizes[name] for name in group),
    }
