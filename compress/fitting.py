"""Grids of int4 that are fitted to a matrix, instead of reaching from its smallest weight to its largest.

w_nm has n inputs and m outputs; gram_nn is the sum over calibration tokens of x^T x. A group of inputs of an output has
a step s and an offset t, its zero times the step, and a code q there stands for s q - t. For given codes the error of
the outputs is a quadratic function of all s and t, so that the best of them solve linear equations.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from compress.grids import ZERO_PARTS, Grid, grid_of, int4_grid, output_error

SHRINKS = (1.0, 0.9, 0.8)  # of groups' ranges, from which the fit begins
ROUNDS = 3  # of nearest codes and the grid that fits these
RIDGE = 1e-3  # of the diagonal, added to it: groups may hold what is nearly the same for the tokens seen
SINGULAR = 1e-6  # a determinant over its largest part, below which a group has one code, and its grid stays


def fitted_grid(w_nm: jax.Array, gram_nn: jax.Array, group: int) -> Grid:
    """The grid on which the nearest codes are near, each weight counted by its input's sum of squares.

    Codes and grid by turns, from ranges shrunk by each of SHRINKS; of all that were seen, the best for each group.
    """
    size_n = jnp.diagonal(gram_nn)
    size_n = size_n + 1e-4 * jnp.mean(size_n) + jnp.finfo(jnp.float32).tiny
    size_Gg1, w_Ggm = size_n.reshape(-1, group, 1), w_nm.reshape(-1, group, w_nm.shape[1])
    added = lambda x_Ggm: jnp.sum(size_Gg1 * x_Ggm, axis=1)

    def one_round(grid: Grid) -> tuple[tuple[jax.Array, Grid], Grid]:
        q_nm = grid.encode(w_nm)
        error_Gm = added(jnp.square(grid.decode(q_nm) - w_nm).reshape(w_Ggm.shape))
        q_Ggm = q_nm.reshape(w_Ggm.shape).astype(jnp.float32)
        all_Gm, q_Gm, qq_Gm = added(jnp.ones_like(q_Ggm)), added(q_Ggm), added(q_Ggm * q_Ggm)
        w_Gm, qw_Gm = added(w_Ggm), added(q_Ggm * w_Ggm)
        determinant_Gm = all_Gm * qq_Gm - q_Gm * q_Gm
        step_Gm = (all_Gm * qw_Gm - q_Gm * w_Gm) / jnp.maximum(determinant_Gm, jnp.finfo(jnp.float32).tiny)
        fits_Gm = (determinant_Gm > SINGULAR * all_Gm * qq_Gm) & (step_Gm > 0)
        better = grid_of(step_Gm, (step_Gm * q_Gm - w_Gm) / all_Gm)
        return (error_Gm, grid), pick(fits_Gm, better, grid)

    def from_range(shrink):
        grid = int4_grid(w_nm, group, shrink)
        _, (errors, grids) = jax.lax.scan(lambda grid, _: one_round(grid)[::-1], grid, length=ROUNDS + 1)
        return errors, grids

    errors, grids = jax.lax.map(from_range, jnp.asarray(SHRINKS, jnp.float32))
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    best_Gm = jnp.argmin(flat(errors), axis=0)
    of_best = lambda x: jnp.take_along_axis(flat(x), best_Gm[None], axis=0)[0]
    return Grid(of_best(grids.step_Gm), of_best(grids.zero_Gm))


def refitted_grid(w_nm: jax.Array, gram_nn: jax.Array, grid: Grid, q_nm: jax.Array) -> Grid:
    """The grid on which these codes make the outputs' error smallest; an output for which it is no better keeps its."""
    G, m = grid.step_Gm.shape
    gram_GgHg = gram_nn.reshape(G, -1, G, len(w_nm) // G)
    q_Ggm = q_nm.reshape(G, -1, m).astype(jnp.float32)
    gram_GgH = jnp.sum(gram_GgHg, axis=3)
    qq_mGH = jnp.einsum("Ggm,GgHm->mGH", q_Ggm, jnp.einsum("GgHh,Hhm->GgHm", gram_GgHg, q_Ggm))
    q1_mGH = jnp.einsum("Ggm,GgH->mGH", q_Ggm, gram_GgH)
    ones_mGH = jnp.broadcast_to(jnp.sum(gram_GgH, axis=1), (m, G, G))
    both = jnp.block([[qq_mGH, -q1_mGH], [-jnp.swapaxes(q1_mGH, 1, 2), ones_mGH]])
    # what changes of s and t are wanted, by the error that is left
    left_Ggm = (gram_nn @ (w_nm - grid.decode(q_nm))).reshape(G, -1, m)
    wanted_m2G = jnp.concatenate([jnp.sum(q_Ggm * left_Ggm, axis=1), -jnp.sum(left_Ggm, axis=1)]).T
    diagonal = jnp.diagonal(both, axis1=1, axis2=2)
    damped = both + RIDGE * jnp.eye(2 * G) * (diagonal + 1e-6 * jnp.mean(diagonal, axis=1, keepdims=True))[:, :, None]
    change_2Gm = jnp.linalg.solve(damped, wanted_m2G[:, :, None])[:, :, 0].T
    step_Gm = grid.step_Gm.astype(jnp.float32)
    offset_Gm = step_Gm * grid.zero_Gm.astype(jnp.float32) / ZERO_PARTS + change_2Gm[G:]
    found = pick(step_Gm + change_2Gm[:G] > 0, grid_of(step_Gm + change_2Gm[:G], offset_Gm), grid)
    error = lambda grid: output_error(grid.decode(q_nm) - w_nm, gram_nn)
    return pick(error(found) < error(grid), found, grid)


def pick(where: jax.Array, ours: Grid, theirs: Grid) -> Grid:
    """Ours where the condition holds, of groups (G, m) or of outputs (m,)."""
    kept = lambda ours, theirs: jnp.where(where, ours, theirs)
    return replace(theirs, step_Gm=kept(ours.step_Gm, theirs.step_Gm), zero_Gm=kept(ours.zero_Gm, theirs.zero_Gm))
