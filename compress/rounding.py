"""From a matrix to codes: by rounding, by GPTQ, by AWQ.

All three take w_nm and, but for rounding, gram_nn: the sum over calibration tokens of x^T x of what the matrix is
multiplied with. The error that GPTQ and AWQ make small is that of the outputs of these tokens, which the gram has all
of: |x (w' - w)|^2 summed over tokens is the diagonal of (w' - w)^T gram (w' - w), an entry for each output.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from compress.fitting import fitted_grid, pick
from compress.forms import Fp8, Int4, Int8, Nf4
from compress.grids import Floats, Grid, Levels, fp8_floats, int4_grid, int8_grid, nearest, nf4_levels, output_error

DAMPING = 0.01  # of the mean of the gram's diagonal, added to it: calibration tokens are fewer than inputs may need
BLOCK = 32  # inputs after which the codes chosen are subtracted from all that are left
POWERS = 20  # of the inputs' sizes that AWQ tries
SHRINKS = tuple(1 - 0.05 * step for step in range(1, 9))  # of groups' ranges that AWQ tries beside the whole


def rounded(form: Int8 | Int4, w_nm: jax.Array, group: int) -> tuple[Grid | Levels | Floats, jax.Array]:
    """The nearest codes on the form's grid; `group` inputs share a step in int4."""
    if isinstance(form, Fp8):
        grid = fp8_floats(w_nm)
    elif isinstance(form, Int8):
        grid = int8_grid(w_nm)
    else:
        grid = nf4_levels(w_nm, group) if isinstance(form, Nf4) else int4_grid(w_nm, group)
    return grid, grid.encode(w_nm)


def shrunk_gram(gram_nn: jax.Array, tokens: float) -> jax.Array:
    """A gram of so many tokens as it is believed: what two inputs have in common is taken n / (n + tokens) smaller.

    The fewer tokens there are for n inputs, the more of it is chance, which a method would otherwise fit the codes to
    (a shrinkage as of Ledoit and Wolf 2004, with a share that is a rule of thumb here).
    """
    share = len(gram_nn) / (len(gram_nn) + tokens)
    return (1 - share) * gram_nn + share * jnp.diag(jnp.diagonal(gram_nn))


# ---------------------------------------------------------------------------------------------------------------- GPTQ


