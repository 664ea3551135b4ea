"""How many parameters a device holds on a mesh, by the tables of parallel/axes.py, asked thousands of times."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from model.config import ModelConfig
from model.specs import LAYERS, leaves, parameter_specs
from parallel.axes import PARAMETER_AXES, REPLICATED_IF_UNDIVIDED


@dataclass(frozen=True, slots=True)
class Held:
    """Parameters of one device."""

    layer: float  # of one layer, without experts, before fsdp splits them
    experts: float  # of one layer, before fsdp splits them
    tables: float  # outside the layers, before fsdp splits them
    stored: float  # all that a device keeps of its stage


class Parameters:
    """The parameters of a model, grouped by what splits them."""

    def __init__(self, model: ModelConfig):
        self.model, self.groups = model, Counter()
        for _, spec in leaves(parameter_specs(model)):
            sizes = {name: size for name, size in zip(spec.axes, spec.shape, strict=True) if name != LAYERS}
            splitting = tuple(sorted((name, size) for name, size in sizes.items() if PARAMETER_AXES[name]))
            self.groups[LAYERS in spec.axes, splitting] += math.prod(sizes.values())
        self.total = sum(size * (model.layers if stacked else 1) for (stacked, _), size in self.groups.items())

    def held(self, sizes: Mapping[str, int], rows: float) -> Held:
        """On a mesh of these sizes, with `rows` layers on a stage."""
        layer = experts = tables = stored = 0.0
        for (stacked, splitting), size in self.groups.items():
            here, spread = float(size), 1
            for name, length in splitting:
                parts = math.prod(sizes[axis] for axis in PARAMETER_AXES[name])
                if length % parts and (name in REPLICATED_IF_UNDIVIDED or name == "vocab"):
                    parts = 1 if name in REPLICATED_IF_UNDIVIDED else parts
                if PARAMETER_AXES[name] == ("fsdp",):
                    spread = parts
                else:
                    here /= parts
            stored += here / spread * (rows if stacked else 1)
            if not stacked:
                tables += here
            elif any(name == "experts" for name, _ in splitting):
                experts += here
            else:
                layer += here
        return Held(layer, experts, tables, stored)
