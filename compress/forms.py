"""How a quantised matrix or table is kept, and the modules that compute with it in the place of model/'s own."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from compress.grids import FLOAT8, LARGEST_INT8, NF4, ZERO_PARTS, Floats, Grid, Levels, int8_grid, pack, unpack
from compress.pruning import Sparse
from compress.recipes import Recipe
from model.forms import Forms, branch, replaced
from model.heads import Embedding
from model.matmul import project
from model.projection import Projection, biased, param
from model.specs import LAYERS, ParameterSpec, Specs, leaves, parameter_specs
from model.transformer import Description
from parallel.sharding import cast_and_gather, shard

GROUPS = "_groups"  # width_groups, ffn_groups: rows of the sharding tables for what there are fewer of than of inputs
ROUTER = "router"  # the part whose matrix is kept: it is small, and decides much
STEP_DTYPE = "bfloat16"
SMALLEST = 1e-30  # a token's largest entry, where it has none


# ----------------------------------------------------------------------------------------------------------- the forms


@dataclass(frozen=True)
class Int8:
    """A matrix in int8, with a step for each output.

    With `activations` tokens' vectors are multiplied with it in int8, too, with a step for each token.
    """

    activations: bool = False

    def specs(self, specs: Specs) -> Specs:
        """`weight` of the same shape, `step` of its outputs."""
        weight = specs["weight"]
        return {**specs, "weight": replace(weight, dtype="int8"), "step": _some_dims(weight, _outputs(weight))}

    def module(self, part: Projection, specs: Specs) -> nnx.Module:
        """The matrix in int8."""
        return (Int8Projection if self.activations else QuantisedProjection)(part, specs)

    def kept(self, weight: ParameterSpec, grid: Grid, q_nm: jax.Array, scale_n: jax.Array | None) -> dict:
        """What is stored of one matrix, in the shapes of one layer; `weight` is its spec there, without experts."""
        outputs = [weight.shape[dim] for dim in _outputs(weight)]
        return {"weight": q_nm.reshape(weight.shape).astype(jnp.int8), "step": grid.step_Gm.reshape(outputs)}


@dataclass(frozen=True)
class Fp8(Int8):
    """A matrix in floats of 8 bits (e4m3), with a step for each output: 4 significant bits, whatever its size.

    They are kept as bytes: what moves between devices and to disk need not know the format.
    """

    def specs(self, specs: Specs) -> Specs:
        """As that of Int8."""
        found = super().specs(specs)
        return {**found, "weight": replace(found["weight"], dtype="uint8")}

    def kept(self, weight: ParameterSpec, grid: Floats, q_nm: jax.Array, scale_n: jax.Array | None) -> dict:
        """As that of Int8."""
        outputs = [weight.shape[dim] for dim in _outputs(weight)]
        return {"weight": q_nm.reshape(weight.shape), "step": grid.step_Gm.reshape(outputs)}


@dataclass(frozen=True)
class Int4:
    """A matrix in int4, with a step and a zero for each group of inputs that follow each other in their last dim.

    With `scaled` there is a factor for each input as well, which a token's vector is multiplied with beforehand.
    """

    group: int
    scaled: bool = False

    def specs(self, specs: Specs) -> Specs:
        """`weight` half as long in its last input dim, `step` and `zero` for each group, perhaps `scale` of inputs.

        Raises ValueError where that dim cannot be cut into groups.
        """
        weight = specs["weight"]
        last, groups = weight.contracted[-1], self.groups(weight)
        packed = _resized(replace(weight, dtype="uint8"), last, weight.shape[last] // 2)
        step = _resized(replace(weight, dtype=STEP_DTYPE, contracted=()), last, groups)
        found = {**specs, "weight": packed, "step": step, "zero": replace(step, dtype="uint8")}
        return found | ({"scale": _some_dims(weight, weight.contracted)} if self.scaled else {})

    def groups(self, weight: ParameterSpec) -> int:
        """How many groups the last input dim of a matrix has: what the group and the dim have in common is their size,
        so that a group never crosses from one head to the next.
        """
        length = weight.shape[weight.contracted[-1]]
        size = math.gcd(length, self.group)
        if size < 4 or size % 2:
            raise ValueError(
                f"a dim of {length} has no groups of {self.group}: they would be of {size}; choose another"
            )
        return length // size

    def module(self, part: Projection, specs: Specs) -> nnx.Module:
        """The matrix in int4."""
        return QuantisedProjection(part, specs)

    def kept(self, weight: ParameterSpec, grid: Grid, q_nm: jax.Array, scale_n: jax.Array | None) -> dict:
        """As that of Int8."""
        inputs = [weight.shape[dim] for dim in weight.contracted]
        outputs = [weight.shape[dim] for dim in _outputs(weight)]
        grouped = lambda x: x.reshape(*inputs[:-1], -1, *outputs)
        found = {"weight": pack(q_nm.reshape(weight.shape), len(inputs) - 1)}
        found |= {"step": grouped(grid.step_Gm), "zero": grouped(grid.zero_Gm)}
        return found | ({"scale": scale_n.reshape(inputs).astype(STEP_DTYPE)} if self.scaled else {})


@dataclass(frozen=True)
class Nf4(Int4):
    """A matrix in NF4: codes of the quantiles of a normal distribution, times the largest weight of each group."""

    def specs(self, specs: Specs) -> Specs:
        """`weight` half as long in its last input dim, `step` for each group. Raises as that of Int4."""
        found = super().specs(specs)
        return {name: spec for name, spec in found.items() if name != "zero"}

    def kept(self, weight: ParameterSpec, grid: Levels, q_nm: jax.Array, scale_n: jax.Array | None) -> dict:
        """As that of Int8."""
        inputs = [weight.shape[dim] for dim in weight.contracted]
        outputs = [weight.shape[dim] for dim in _outputs(weight)]
        step = grid.step_Gm.reshape(*inputs[:-1], -1, *outputs)
        return {"weight": pack(q_nm.reshape(weight.shape), len(inputs) - 1), "step": step}


@dataclass(frozen=True)
class Int8Rows:
    """A table in int8, with a step for each row."""

    def specs(self, specs: Specs) -> Specs:
        """`weight` of the same shape, `step` of its rows."""
        weight = specs["weight"]
        return {**specs, "weight": replace(weight, dtype="int8"), "step": _some_dims(weight, (0,), rows=weight.rows)}

    def module(self, part: Embedding, specs: Specs) -> nnx.Module:
        """The table in int8."""
        return QuantisedEmbedding(part, specs)


KINDS: dict[str, Callable[..., Any]] = {"int8": Int8, "fp8": Fp8, "int4": Int4, "nf4": Nf4, "int8-rows": Int8Rows}


def forms_for(
    description: Description, recipe: Recipe, group: int, tables: bool, share: float = 0.5, wide: Sequence[str] = ()
) -> Forms:
    """The forms of a recipe: of all matrices of the layers but the routers', and of the tables of tokens if asked for.

    Matrices whose names in a layer match one of the patterns `wide` are kept in int8; a `share` of those that are
    pruned is zero. Raises ValueError where a matrix cannot be cut into groups, and for a pattern that none matches.
    """
    sparse = Sparse(share, recipe.two_of_four)
    made = {"int8": Int8(), "w8a8": Int8(activations=True), "fp8": Fp8(), "nf4": Nf4(group), "sparse": sparse}
    form = made.get(recipe.form) or Int4(group, scaled=recipe.method == "awq")
    found, names = {}, []
    for path, spec in leaves(description.specs):
        *part, name = path
        if name == "weight" and part[0] == LAYERS and spec.is_matrix and part[-1] != ROUTER:
            names.append("/".join(part[1:]))
            is_wide = any(fnmatchcase(names[-1], pattern) for pattern in wide)
            found[tuple(part)] = Int8() if is_wide else form
        elif name == "weight" and "vocab" in spec.axes and spec.is_table and tables and not recipe.is_dense:
            found[tuple(part)] = Int8Rows()
    for pattern in wide:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"--wide {pattern}: no matrix of a layer is called so; there are {', '.join(names)}")
    for path, form in found.items():
        form.specs(branch(description.specs, path))
    return found


def to_json(forms: Forms) -> dict:
    """What `from_json` makes the same forms of."""
    names = {kind: name for name, kind in KINDS.items()}
    return {"/".join(path): {"form": names[type(form)], **asdict(form)} for path, form in forms.items()}


def from_json(values: dict) -> Forms:
    """The forms that were told by `to_json`."""
    made = lambda form, **fields: KINDS[form](**fields)
    return {tuple(path.split("/")): made(**value) for path, value in values.items()}


def dense(description: Description, params: dict) -> dict:
    """Parameters without quantised forms: each matrix and table in float32, as its codes say. To be jitted."""
    specs = parameter_specs(description.config)
    for path in description.forms:
        weights = branch(params, path)
        kept = {name: value for name, value in weights.items() if name == "bias"}
        weight = numbers_of(
            {k: v for k, v in weights.items() if k not in kept}, branch(specs, path)["weight"], jnp.float32
        )
        params = replaced(params, path, kept | {"weight": weight})
    return params


def numbers_of(kept: dict, spec: ParameterSpec, dtype) -> jax.Array:
    """What is kept of a matrix or a table, as numbers; `spec` is that of the float parameter."""
    if len(kept) == 1:  # pruned: floats
        return kept["weight"].astype(dtype)
    if spec.is_table:
        return kept["weight"].astype(dtype) * kept["step"].astype(dtype)[:, None]
    return numbers(**kept, outputs=len(_outputs(spec)), inputs=len(spec.contracted), dtype=dtype)


def quantised_rows(weights: dict) -> dict:
    """What Int8Rows keeps of a table."""
    grid = int8_grid(weights["weight"].astype(jnp.float32).T)
    codes_VD = grid.encode(weights["weight"].astype(jnp.float32).T).T
    step_V = jnp.where((codes_VD != 0).any(axis=1), grid.step_Gm[0], 0)  # padding is zero throughout
    return {**weights, "weight": codes_VD.astype(jnp.int8), "step": step_V}


def _outputs(weight: ParameterSpec) -> tuple[int, ...]:
    return tuple(dim for dim in range(len(weight.shape)) if dim not in (*weight.batch, *weight.contracted))


def _some_dims(weight: ParameterSpec, dims: tuple[int, ...], rows: int | None = None) -> ParameterSpec:
    """A number for each entry of some dims of a matrix, and for each matrix."""
    kept = (*weight.batch, *dims)
    shape, axes = tuple(weight.shape[d] for d in kept), tuple(weight.axes[d] for d in kept)
    return replace(weight, shape=shape, axes=axes, contracted=(), rows=rows, dtype=STEP_DTYPE)


def _resized(weight: ParameterSpec, dim: int, size: int) -> ParameterSpec:
    """With another size of a dim, which is split over the mesh as before if the mesh divides it."""
    name = weight.axes[dim]
    name = name if name == "head_dim" else f"{name}{GROUPS}"
    shape = (*weight.shape[:dim], size, *weight.shape[dim + 1 :])
    return replace(weight, shape=shape, axes=(*weight.axes[:dim], name, *weight.axes[dim + 1 :]))


# --------------------------------------------------------------------------------------------------------- the modules


def numbers(
    weight: jax.Array, step: jax.Array, zero=None, scale=None, *, inputs: int, outputs: int, dtype
) -> jax.Array:
    """The matrix (*batch, *in, *out) in `dtype`, by the numbers of its input and output dims."""
    if step.ndim < weight.ndim:
        batch = step.ndim - outputs
        return by_output(weight, dtype) * step.astype(dtype).reshape(
            *step.shape[:batch], *(1,) * inputs, *step.shape[batch:]
        )
    axis = weight.ndim - outputs - 1
    codes = unpack(weight, axis)
    grouped = (*codes.shape[:axis], step.shape[axis], -1, *codes.shape[axis + 1 :])
    each = lambda x: jnp.expand_dims(x.astype(dtype), axis + 1)
    codes = codes.reshape(grouped)
    if zero is None:
        centred = jnp.asarray(NF4, dtype)[codes]
    else:  # exact in 16 bits: a code less a zero has eight of them
        centred = codes.astype(dtype) - each(zero) / ZERO_PARTS
    matrix = centred * each(step)
    matrix = matrix.reshape(*grouped[:axis], -1, *grouped[axis + 2 :])
    return matrix if scale is None else matrix * scale.astype(dtype).reshape(*scale.shape, *(1,) * outputs)


def by_output(codes: jax.Array, dtype) -> jax.Array:
    """The numbers of codes, before their outputs' steps: int8, or bytes that are floats."""
    if codes.dtype == jnp.uint8:
        codes = jax.lax.bitcast_convert_type(codes, FLOAT8)
    return codes.astype(dtype)


