"""A smaller dense model of a trained one: without the heads, ffn entries and layers that its tokens miss least.

Layers go first, those whose output is most like their input (ShortGPT, arXiv 2403.03853, equation 1). Then the
calibration tokens walk through the layers that stay: in each, the groups of heads (a key and value head with its
queries) and the entries of ffn that add least to the block's output go, and the matrix behind them, `out` or `down`, is
fitted anew by least squares, so that what stays makes the outputs of before as well as it can.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from compress.layers import Progress, Walk, layer_shardings
from model.config import ModelConfig
from model.forms import Path, branch, replaced
from model.specs import LAYERS, leaves
from model.transformer import Description, describe

RIDGE = 0.01  # of the mean of the gram's diagonal: how much a fitted matrix is drawn to what it was
OUT, DOWN = ("attention", "out"), ("ffn", "down")


@dataclass(frozen=True)
class Sizes:
    """What is to stay of a model; None: all."""

    layers: int | None = None
    kv_heads: int | None = None
    ffn: int | None = None

    def of(self, config: ModelConfig) -> ModelConfig:
        """The smaller model. Raises ValueError for sizes that are none of this model, and options that forbid them."""
        c, asked = config, {name: size for name, size in vars(self).items() if size is not None}
        for name, size in asked.items():
            if not 0 < size <= getattr(c, name):
                raise ValueError(f"--{name.replace('_', '-')} {size}: the model has {getattr(c, name)}")
        if not asked or all(size == getattr(c, name) for name, size in asked.items()):
            raise ValueError("narrow: nothing would go; set --layers, --kv-heads or --ffn to less than the model has")
        if c.experts:
            raise ValueError(f"narrow: model.experts={c.experts}, and experts are not narrowed")
        if c.parametrization != "standard":
            raise ValueError(f"narrow: model.parametrization={c.parametrization} makes scales of the sizes themselves")
        if self.layers not in (None, c.layers) and c.window and "G" in c.window_pattern:
            raise ValueError(f"--layers: model.window_pattern={c.window_pattern} would then fall on other layers")
        if self.kv_heads not in (None, c.kv_heads) and c.qk_norm and c.qk_norm_dims == "all":
            raise ValueError("--kv-heads: the model norms all heads together (model.qk_norm_dims=all)")
        return replace(c, **asked, heads=asked.get("kv_heads", c.kv_heads) * (c.heads // c.kv_heads))


def narrowed(
    description: Description,
    params: dict,
    mesh: Mesh,
    config: ModelConfig,
    samples_NT: np.ndarray,
    progress: Progress = lambda done, total: None,
) -> tuple[Description, dict]:
    """The model of `config` (see Sizes.of) and its parameters; to be called inside `jax.set_mesh(mesh)`.

    samples: as many rows of tokens as the batch axes divide, of as many tokens as `residual` divides.
    """
    old, target = description.config, describe(config)
    row_of = lambda stacked, row: jax.tree.map(lambda p: p[row], stacked)
    cut = jax.jit(row_of, out_shardings=layer_shardings(description, mesh))
    its_of = lambda layer: cut(params[LAYERS], np.int32(layer))
    outside = {name: value for name, value in params.items() if name != LAYERS}
    with jax.default_matmul_precision("float32"):
        begin = partial(_Influence, description, mesh, [OUT, DOWN], outside, samples_NT)
        stay = _most_moving(begin(), its_of, old.layers, config.layers)
        walk, parts, found = begin(), _parts(description, config), []
        take = jax.jit(partial(_take, description), out_shardings=layer_shardings(target, mesh))
        for done, layer in enumerate(stay):
            its, kept = its_of(layer), {}
            for axis, part in parts.items():
                gram_nn = walk.grams(its, layer, (part.path,))[part.path]
                weights = branch(its, part.path)
                kept[axis], weight = part.narrow(weights["weight"], gram_nn)
                its = replaced(its, part.path, weights | {"weight": weight})
            found.append(take(its, kept))
            walk.advance(its, layer)
            progress(done + 1, len(stay))
    stacked = lambda layers: jax.tree.map(lambda *p: jnp.stack(p), *layers)
    layers = jax.jit(stacked, out_shardings=target.shardings(mesh)[LAYERS])(found)
    return target, outside | {LAYERS: layers}


class _Influence(Walk):
    """Calibration tokens on their way, that tell how far a layer moves them."""

    def moved(self, its: dict, layer: int) -> float:
        """One less the mean cosine between a token's vector before a layer and after it."""
        row, tell = self._row(layer), jax.jit(self._cosine)
        return 1 - float(np.mean([tell(its, x, t, row) for x, t in zip(self.x, self.tokens, strict=True)]))

    def _cosine(self, its: dict, x_BTD, tokens_BT, row) -> jax.Array:
        y_BTD = self._block(its, x_BTD, tokens_BT, row)[0]
        length = lambda v: jnp.linalg.norm(v.astype(jnp.float32), axis=-1)
        product_BT = jnp.sum(x_BTD.astype(jnp.float32) * y_BTD, axis=-1)
        return jnp.mean(product_BT / jnp.maximum(length(x_BTD) * length(y_BTD), 1e-12))


