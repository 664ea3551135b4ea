"""What the matrices of a block are multiplied with: modules that note it, put in their place while tokens pass."""

import jax
import jax.numpy as jnp
from flax import nnx

from model.attention_rule import TokenInfo
from model.forms import Forms, Path
from model.layers import activate
from model.moe import MixtureOfExperts
from model.projection import Projection
from model.specs import Specs

EXPERTS = "moe"  # the branch of a block whose matrices are stacks of experts


class Noted(nnx.Variable):
    """The gram of what a matrix was multiplied with: the sum over tokens of x^T x, (n, n), or (E, n, n)."""


class WatchedProjection(Projection):
    """A matrix that notes the gram of its inputs."""

    def __init__(self, part: Projection):
        """The parameters are those of the part."""
        self.weight, self.bias = part.weight, part.bias
        self.matmul_dtype, self.frozen_bias = part.matmul_dtype, part.frozen_bias

    def __call__(self, x: jax.Array) -> jax.Array:
        """As Projection."""
        x_tn = x.reshape(x.shape[0] * x.shape[1], -1).astype(jnp.float32)
        self.noted = Noted(x_tn.T @ x_tn)
        return super().__call__(x)


class WatchedExperts(MixtureOfExperts):
    """Experts whose matrices note the grams of the tokens that are sent to each, those beyond its capacity too."""

    def __init__(self, part: MixtureOfExperts):
        """The parameters are those of the part."""
        self.config, self.router = part.config, part.router
        self.gate, self.up, self.down, self.shared = part.gate, part.up, part.down, part.shared

    def __call__(self, x_BTD: jax.Array, info: TokenInfo):
        """As MixtureOfExperts."""
        c = self.config
        experts_BTJ, _ = self.router.choose(self.router.scores(x_BTD)[1])
        chosen_tE = (experts_BTJ[..., None] == jnp.arange(c.experts)).any(-2).reshape(-1, c.experts)
        x_tD = x_BTD.reshape(-1, x_BTD.shape[-1]).astype(jnp.float32)

        def of_expert(its):
            chosen_t, up, gate = its
            mine_tD = x_tD * chosen_t[:, None]
            hidden_tF = activate(c.activation, mine_tD @ up, None if gate is None else mine_tD @ gate)
            hidden_tF = hidden_tF * chosen_t[:, None]
            return mine_tD.T @ mine_tD, hidden_tF.T @ hidden_tF

        gate = None if self.gate is None else self.gate.matrix(jnp.float32)
        stacks = chosen_tE.T.astype(jnp.float32), self.up.matrix(jnp.float32), gate
        into, down = jax.lax.map(of_expert, stacks)
        for part in (self.up, self.gate):
            if part is not None:
                part.noted = Noted(into)
        self.down.noted = Noted(down)
        return super().__call__(x_BTD, info)


class Watch:
    """The form of a part that is watched; its parameters stay what they are."""

    def specs(self, specs: Specs) -> Specs:
        """The same."""
        return specs

    def module(self, part: nnx.Module, specs: Specs) -> nnx.Module:
        """What notes grams."""
        return WatchedExperts(part) if isinstance(part, MixtureOfExperts) else WatchedProjection(part)


def watching(paths: list[Path]) -> Forms:
    """The forms that watch the matrices at these paths."""
    is_expert = lambda path: path[-2] == EXPERTS
    # experts first: the part around is replaced before those in it
    around = {path[:-1]: Watch() for path in paths if is_expert(path)}
    return around | {path: Watch() for path in paths if not is_expert(path)}


def noted(block: nnx.Module, path: Path) -> jax.Array:
    """The gram that a matrix of a block has noted; `path` leads to it in the block."""
    for name in path:
        block = getattr(block, name)
    return block.noted[...]