class QuantisedProjection(nnx.Module):
    """What model.projection.Projection is, with a weight of codes."""

    def __init__(self, part: Projection, specs: Specs):
        """`specs` are those of a form: `weight` and `step`, perhaps `zero` and `scale`."""
        optional = lambda name: param(specs[name]) if name in specs else None
        self.weight, self.step = param(specs["weight"]), param(specs["step"])
        self.zero, self.scale = optional("zero"), optional("scale")
        self.bias, self.frozen_bias = part.bias, part.frozen_bias
        self.inputs, self.outputs = len(specs["weight"].contracted), len(_outputs(specs["weight"]))
        self.by_output = len(specs["step"].shape) < len(specs["weight"].shape)  # a step for each output, and no groups

    @property
    def axes(self) -> tuple[str, ...]:
        """As that of Projection."""
        return tuple(name.removesuffix(GROUPS) for name in self.weight.axes if name != LAYERS)

    def matrix(self, dtype) -> jax.Array:
        """The weight as a matmul in `dtype` needs it."""
        scale = None if self.scale is None else self.scale[...]
        return self._numbers(dtype, scale)

    def product(self, x: jax.Array) -> jax.Array:
        """x times the weight, in x's dtype, before the bias."""
        if self.by_output:  # the step may as well be multiplied with afterwards
            return project(x, by_output(_gathered(self.weight), x.dtype)) * _gathered(self.step).astype(x.dtype)
        x = x if self.scale is None else x * _gathered(self.scale).astype(x.dtype)
        return project(x, self._numbers(x.dtype, None))

    def __call__(self, x: jax.Array) -> jax.Array:
        """The product in x's dtype."""
        return biased(self.product(x), self.bias, frozen=self.frozen_bias)

    def _numbers(self, dtype, scale) -> jax.Array:
        zero = None if self.zero is None else _gathered(self.zero)
        dims = {"inputs": self.inputs, "outputs": self.outputs}
        return numbers(_gathered(self.weight), _gathered(self.step), zero, scale, dtype=dtype, **dims)


