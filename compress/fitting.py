"""Grids of int4 that are fitted to a matrix, instead of reaching from its smallest weight to its largest.

w_nm has n inputs and m outputs; gram_nn is the sum over calibration tokens of x^T x. A group of inputs of an output has
a step s and an offset t, its zero times the step, and a code q there stands for s q - t. For given codes the squared
distance to the weights is a quadratic function of s and t, which has its smallest value in closed form.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from compress.grids import Grid, grid_of, int4_grid

SHRINKS = (1.0, 0.9, 0.8)  # of groups' ranges, from which the fit begins
ROUNDS = 3  # of nearest codes and the grid that fits these
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


def pick(where: jax.Array, ours: Grid, theirs: Grid) -> Grid:
    """Ours where the condition holds, of groups (G, m) or of outputs (m,)."""
    kept = lambda ours, theirs: jnp.where(where, ours, theirs)
    return replace(theirs, step_Gm=kept(ours.step_Gm, theirs.step_Gm), zero_Gm=kept(ours.zero_Gm, theirs.zero_Gm))
