"""Tokens to the experts that they chose, and back: over the `expert` axis by all-to-all, on a device by groups of rows.

An assignment is a pair of a token and one of the J experts that it chose. Assignments are sorted by where they go, and
lie in rows: of the message to each rank of `expert`, then of each expert's group. Every move is a gather, and so is its
gradient, since the place of an assignment and the assignment of a place are both known.

Two implementations give the same results. `padded` has static groups: messages of equal parts, and blocks of rows that
belong to one expert each, for batched matmuls. `ragged` moves and multiplies no more rows than there are
(ragged_all_to_all, ragged_dot), which CPUs cannot do, or not well. GPUs move as in `ragged` and multiply as in
`padded`: XLA's ragged_dot multiplies every row with every expert there, 16 times the work of 16 experts. Both have room
for the worst case and drop nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from parallel.manual import differentiable_map, vary
from parallel.mesh import AXES
from parallel.sharding import layout
from runtime.platform import platform

SMALLEST_BLOCK = 8


@dataclass(frozen=True)
class Blocks:
    """How a platform multiplies blocks of rows, each with the matrix of one expert."""

    rows_of_a_pass: int  # what is done once a block, whatever its length, takes the time of so many rows
    divide: int = 1  # the number of blocks is a multiple of it
    summed_by_matmul: bool = False  # the gradient of a matrix, in the dtype of the matrix; else by a scatter of float32


BLOCKS = {
    "cpu": Blocks(rows_of_a_pass=64),
    # For each weight a block writes two bytes, when matrices are gathered, and reads two, when gradients are summed: 4
    # at 4.3 TB/s against six FLOPs a row at 800 TFLOP/s are 124 rows; what matmuls read passes behind their FLOPs.
    # A scatter would read and write float32 as large as all blocks' gradients; a matmul over blocks of another number
    # would be padded, in a copy.
    "gpu": Blocks(rows_of_a_pass=128, divide=8, summed_by_matmul=True),
}


def _of_platform() -> Blocks:
    return BLOCKS.get(platform(), BLOCKS["cpu"])


Matmul = Callable[[jax.Array, jax.Array], jax.Array]  # (rows (..., D), stacked matrices (E, D, F)) -> (..., F)


def dispatch(
    x_BTD: jax.Array,
    experts_BTJ: jax.Array,
    weights_BTJ: jax.Array,
    matrices: Sequence[jax.Array],
    dims: Sequence[tuple[str, str, str]],
    apply: Callable[..., jax.Array],
    *,
    capacity: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The weighted sum of what its experts make of each token, y_BTD; experts_BTJ = E stands for none.

    `matrices` are stacked (E, in, out), their dims named by `dims` as in the tables of parallel.sharding; they may be
    split over `expert` and over `tensor`. `apply(matmul, rows, *matrices)` is an expert: elementwise but for `matmul`,
    linear at its end, so that its parts over `tensor` add up. `capacity`, if given, is the most assignments that an
    expert has of one sequence: messages are then no longer than that. `implementation` is padded, ragged or
    `moved ragged` (multiplied as padded); by default what the platform is fast at.
    """
    tokens = layout(experts_BTJ.shape, "batch", "tokens", None)
    residual = layout(x_BTD.shape, "batch", "residual", "width")
    layouts = (residual, tokens, tokens, *(layout(m.shape, *names) for m, names in zip(matrices, dims, strict=True)))
    named = {axis for dims in layouts for axes in dims for axis in axes}
    manual = tuple(axis for axis in AXES if axis in named)
    way = implementation or _implementation()
    ways = {"moves_ragged": way != "padded", "multiplies_ragged": way == "ragged"}
    body = partial(_local, manual, "tensor" in residual[1], matrices[0].shape[0], apply, capacity, **ways)
    if not manual:
        return body(x_BTD, experts_BTJ, weights_BTJ, *matrices)
    specs = tuple(PartitionSpec(*dims) for dims in layouts)
    return differentiable_map(body, specs, specs[0], manual)(x_BTD, experts_BTJ, weights_BTJ, *matrices)


def _implementation() -> str:
    return {"cpu": "padded", "gpu": "moved ragged"}.get(platform(), "ragged")