class Int8Projection(QuantisedProjection):
    """Codes of a matrix times codes of tokens, summed in int32: exact, so that no mesh changes it."""

    def product(self, x: jax.Array) -> jax.Array:
        """x (B, T, ...in) times the weight, in x's dtype; a token's vector is rounded to int8 by its largest entry."""
        axes = tuple(range(2, x.ndim))
        x32 = x.astype(jnp.float32)
        step = jnp.maximum(jnp.max(jnp.abs(x32), axis=axes, keepdims=True), SMALLEST) / LARGEST_INT8
        codes = jnp.round(x32 / step).astype(jnp.int8)
        inputs = tuple(range(self.inputs))
        y = jax.lax.dot_general(
            *(codes, _gathered(self.weight), ((axes, inputs), ((), ()))), preferred_element_type=jnp.int32
        )
        step = step.reshape(*x.shape[:2], *(1,) * self.outputs)
        return (y.astype(jnp.float32) * step * _gathered(self.step).astype(jnp.float32)).astype(x.dtype)


def _gathered(parameter: nnx.Param) -> jax.Array:
    """Codes as a matmul needs them. They are gathered as they are, in a half to a quarter of the bytes of numbers."""
    value = parameter[...]
    return shard(value, *parameter.axes[-value.ndim :])


class QuantisedEmbedding(Embedding):
    """A table of codes with a step for each row."""

    def __init__(self, part: Embedding, specs: Specs):
        """`specs` are those of a form: `weight` and `step`."""
        self.vocab_size, self.softcap, self.padded = part.vocab_size, part.softcap, part.padded
        self.weight, self.step = param(specs["weight"]), param(specs["step"])

    def table(self, dtype) -> jax.Array:
        """All rows, (V, D)."""
        return cast_and_gather(self.weight, dtype) * cast_and_gather(self.step, dtype)[:, None]

    def look_up(self, rows_BT: jax.Array, dtype) -> jax.Array:
        """These rows, x_BTD; for a row that is not there, some other."""
        rows = lambda table, *names: jnp.take(shard(table[...], *names), rows_BT, axis=0, mode="clip").astype(dtype)
        return rows(self.weight, "vocab", "width") * rows(self.step, "vocab")[..., None]
