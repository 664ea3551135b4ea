"""Other forms of a model's parts: what adapters, quantised weights and the like put in the place of a matrix.

A form is made of two things: the parameters that it keeps instead of those of the part (or beside them), and the module
that computes with them. A Description carries forms by the path of the part that each replaces; everything that
follows from parameters (shapes, places on the mesh, checkpoints) then follows from the form's.
"""

from collections.abc import Mapping
from typing import Protocol

from flax import nnx

from model.specs import LAYERS, Specs

Path = tuple[str, ...]  # the names that lead to a part, those of its branch of the parameters: layers, attention, query


class Form(Protocol):
    """How a part is kept and computed."""

    def specs(self, specs: Specs) -> Specs:
        """The parameters of the form, from those of the part: a tree of ParameterSpec, layers stacked.

        It is called where the mesh is in context. The parameter `weight`, if there is one, keeps its name.
        """

    def module(self, part: nnx.Module, specs: Specs) -> nnx.Module:
        """What takes the place of `part`, a module of the class that model/ has there, made with `specs`."""


Forms = Mapping[Path, Form]


def branch(specs: Specs, path: Path) -> Specs:
    """The branch of a tree that a path leads to. Raises KeyError where there is none."""
    for name in path:
        specs = specs[name]
    return specs


def replaced(tree: dict, path: Path, value: dict) -> dict:
    """The tree, of specifications or of parameters, with another branch at this path."""
    return {**tree, path[0]: replaced(tree[path[0]], path[1:], value) if len(path) > 1 else value}


def with_forms(specs: Specs, forms: Forms) -> Specs:
    """The tree in which each part with a form has the form's parameters."""

    for path, form in forms.items():
        specs = replaced(specs, path, form.specs(branch(specs, path)))
    return specs


def put_in(module: nnx.Module, specs: Specs, forms: Forms) -> nnx.Module:
    """The module, with each part that has a form replaced; `specs` is the tree of `with_forms`."""
    for path, form in forms.items():
        parent = module
        for name in path[:-1]:
            parent = getattr(parent, name)
        setattr(parent, path[-1], form.module(getattr(parent, path[-1]), branch(specs, path)))
    return module


def of_block(forms: Forms) -> Forms:
    """The forms of the parts of a block, by their paths in it."""
    return {path[1:]: form for path, form in forms.items() if path[0] == LAYERS}
