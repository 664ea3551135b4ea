"""Adapters of single matrices: the form of each, and what computes with it.

What an adapter adds to a matrix stands in a branch `adapter` beside the matrix's own parameters, which keep their
names: without these branches, the parameters are the base's. A form may stand on another one (quantised weights).
"""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from compress.forms import QuantisedProjection, numbers_of
from model.forms import Form
from model.matmul import project
from model.projection import Projection, biased, param
from model.specs import ParameterSpec, Specs
from parallel.sharding import cast_and_gather, shard

ADAPTER = "adapter"  # the branch
SHORTEST = 1e-12  # what the length of weights that are all zero is taken for


def outputs_of(weight: ParameterSpec) -> tuple[int, ...]:
    """The dims of a matrix that come out."""
    return tuple(dim for dim in range(len(weight.shape)) if dim not in (*weight.batch, *weight.contracted))


def dims_of(weight: ParameterSpec) -> tuple[int, int]:
    """How many input dims and how many output dims a matrix has."""
    return len(weight.contracted), len(outputs_of(weight))


def beside(vector: jax.Array, matrix: jax.Array, dims: tuple[int, int], *, inputs: bool) -> jax.Array:
    """A vector over the inputs or the outputs of a matrix (*batch, *in, *out), shaped to be multiplied with it."""
    batch = matrix.ndim - sum(dims)
    before, after = (0, dims[1]) if inputs else (dims[0], 0)
    return vector.reshape(*vector.shape[:batch], *(1,) * before, *vector.shape[batch:], *(1,) * after)


def length_of(matrix: jax.Array, dims: tuple[int, int]) -> jax.Array:
    """The length of each output's weights, (*batch, *out), of a matrix (*batch, *in, *out)."""
    batch = matrix.ndim - sum(dims)
    return jnp.sqrt(jnp.sum(jnp.square(matrix.astype(jnp.float32)), axis=tuple(range(batch, batch + dims[0]))))


def some_dims(weight: ParameterSpec, dims: tuple[int, ...], value: float = 0.0) -> ParameterSpec:
    """A vector over some dims of a matrix, for each matrix; it begins as `value`."""
    kept = (*weight.batch, *dims)
    shape, axes = tuple(weight.shape[d] for d in kept), tuple(weight.axes[d] for d in kept)
    return replace(weight, shape=shape, axes=axes, contracted=(), std=0.0, value=value)


def numbers(kept: dict, weight: ParameterSpec) -> jax.Array:
    """The matrix or table of a base, float32, from what is kept of it: by itself, or as codes with their steps."""
    codes = {name: value for name, value in kept.items() if name not in ("bias", ADAPTER)}
    return codes["weight"].astype(jnp.float32) if len(codes) == 1 else numbers_of(codes, weight, jnp.float32)


def with_rank(axes: tuple[str, ...], place: int) -> tuple[str, ...]:
    """The names of a thin matrix's dims, with that of its small dim at this place.

    A matrix has one width dim, so that one of the two thin ones has it, and is split over fsdp there; the other is
    split in its small dim, where the mesh divides that.
    """
    return (*axes[:place], "rank" if "width" in axes else "thin", *axes[place:])


@dataclass(frozen=True)
class Narrow:
    """A matrix or a table that is kept in bfloat16: where it is computed with in bfloat16, nothing is lost."""

    def specs(self, specs: Specs) -> Specs:
        """The same, of another dtype."""
        return {**specs, "weight": replace(specs["weight"], dtype="bfloat16")}

    def module(self, part: nnx.Module, specs: Specs) -> nnx.Module:
        """The part itself."""
        part.weight = param(specs["weight"])
        return part


def is_coded(base: Form | None) -> bool:
    """Whether a base keeps codes and no numbers."""
    return base is not None and not isinstance(base, Narrow)


# ---------------------------------------------------------------------------------------------------------------- LoRA