def _local(
    manual, split, experts, apply, capacity, x_BTD, experts_BTJ, weights_BTJ, *matrices, moves_ragged, multiplies_ragged
):
    """What one device does with its tokens and its experts."""
    # typed as different on all axes at once, so that gradients are summed over the others once and at the end
    x_BTD, experts_BTJ, weights_BTJ, matrices = vary((x_BTD, experts_BTJ, weights_BTJ, matrices), manual)
    if split:  # tokens over tensor, as they lie between blocks
        x_BTD = jax.lax.all_gather(x_BTD, "tensor", axis=1, tiled=True)
    B, T, J = experts_BTJ.shape
    here = matrices[0].shape[0]  # experts of this device
    serve = partial(_serve, here, multiplies_ragged, lambda matmul, rows: apply(matmul, rows, *matrices))
    x_nD, experts_nJ = x_BTD.reshape(B * T, -1), experts_BTJ.reshape(B * T, J)
    if here == experts:
        out_nJD = serve(x_nD, experts_nJ)
    else:
        assert experts % here == 0, "the batch and the experts must divide by the axis"
        room = B * T * min(J, here)
        if capacity is not None:
            room = min(room, B * here * min(T, capacity))
        out_nJD = _exchange(experts // here, here, room, moves_ragged, serve, x_nD, experts_nJ)
    y_BTD = jnp.einsum("BTJD,BTJ->BTD", out_nJD.reshape(B, T, J, -1), weights_BTJ.astype(x_BTD.dtype))
    if split:
        return jax.lax.psum_scatter(y_BTD, "tensor", scatter_dimension=1, tiled=True)
    return jax.lax.psum(y_BTD, "tensor") if "tensor" in manual else y_BTD


# --------------------------------------------------------------------------------------------------------- assignments


@dataclass(frozen=True)
class Places:
    """Where assignments lie: N of them, token by token, in R rows."""

    rows_nJ: jax.Array  # the row of each assignment; R for none
    source_R: jax.Array  # the assignment in each row; N for none


def count(group_N: jax.Array, groups: int) -> jax.Array:
    """How many assignments each of `groups` groups has, int32 of (groups,); in group_N `groups` stands for none."""
    return (group_N[:, None] == jnp.arange(groups)).sum(0, dtype=jnp.int32)


def place(group_nJ: jax.Array, first_row: jax.Array, counts: jax.Array, rows: int) -> Places:
    """Lays the assignments of each group into successive rows from its `first_row`, in their order.

    group_nJ: the group of each of the J assignments of n tokens; as many as there are groups stands for none.
    first_row, counts: of (groups,). rows: R.
    """
    group_N = group_nJ.reshape(-1)
    N, groups = group_N.shape[0], counts.shape[0]
    order = jnp.argsort(group_N, stable=True)
    sorted_N = group_N[order]
    rank = jnp.arange(N) - jnp.append(jnp.cumsum(counts) - counts, 0)[sorted_N]
    row = jnp.where(sorted_N < groups, jnp.append(first_row, 0)[sorted_N] + rank, rows)
    rows_N = jnp.zeros_like(order).at[order].set(row, unique_indices=True)
    source_R = jnp.full_like(order, N, shape=rows).at[row].set(order, mode="drop")
    return Places(rows_N.reshape(group_nJ.shape), source_R)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def _spread(x_nD: jax.Array, rows_nJ: jax.Array, source_R: jax.Array) -> jax.Array:
    """Each row's token; zeros where there is none."""
    return _take(x_nD, source_R // rows_nJ.shape[1])


def _spread_backward(rows_nJ, d_RD):
    return _take(d_RD, rows_nJ).sum(1), None, None


_spread.defvjp(lambda x, rows, source: (_spread(x, rows, source), rows), _spread_backward)


@jax.custom_vjp
def _collect(rows_RD: jax.Array, rows_nJ: jax.Array, source_R: jax.Array) -> jax.Array:
    """The row of each assignment, (n, J, D); zeros where it has none."""
    return _take(rows_RD, rows_nJ)


def _collect_backward(source_R, d_nJD):
    return _take(d_nJD.reshape(-1, d_nJD.shape[-1]), source_R), None, None


_collect.defvjp(lambda x, rows, source: (_collect(x, rows, source), source), _collect_backward)


# ------------------------------------------------------------------------------------------------------- on one device


def _serve(experts: int, ragged: bool, apply, x_nD: jax.Array, experts_nJ: jax.Array) -> jax.Array:
    """What each assignment's expert makes of its token, (n, J, D); zeros for none."""
    N, counts_E = experts_nJ.size, count(experts_nJ.reshape(-1), experts)
    if ragged:
        places = place(experts_nJ, jnp.cumsum(counts_E) - counts_E, counts_E, N)
        rows_RD = _spread(x_nD, places.rows_nJ, places.source_R)
        out_RD = apply(lambda x, w: jax.lax.ragged_dot(x, w, counts_E), rows_RD)
        return _collect(out_RD, places.rows_nJ, places.source_R)
    size = block_size(N, experts)
    blocks = (N + experts * (size - 1)) // size  # enough, however the assignments are spread
    blocks = -(-blocks // _of_platform().divide) * _of_platform().divide
    ends_E = jnp.cumsum(-(-counts_E // size))
    places = place(experts_nJ, size * (ends_E + counts_E // -size), counts_E, blocks * size)
    expert_G = jnp.minimum((ends_E <= jnp.arange(blocks)[:, None]).sum(1), experts - 1)
    rows_GRD = _spread(x_nD, places.rows_nJ, places.source_R).reshape(blocks, size, -1)
    out_GRD = apply(lambda x, w: _block_matmul(x, w, expert_G), rows_GRD)
    return _collect(out_GRD.reshape(blocks * size, -1), places.rows_nJ, places.source_R)


def block_size(assignments: int, experts: int) -> int:
    """Rows of a block, a power of two: the square root of rows of a pass * rows of an expert balances the two costs."""
    best = (_of_platform().rows_of_a_pass * assignments / experts) ** 0.5
    return max(SMALLEST_BLOCK, 1 << round(best).bit_length() - 1)


@jax.custom_vjp
def _block_matmul(x_GRD: jax.Array, w_EDF: jax.Array, expert_G: jax.Array) -> jax.Array:
    """Each block times the matrix of its expert. The backward pass gathers the matrices again rather than keep them."""
    return jnp.einsum("GRD,GDF->GRF", x_GRD, w_EDF[expert_G])


def _block_matmul_backward(residuals, d_GRF):
    x_GRD, w_EDF, expert_G = residuals
    dx_GRD = jnp.einsum("GRF,GDF->GRD", d_GRF, w_EDF[expert_G])
    if _of_platform().summed_by_matmul:
        blocks_EG = (jnp.arange(w_EDF.shape[0])[:, None] == expert_G).astype(w_EDF.dtype)
        return dx_GRD, jnp.einsum("EG,GDF->EDF", blocks_EG, jnp.einsum("GRD,GRF->GDF", x_GRD, d_GRF)), None
    dw_GDF = jnp.einsum("GRD,GRF->GDF", x_GRD, d_GRF, preferred_element_type=jnp.float32)
    dw_EDF = jax.ops.segment_sum(dw_GDF, expert_G, w_EDF.shape[0], indices_are_sorted=True)
    return dx_GRD, dw_EDF.astype(w_EDF.dtype), None


_block_matmul.defvjp(lambda x, w, expert: (_block_matmul(x, w, expert), (x, w, expert)), _block_matmul_backward)


# -------------------------------------------------------------------------------------------------------- between ranks


def _exchange(ranks: int, here: int, room: int, ragged: bool, serve, x_nD: jax.Array, experts_nJ: jax.Array):
    """`serve` of assignments to the experts of all ranks, `here` on each; at most `room` go to one rank."""
    rank_nJ = experts_nJ // here
    counts = count(rank_nJ.reshape(-1), ranks)
    if ragged:
        go, come_back = _ragged_routes(counts, ranks * room, experts_nJ.size)
        places = place(rank_nJ, jnp.cumsum(counts) - counts, counts, experts_nJ.size)
    else:
        go = come_back = lambda rows, empty: jax.lax.all_to_all(rows, "expert", 0, 0, tiled=True)
        places = place(rank_nJ, room * jnp.arange(ranks), counts, ranks * room)
    sent_RD = _spread(x_nD, places.rows_nJ, places.source_R)
    expert_R = jnp.append(experts_nJ.reshape(-1) % here, here)[places.source_R]
    arrived_RD, expert_R = go(sent_RD, 0), go(expert_R, here)
    out_RD = come_back(serve(arrived_RD, expert_R[:, None])[:, 0], 0)
    return _collect(out_RD, places.rows_nJ, places.source_R)


def _ragged_routes(counts: jax.Array, arriving: int, leaving: int):
    """Functions (rows, value of empty rows) -> rows, that send `counts` rows to each rank, and back."""
    sizes = jax.lax.all_gather(counts, "expert").astype(jnp.int32)  # [from, to]
    me = jax.lax.axis_index("expert")
    mine, theirs = sizes[me], sizes[:, me]
    starts, arrivals = jnp.cumsum(sizes, 1) - sizes, jnp.cumsum(sizes, 0) - sizes  # of each message, at both its ends

    def send(rows, empty, total, *route):
        output = jnp.full_like(rows, empty, shape=(total, *rows.shape[1:]))
        return jax.lax.ragged_all_to_all(rows, output, *route, axis_name="expert")

    go = lambda rows, empty: send(rows, empty, arriving, starts[me], mine, arrivals[me], theirs)
    come_back = lambda rows, empty: send(rows, empty, leaving, arrivals[:, me], theirs, starts[:, me], mine)
    return go, come_back