def _most_moving(walk: _Influence, its_of: Callable, layers: int, count: int) -> list[int]:
    """The layers that stay, in order; of all no walk is needed."""
    moved = []
    for layer in range(layers) if count < layers else ():
        its = its_of(layer)
        moved.append(walk.moved(its, layer))
        walk.advance(its, layer)
    return sorted(np.argsort(-np.asarray(moved), kind="stable")[:count].tolist()) if moved else list(range(layers))


# ------------------------------------------------------------------------------------------------ a layer's parts


@dataclass(frozen=True)
class _Part:
    """A matrix whose inputs go in groups."""

    path: Path  # in the layer
    groups: int
    stay: int  # how many of the groups

    def narrow(self, weight: jax.Array, gram_nn: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Which groups stay, int32, in order; and the matrix, fitted anew, with zeros where the others were."""
        return _narrow(weight, gram_nn, self.groups, self.stay)


@partial(jax.jit, static_argnums=(2, 3))
def _narrow(weight, gram_nn, groups: int, stay: int):
    n = len(gram_nn)
    w_nm, size = weight.astype(jnp.float32).reshape(n, -1), n // groups
    # what a group adds to the outputs, squared and summed over tokens: the trace of w^T gram w within the group
    w_Ggm, gram_GgGg = w_nm.reshape(groups, size, -1), gram_nn.reshape(groups, size, groups, size)
    added_G = jnp.einsum("xgm,xgxh,xhm->x", w_Ggm, gram_GgGg, w_Ggm)
    stay_G = jnp.sort(jnp.argsort(-added_G)[:stay])
    rows_k = (stay_G[:, None] * size + jnp.arange(size)).reshape(-1)
    return stay_G, jnp.zeros_like(w_nm).at[rows_k].set(fitted(w_nm, gram_nn, rows_k)).reshape(weight.shape)


def fitted(w_nm: jax.Array, gram_nn: jax.Array, rows_k: jax.Array) -> jax.Array:
    """(k, m): the matrix of these inputs alone whose outputs are nearest to those of all, over the gram's tokens."""
    ridge = RIDGE * jnp.maximum(jnp.mean(jnp.diagonal(gram_nn)), jnp.finfo(jnp.float32).tiny)
    inside_kk = gram_nn[rows_k][:, rows_k] + ridge * jnp.eye(len(rows_k))
    return jax.scipy.linalg.solve(inside_kk, gram_nn[rows_k] @ w_nm + ridge * w_nm[rows_k], assume_a="pos")


def _parts(description: Description, config: ModelConfig) -> dict[str, _Part]:
    """By the name of the dim that gets shorter."""
    old, found = description.config, {}
    if config.kv_heads < old.kv_heads:
        found["kv_heads"] = _Part(OUT, old.kv_heads, config.kv_heads)
    if config.ffn < old.ffn:
        found["ffn"] = _Part(DOWN, old.ffn, config.ffn)
    return found


def _take(description: Description, its: dict, kept: dict[str, jax.Array]) -> dict:
    """The parameters of a layer at what is kept of its dims."""
    c = description.config
    if "kv_heads" in kept:
        queries = c.heads // c.kv_heads
        kept = kept | {"heads": (kept["kv_heads"][:, None] * queries + jnp.arange(queries)).reshape(-1)}
    for path, spec in leaves(description.specs[LAYERS]):
        value = branch(its, path)
        for dim, name in enumerate(spec.axes[1:]):
            value = jnp.take(value, kept[name], axis=dim) if name in kept else value
        its = replaced(its, path, value)
    return its