@dataclass(frozen=True)
class Lora:
    """A matrix plus `scale` times the product of a (*in, rank) and b (rank, *out).

    With `magnitude` each output's weights are scaled to a length that is trained (DoRA); with `values` there is a
    factor for each of the ranks between a and b (AdaLoRA).
    """

    rank: int
    scale: float
    magnitude: bool = False
    values: bool = False
    base: Form | None = None  # of the matrix itself

    def specs(self, specs: Specs) -> Specs:
        """The matrix's parameters, and the branch `adapter`."""
        weight, own = specs["weight"], self.base.specs(specs) if self.base else specs
        _, into, out = weight.key.split(3)
        batch, inputs = len(weight.batch), len(weight.contracted)
        dim = batch + inputs
        fan_in = math.prod(weight.shape[d] for d in weight.contracted)
        a = replace(weight, shape=(*weight.shape[:dim], self.rank), axes=with_rank(weight.axes[:dim], dim))
        b = replace(
            weight,
            shape=(*weight.shape[:batch], self.rank, *weight.shape[dim:]),
            axes=with_rank((*weight.axes[:batch], *weight.axes[dim:]), batch),
            contracted=(batch,),
        )
        # as peft: a is uniform up to 1 / sqrt(inputs); with singular values both matter from the start
        a = replace(a, key=into, std=0.02 if self.values else (3 * fan_in) ** -0.5)
        b = replace(b, key=out, std=0.02 if self.values else 0.0)
        adapter = {"a": {"weight": a}, "b": {"weight": b}}
        if self.values:
            shape, axes = (*weight.shape[:batch], self.rank), (*weight.axes[:batch], "rank")
            adapter["values"] = replace(weight, shape=shape, axes=axes, contracted=(), std=0.0)
        if self.magnitude:
            adapter["magnitude"] = some_dims(weight, outputs_of(weight), 1.0)
        return {**own, ADAPTER: adapter}

    def module(self, part: Projection, specs: Specs) -> nnx.Module:
        """The matrix with its adapter."""
        return (LoraQuantised if is_coded(self.base) else LoraProjection)(part, specs, self)


class Thin(Projection):
    """A matrix with one small dim. It is pinned as it is multiplied: left to itself, the partitioner moves so small a
    thing in ways that stages of a pipeline cannot follow.
    """

    def product(self, x: jax.Array) -> jax.Array:
        """x times the weight, in x's dtype, before the bias."""
        return project(x, shard(self.matrix(x.dtype), *self.axes))


class LoraPair(nnx.Module):
    """The two thin matrices, and what stands between them."""

    def __init__(self, specs: Specs, scale: float):
        self.a, self.b, self.scale = Thin(specs["a"]), Thin(specs["b"]), scale
        self.values = param(specs["values"]) if "values" in specs else None
        self.magnitude = param(specs["magnitude"]) if "magnitude" in specs else None
        self.inputs = len(specs["a"]["weight"].contracted)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (B, T, ...in) to what is added to its product with the matrix, (B, T, ...out)."""
        h_BTR = shard(self.a(x), "batch", "tokens", "rank")
        if self.values is not None:
            h_BTR = h_BTR * cast_and_gather(self.values, x.dtype)
        return self.b(h_BTR * jnp.asarray(self.scale, x.dtype))

    def matrix(self, dtype) -> jax.Array:
        """What is added to the matrix (*batch, *in, *out)."""
        values = None if self.values is None else cast_and_gather(self.values, dtype)
        return self.scale * thin_product(self.a.matrix(dtype), self.b.matrix(dtype), values, self.inputs)


def thin_product(a: jax.Array, b: jax.Array, values: jax.Array | None, inputs: int) -> jax.Array:
    """a (*batch, *in, R) times b (*batch, R, *out), with a factor for each R between them: (*batch, *in, *out)."""
    batch, rank = a.ndim - inputs - 1, a.shape[-1]
    values = jnp.ones(rank, a.dtype) if values is None else values
    stack = a.shape[:batch]
    a_EIR, b_ERO = a.reshape(*stack, -1, rank), b.reshape(*stack, rank, -1)
    product = jnp.einsum("...ir,...r,...ro->...io", a_EIR, values, b_ERO)
    return product.reshape(*a.shape[:-1], *b.shape[batch + 1 :])


class _WithLora:
    """What a matrix does that has a LoraPair, before its own methods."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """The product in x's dtype."""
        y = self.product(x) + self.adapter(x)
        if self.adapter.magnitude is not None:
            y = y * self._stretch(self._sum(jnp.float32)).astype(y.dtype)
        return biased(y, self.bias, frozen=self.frozen_bias)

    def matrix(self, dtype) -> jax.Array:
        """The weight as a matmul in `dtype` needs it, with what the adapter adds."""
        if self.adapter.magnitude is None:
            return self._sum(dtype)
        matrix = self._sum(jnp.float32)
        return (matrix * beside(self._stretch(matrix), matrix, self.dims, inputs=False)).astype(dtype)

    def _sum(self, dtype) -> jax.Array:
        return super().matrix(dtype) + self.adapter.matrix(dtype)

    def _stretch(self, matrix: jax.Array) -> jax.Array:
        """The trained length of each output's weights over the length that they have, (*batch, *out).

        The latter has no gradient (arXiv 2402.09353, section 4.3).
        """
        length = jnp.maximum(jax.lax.stop_gradient(length_of(matrix, self.dims)), SHORTEST)
        return cast_and_gather(self.adapter.magnitude, jnp.float32) / length


