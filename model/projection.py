"""The one door through which tokens meet the weights of a block: what replaces it changes how all matrices are kept.

Adapters, quantised weights and other formats are classes with the two methods of `Projection`, put in its place (see
model/forms.py).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from model import low_precision
from model.matmul import add_bias, project
from model.platforms import choices
from model.specs import LAYERS, ParameterSpec, Specs
from parallel.sharding import cast_and_gather


def param(spec: ParameterSpec) -> nnx.Param:
    """The place of a parameter in a module, filled when the module is bound to arrays."""
    return nnx.Param(jax.ShapeDtypeStruct(spec.shape, spec.dtype or jnp.float32), axes=spec.axes)


def biased(y: jax.Array, bias: nnx.Param | None, *, frozen: bool = False) -> jax.Array:
    """y (B, T, ...out) plus a bias (...out), if there is one, in y's dtype. A frozen one has no gradient."""
    if bias is None:
        return y
    bias = cast_and_gather(bias, jnp.float32)  # its gradient is a sum over all tokens, wanted in float32
    bias = jax.lax.stop_gradient(bias) if frozen else bias
    return add_bias(y, bias) if choices().narrow_bias else (y + bias).astype(y.dtype)


class Projection(nnx.Module):
    """x (B, T, ...in) times a weight (...in, ...out), and a bias (...out) if there is one: (B, T, ...out)."""

    def __init__(self, specs: Specs, matmul_dtype: str = "", *, frozen_bias: bool = False):
        """`matmul_dtype` as in ModelConfig. A `frozen_bias` has no gradient."""
        self.weight = param(specs["weight"])
        self.bias = param(specs["bias"]) if "bias" in specs else None
        self.matmul_dtype, self.frozen_bias = matmul_dtype, frozen_bias

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the dims of one layer's weight."""
        return tuple(name for name in self.weight.axes if name != LAYERS)

    def matrix(self, dtype) -> jax.Array:
        """The weight (...in, ...out) as a matmul in `dtype` needs it: where not all tokens are multiplied alike."""
        return cast_and_gather(self.weight, dtype)

    def product(self, x: jax.Array) -> jax.Array:
        """x (B, T, ...in) times the weight, (B, T, ...out) in x's dtype, before the bias."""
        multiply = low_precision.dot if self.matmul_dtype == "float8" else project
        return multiply(x, cast_and_gather(self.weight, x.dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """The product in x's dtype."""
        return biased(self.product(x), self.bias, frozen=self.frozen_bias)