def gptq(w_nm: jax.Array, gram_nn: jax.Array, grid: Grid) -> jax.Array:
    """Codes int32 (n, m), an input after the other; what rounding it did to the outputs, those that follow make good.

    Frantar et al., arXiv 2210.17323, algorithm 1, with the inputs in the order of their size (their `act-order`) and
    with steps and zeros fixed beforehand. An output for which plain rounding is better keeps that, so that none is
    worse. Sums over other meshes differ in their last bits, and then a code here or there, too.
    """
    factor_nn, order_n = _factor(gram_nn)
    step_nm, zero_nm = grid.rows(len(w_nm))
    low, high = grid.low, grid.high
    padding = -len(w_nm) % BLOCK
    pad = lambda x, value=0.0: jnp.pad(x, ((0, padding), (0, 0)), constant_values=value)
    step_nm, zero_nm = pad(step_nm[order_n], 1.0), pad(zero_nm[order_n])
    factor_nn = jnp.pad(factor_nn, ((0, padding), (0, padding))) + jnp.diag(jnp.arange(len(step_nm)) >= len(w_nm))

    def one_input(block, i, carry):
        rest_bm, change_bm, codes_bm = carry
        step_bm, zero_bm, inside_bb = block
        code_m = nearest(rest_bm[i], step_bm[i], zero_bm[i], low, high)
        change_m = (rest_bm[i] - (code_m - zero_bm[i]) * step_bm[i]) / inside_bb[i, i]
        after_b = inside_bb[i] * (jnp.arange(BLOCK) > i)
        return rest_bm - after_b[:, None] * change_m, change_bm.at[i].set(change_m), codes_bm.at[i].set(code_m)

    def one_block(number, carry):
        rest_nm, codes_nm = carry
        start = number * BLOCK
        rows = lambda x: jax.lax.dynamic_slice_in_dim(x, start, BLOCK)
        rows_bn = rows(factor_nn)
        block = rows(step_nm), rows(zero_nm), jax.lax.dynamic_slice_in_dim(rows_bn, start, BLOCK, axis=1)
        begin = rows(rest_nm), jnp.zeros_like(block[0]), jnp.zeros_like(block[0])
        _, change_bm, codes_bm = jax.lax.fori_loop(0, BLOCK, partial(one_input, block), begin)
        codes_nm = jax.lax.dynamic_update_slice_in_dim(codes_nm, codes_bm, start, axis=0)
        return rest_nm - rows_bn.T @ change_bm, codes_nm  # what stands before is wrong now, and not read again

    begin = pad(w_nm[order_n]), jnp.zeros_like(step_nm)
    _, codes_nm = jax.lax.fori_loop(0, len(step_nm) // BLOCK, one_block, begin)
    codes_nm = codes_nm[: len(w_nm)][jnp.argsort(order_n)].astype(jnp.int32)
    return _better(w_nm, gram_nn, grid, codes_nm, grid.encode(w_nm))


def _factor(gram_nn: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Upper U with U^T U the inverse of the damped gram, its inputs in `order_n`, the largest first."""
    size_n = jnp.diagonal(gram_nn)
    mean = jnp.maximum(jnp.mean(size_n), jnp.finfo(jnp.float32).tiny)
    order_n = jnp.argsort(-size_n)
    damped_nn = (gram_nn / mean)[order_n][:, order_n] + DAMPING * jnp.eye(len(gram_nn))
    # G = R R^T with upper R, which is a Cholesky factor read backwards; then the inverse is R^-T R^-1
    lower_nn = jnp.linalg.cholesky(damped_nn[::-1, ::-1])
    return solve_triangular(lower_nn[::-1, ::-1], jnp.eye(len(gram_nn)), lower=False), order_n


def _better(w_nm, gram_nn, grid: Grid, ours_nm: jax.Array, theirs_nm: jax.Array) -> jax.Array:
    """For each output the codes with the smaller error; theirs where ours are no numbers."""
    error = lambda q_nm: output_error(grid.decode(q_nm) - w_nm, gram_nn)
    return jnp.where(error(ours_nm) <= error(theirs_nm), ours_nm, theirs_nm)


def fitted_gptq(w_nm: jax.Array, gram_nn: jax.Array, group: int) -> tuple[Grid, jax.Array]:
    """A fitted grid and codes by GPTQ. An output for which rounding to its whole range is better has that."""
    grid, plain = fitted_grid(w_nm, gram_nn, group), int4_grid(w_nm, group)
    ours_nm, theirs_nm = gptq(w_nm, gram_nn, grid), plain.encode(w_nm)
    error = lambda grid, q_nm: output_error(grid.decode(q_nm) - w_nm, gram_nn)
    ours_m = error(grid, ours_nm) <= error(plain, theirs_nm)
    return pick(ours_m, grid, plain), jnp.where(ours_m, ours_nm, theirs_nm)


# ----------------------------------------------------------------------------------------------------------------- AWQ


def awq(w_nm: jax.Array, gram_nn: jax.Array, group: int) -> tuple[Grid, jax.Array, jax.Array]:
    """A grid, codes, and the factor of each input that they want: large inputs are rounded finer, small ones coarser.

    Lin et al., arXiv 2306.00978, sections 3.2 and A: weights are multiplied with a power of the size of their input,
    which is divided by it, and ranges of groups are shrunk where that makes the outputs' error smaller. Of inputs the
    root of the mean square is taken, and here every matrix has factors of its own.
    """
    size_n = jnp.sqrt(jnp.maximum(jnp.diagonal(gram_nn), 0))
    size_n = jnp.maximum(size_n, 1e-4 * jnp.max(size_n) + jnp.finfo(jnp.float32).tiny)

    def factors(power):
        larger_n = size_n**power
        larger_n = larger_n / jnp.sqrt(jnp.max(larger_n) * jnp.min(larger_n))
        return (1 / larger_n).astype(jnp.bfloat16).astype(jnp.float32)  # as it is kept

    def error(power):
        factor_n1 = factors(power)[:, None]
        grid = int4_grid(w_nm / factor_n1, group)
        return jnp.sum(output_error(grid.decode(grid.encode(w_nm / factor_n1)) * factor_n1 - w_nm, gram_nn))

    powers = jnp.arange(POWERS) / POWERS
    factor_n = factors(powers[jnp.argmin(jax.lax.map(error, powers))])
    scaled_nm, scaled_nn = w_nm / factor_n[:, None], gram_nn * factor_n[:, None] * factor_n
    grid = _shrunk(scaled_nm, scaled_nn, group)
    return grid, grid.encode(scaled_nm), factor_n


def _shrunk(w_nm: jax.Array, gram_nn: jax.Array, group: int) -> Grid:
    """The grid with the best of SHRINKS for each group, where all of an output's together are better than none."""
    n, m = w_nm.shape
    G = n // group
    inside_Ggg = jnp.moveaxis(jnp.diagonal(gram_nn.reshape(G, group, G, group), axis1=0, axis2=2), -1, 0)

    def change(shrink_Gm):
        grid = int4_grid(w_nm, group, shrink_Gm)
        return grid.decode(grid.encode(w_nm)) - w_nm

    def errors(shrink):
        change_Ggm = change(jnp.full((G, m), shrink)).reshape(G, group, m)
        return jnp.sum(change_Ggm * jnp.einsum("Ggh,Ghm->Ggm", inside_Ggg, change_Ggm), axis=1)

    tried = jnp.asarray((1.0, *SHRINKS), jnp.float32)
    best_Gm = tried[jnp.argmin(jax.lax.map(errors, tried), axis=0)]
    is_better_m = output_error(change(best_Gm), gram_nn) < output_error(change(jnp.ones((G, m))), gram_nn)
    return int4_grid(w_nm, group, jnp.where(is_better_m, best_Gm, 1.0))


METHODS = ("round", "gptq", "awq")


def chosen(form: Int8 | Int4, method: str, w_nm, gram_nn, group: int) -> tuple[Grid, jax.Array, jax.Array | None]:
    """The grid, the codes int32 (n, m), and the factor of each input that they want (n,), if any."""
    if method == "awq" and isinstance(form, Int4):
        return awq(w_nm, gram_nn, group)
    if method == "gptq" and type(form) is Int4:
        return *fitted_gptq(w_nm, gram_nn, group), None
    grid, q_nm = rounded(form, w_nm, group)
    return grid, gptq(w_nm, gram_nn, grid) if method == "gptq" else q_nm, None