class LoraProjection(_WithLora, Projection):
    """A Projection with a LoraPair."""

    def __init__(self, part: Projection, specs: Specs, form: Lora):
        super().__init__(specs, part.matmul_dtype, frozen_bias=part.frozen_bias)
        self.adapter, self.dims = LoraPair(specs[ADAPTER], form.scale), dims_of(specs["weight"])


class LoraQuantised(_WithLora, QuantisedProjection):
    """A QuantisedProjection with a LoraPair."""

    def __init__(self, part: Projection, specs: Specs, form: Lora):
        super().__init__(part, specs)
        self.adapter, self.dims = LoraPair(specs[ADAPTER], form.scale), dims_of(specs["weight"])


# ----------------------------------------------------------------------------------------------------------------- IA3


@dataclass(frozen=True)
class Scaled:
    """A matrix whose inputs or outputs have a factor each that begins as 1 (IA3)."""

    inputs: bool  # factors of inputs, else of outputs, the bias included
    base: Form | None = None

    def specs(self, specs: Specs) -> Specs:
        """The matrix's parameters, and the branch `adapter`."""
        weight, own = specs["weight"], self.base.specs(specs) if self.base else specs
        dims = weight.contracted if self.inputs else outputs_of(weight)
        return {**own, ADAPTER: {"factors": some_dims(weight, dims, 1.0)}}

    def module(self, part: Projection, specs: Specs) -> nnx.Module:
        """The matrix with its factors."""
        return (ScaledQuantised if is_coded(self.base) else ScaledProjection)(part, specs, self)


class Factors(nnx.Module):
    """The factors of a Scaled."""

    def __init__(self, specs: Specs, inputs: bool):
        self.factors, self.inputs = param(specs["factors"]), inputs


class _WithFactors:
    """What a matrix does that has Factors, before its own methods."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """The product in x's dtype."""
        factors = cast_and_gather(self.adapter.factors, x.dtype)
        return super().__call__(x * factors) if self.adapter.inputs else super().__call__(x) * factors

    def matrix(self, dtype) -> jax.Array:
        """The weight as a matmul in `dtype` needs it, with the factors."""
        matrix, factors = super().matrix(dtype), cast_and_gather(self.adapter.factors, dtype)
        return matrix * beside(factors, matrix, self.dims, inputs=self.adapter.inputs)


class ScaledProjection(_WithFactors, Projection):
    """A Projection with factors."""

    def __init__(self, part: Projection, specs: Specs, form: Scaled):
        super().__init__(specs, part.matmul_dtype, frozen_bias=part.frozen_bias)
        self.adapter, self.dims = Factors(specs[ADAPTER], form.inputs), dims_of(specs["weight"])


class ScaledQuantised(_WithFactors, QuantisedProjection):
    """A QuantisedProjection with factors."""

    def __init__(self, part: Projection, specs: Specs, form: Scaled):
        super().__init__(part, specs)
        self.adapter, self.dims = Factors(specs[ADAPTER], form.inputs), dims_of(specs["weight"])
