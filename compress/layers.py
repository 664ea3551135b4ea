"""A model's matrices and tables into their quantised forms, a layer at a time, wherever they lie on the mesh.

For a calibrated method the calibration tokens walk through the layers: before a group of matrices is quantised, it is
noted what they are multiplied with in a model whose earlier matrices are quantised already. Of the tokens only the
vectors between two layers are kept, and of grams those of one group of one layer.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from compress.forms import Int4, dense, numbers_of, quantised_rows
from compress.pruning import Sparse
from compress.rounding import chosen, shrunk_gram
from compress.watching import noted, watching
from model.forms import Form, Forms, Path, branch, of_block, replaced
from model.specs import LAYERS, ParameterSpec, RandomKey, map_specs
from model.transformer import Description, describe, rows_of
from parallel.sharding import parameter_sharding, put_batch, splits

# Matrices that are quantised together: each group is multiplied with what those before it make.
TOGETHER = (("query", "key", "value"), ("out",), ("gate", "up"), ("down",))
BATCH_TOKENS = 2048  # of calibration that pass at a time, for each part of the batch
Progress = Callable[[int, int], None]  # layers done, layers in all


def quantise(
    description: Description,
    params: dict,
    mesh: Mesh,
    forms: Forms,
    method: str,
    samples_NT: np.ndarray | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[Description, dict]:
    """The model in these forms, and its parameters; to be called inside `jax.set_mesh(mesh)`.

    method: round | magnitude, or with samples gptq | awq | wanda: as many rows of these as the batch axes divide, of as
    many tokens as `residual` divides.
    """
    config = description.config
    tables = {path: form for path, form in forms.items() if path[0] != LAYERS}
    target, around = describe(config, forms=forms), describe(config, forms=tables)
    found = params
    for path in tables:
        shardings = branch(target.shardings(mesh), path)
        found = replaced(found, path, jax.jit(quantised_rows, out_shardings=shardings)(branch(params, path)))
    with jax.default_matmul_precision("float32"):
        walk = None
        if samples_NT is not None:
            outside = {name: value for name, value in found.items() if name != LAYERS}
            begun = jax.jit(partial(dense, around))(outside)
            walk = Walk(description, mesh, list(of_block(forms)), begun, samples_NT)
        tokens = 0 if samples_NT is None else samples_NT.size
        matrices = _matrices(description, target, mesh, method, of_block(forms), tokens)
        cut = jax.jit(
            lambda stacked, row: jax.tree.map(lambda p: p[row], stacked),
            out_shardings=layer_shardings(description, mesh),
        )
        for layer in range(config.layers):
            _quantise_layer(cut(params[LAYERS], np.int32(layer)), layer, matrices, walk)
            progress(layer + 1, config.layers)
    for path, matrix in matrices.items():
        kept = {name: value for name, value in branch(params[LAYERS], path).items() if name != "weight"}
        found = replaced(found, (LAYERS, *path), kept | matrix.stacks)
    return target, found


def _quantise_layer(its: dict, layer: int, matrices: dict[Path, "Matrix"], walk: "Walk | None") -> None:
    for names in TOGETHER:
        group = {path: matrix for path, matrix in matrices.items() if path[-1] in names}
        grams = walk.grams(its, layer, tuple(group)) if walk is not None and group else {}
        for path, matrix in group.items():
            weights = branch(its, path)
            kept = matrix.put(layer, weights["weight"], grams.get(path))
            if walk is not None:
                its = replaced(its, path, weights | {"weight": matrix.numbers(kept)})
    if walk is not None:
        walk.advance(its, layer)


def layer_shardings(description: Description, mesh: Mesh) -> dict:
    """Where the parameters of one layer lie."""
    specs = map_specs(lambda spec: spec.of_one_layer(), description.specs[LAYERS])
    return map_specs(lambda spec: parameter_sharding(mesh, spec.shape, spec.axes), specs)


class Matrix:
    """A matrix of all layers on its way into its form."""

    def __init__(self, programs: "Programs", stacks: dict):
        """`stacks` hold what is kept of all layers, and begin as zeros."""
        self._programs, self.stacks = programs, stacks

    def put(self, layer: int, weight: jax.Array, gram: jax.Array | None) -> dict:
        """Quantises that of a layer; returns what is kept of it."""
        kept = self._programs.quantise(weight, gram)
        self.stacks = self._programs.put(self.stacks, kept, np.int32(layer))
        jax.block_until_ready(self.stacks)  # else the host would run ahead, and hold many layers
        return kept

    def numbers(self, kept: dict) -> jax.Array:
        """What is kept of a layer, as numbers."""
        return self._programs.numbers(kept)


class Programs:
    """What is compiled for all matrices of one shape, layout and form."""

    def __init__(
        self, spec: ParameterSpec, form: Form, method: str, kept: dict[str, ParameterSpec], mesh: Mesh, tokens: float
    ):
        """`spec` is that of the float weight in one layer, `kept` those of what is kept of all layers; `tokens` is how
        many a gram is of.
        """
        self.spec, self.form, self.method, self.tokens = spec, form, method, tokens
        place = lambda spec: parameter_sharding(mesh, spec.shape, spec.axes)
        one, all_ = map_specs(lambda spec: place(spec.of_one_layer()), kept), map_specs(place, kept)
        self.quantise = jax.jit(self._kept, out_shardings=one)
        self.numbers = jax.jit(partial(numbers_of, spec=spec, dtype=jnp.float32), out_shardings=place(spec))
        empty = lambda: map_specs(lambda spec: jnp.zeros(spec.shape, spec.dtype), kept)
        self.empty = jax.jit(empty, out_shardings=all_)
        put = partial(jax.lax.dynamic_update_index_in_dim, axis=0)
        put_all = lambda stacks, its, row: jax.tree.map(lambda stack, one: put(stack, one, row), stacks, its)
        self.put = jax.jit(put_all, donate_argnums=0, out_shardings=all_)

    def _kept(self, weight: jax.Array, gram: jax.Array | None) -> dict:
        spec = self.spec
        while spec.batch:  # experts
            spec = spec.of_one_layer()
        inputs = math.prod(spec.shape[dim] for dim in spec.contracted)
        group = spec.shape[spec.contracted[-1]] // self.form.groups(spec) if isinstance(self.form, Int4) else 0

        def one(weight, gram):
            w_nm = weight.astype(jnp.float32).reshape(inputs, -1)
            if isinstance(self.form, Sparse):
                return self.form.kept(spec, w_nm, gram)
            if gram is not None:
                gram = shrunk_gram(gram, self.tokens)
            return self.form.kept(spec, *chosen(self.form, self.method, w_nm, gram, group))

        return (jax.vmap(one) if self.spec.batch else one)(weight, gram)


def _matrices(
    description: Description, target: Description, mesh: Mesh, method: str, paths: Iterable[Path], tokens: int
) -> dict[Path, Matrix]:
    """The matrices at these paths of a block; those alike share what is compiled."""
    found, programs = {}, {}
    plain = lambda spec: replace(spec, key=RandomKey(), std=0.0)  # what a parameter begins as does not matter here
    for path in paths:
        place = (LAYERS, *path)
        spec, form = plain(branch(description.specs, place)["weight"].of_one_layer()), target.forms[place]
        kept = {name: plain(one) for name, one in branch(target.specs, place).items() if name != "bias"}
        key = spec, form, tuple(kept.items())
        if key not in programs:
            c = description.config
            its = tokens * c.experts_per_token / c.experts if spec.batch else tokens  # of an expert, on the average
            programs[key] = Programs(spec, form, method, kept, mesh, its)
        found[path] = Matrix(programs[key], programs[key].empty())
    return found


class Walk:
    """Calibration tokens on their way through the layers."""

    def __init__(self, description: Description, mesh: Mesh, paths: list[Path], outside: dict, samples_NT: np.ndarray):
        """`paths` lead to matrices of a block; `outside` are the parameters around the layers."""
        self.description = description
        self.block = describe(description.config, forms=watching([(LAYERS, *path) for path in paths])).block
        samples_NT = np.asarray(samples_NT, np.int32)
        rows = _rows_at_once(*samples_NT.shape)
        cuts = [samples_NT[start : start + rows] for start in range(0, len(samples_NT), rows)]
        self.tokens = [put_batch(mesh, {"tokens": cut}, rows)["tokens"] for cut in cuts]
        begin = jax.jit(self._embed)
        self.x = [begin(outside, tokens_BT) for tokens_BT in self.tokens]
        self._advance = jax.jit(self._through, donate_argnums=1)
        self._noting = {}

    def grams(self, its: dict, layer: int, paths: tuple[Path, ...]) -> dict[Path, jax.Array]:
        """What these matrices of a layer are multiplied with, summed over all tokens."""
        note = self._noting.setdefault(paths, jax.jit(partial(self._grams, paths)))
        total = None
        for x_BTD, tokens_BT in zip(self.x, self.tokens, strict=True):
            grams = note(its, x_BTD, tokens_BT, self._row(layer))
            total = grams if total is None else jax.tree.map(jnp.add, total, grams)
            jax.block_until_ready(total)
        return dict(zip(paths, total, strict=True))

    def advance(self, its: dict, layer: int) -> None:
        """Through a layer."""
        row = self._row(layer)
        for index, tokens_BT in enumerate(self.tokens):
            self.x[index] = jax.block_until_ready(self._advance(its, self.x[index], tokens_BT, row))

    def _row(self, layer: int) -> dict:
        return jax.tree.map(lambda x: x[0], rows_of(self.description.config, [layer]))

    def _embed(self, outside: dict, tokens_BT: jax.Array) -> jax.Array:
        model = self.description.bind(outside)
        return model.embed(tokens_BT, model.info(tokens_BT), jnp.float32)

    def _block(self, its: dict, x_BTD: jax.Array, tokens_BT: jax.Array, row: dict) -> tuple[jax.Array, nnx.Module]:
        info = self.description.bind({}).info(tokens_BT)
        block = nnx.merge(self.block, jax.tree.map(lambda p: p.astype(jnp.float32), its))
        return block(x_BTD, info, row["layer"], row.get("window"))[0], block

    def _grams(self, paths: tuple[Path, ...], its, x_BTD, tokens_BT, row) -> list[jax.Array]:
        _, block = self._block(its, x_BTD, tokens_BT, row)
        return [noted(block, path) for path in paths]

    def _through(self, its, x_BTD, tokens_BT, row) -> jax.Array:
        return self._block(its, x_BTD, tokens_BT, row)[0]


def _rows_at_once(rows: int, tokens: int) -> int:
    """A part of the rows that divides them and that the batch axes divide."""
    parts = splits("batch")
    most = max(1, BATCH_TOKENS // tokens)
    each = rows // parts
    return parts * max(d for d in range(1, each + 1) if each % d == 0 and d <= most)
