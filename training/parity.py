"""Proves that a mesh changes nothing: python -m training.parity [key=value ...].

Trains a few steps on the mesh that is asked for and on one device, from the same seed and the same random tokens, and
prints the largest relative errors of the losses, of every gradient and of every updated parameter. Exit code 0 if they
are within the tolerances, 1 if not, 2 for a mistake. Parameters have a wide tolerance, since an optimizer that divides
by a gradient's size follows rounding noise where the gradient is close to zero.
"""

import sys

from config.command_line import command_line
from config.layout import mesh_sizes
from config.schema import Config
from runtime import leave

if __name__ == "__main__":
    leave.answer_signals()
    JOBS = command_line(sys.argv[1:])

from dataclasses import dataclass, replace

import jax
import numpy as np

from finetune.adapters.adaptation import adapted
from parallel.mesh import AXES, make_mesh
from parallel.sharding import local_rows, put_batch, replicated
from runtime.start import start
from training.job import make_job

STEPS = 3
LOSS_TOLERANCE = 1e-5  # relative
GRADIENT_TOLERANCE = 2e-5  # of each gradient's norm
PARAMETER_TOLERANCE = 1e-3  # of each updated parameter's norm
ONE_DEVICE = dict.fromkeys(AXES, 1)


@dataclass(frozen=True)
class Trace:
    """What a short run computed, as host arrays by dotted name."""

    start: dict[str, np.ndarray]  # parameters before the first step
    gradients: dict[str, np.ndarray]  # of the first step, before clipping
    end: dict[str, np.ndarray]  # parameters after the last step
    losses: list[float]


def trace(config: Config, sizes: dict[str, int], steps: int = STEPS) -> Trace:
    """Trains `steps` steps on random tokens over the first devices that the mesh needs."""
    t, needed = config.train, int(np.prod(list(sizes.values())))
    # of several processes, each runs the comparison with one device by itself
    mesh = make_mesh(sizes, jax.local_devices()[:needed] if needed < jax.device_count() else None)
    with jax.set_mesh(mesh):
        job = make_job(config, mesh, **adapted(config))
        batches = [
            put_batch(mesh, random_batch(config, i, local_rows(mesh, t.batch_size)), t.batch_size) for i in range(steps)
        ]
        step, state = job.compile(job.step_and_gradients, batches[0]), job.init(config.seed)
        in_order = lambda params: named(job.to_stored(params))
        begin, first, losses = in_order(state.params), None, []
        for batch in batches:
            state, metrics, grads = step(state, batch)
            first = in_order(grads) if first is None else first
            losses.append(float(metrics["train/loss"]))
        return Trace(begin, first, in_order(state.params), losses)


def random_batch(config: Config, step: int, rows: slice) -> dict[str, np.ndarray]:
    """The wanted rows of a step's batch (B, T) of random tokens, the same for every mesh.

    A tenth of the targets does not count; documents have random lengths if data.segments is set.
    """
    shape = config.train.batch_size, config.train.seq_len
    random = np.random.default_rng((config.seed, step))
    tokens = random.integers(0, config.model.vocab_size, (shape[0], shape[1] + 1), dtype=np.int32)
    batch = {"tokens_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:]}
    batch["mask_BT"] = (random.random(shape) < 0.9).astype(np.float32)
    if config.data.segments:
        begins = random.random(shape) < 4 / shape[1]
        batch["segments_BT"] = np.cumsum(begins, axis=1, dtype=np.int32)
        at_T = np.arange(shape[1], dtype=np.int32)
        batch["places_BT"] = at_T - np.maximum.accumulate(np.where(begins, at_T, 0), axis=1)
    return {name: value[rows] for name, value in batch.items()}


def named(tree) -> dict[str, np.ndarray]:
    """The leaves of a nested dict of (sharded) arrays on the host, whole, by dotted name."""
    mesh = jax.tree.leaves(tree)[0].sharding.mesh
    whole = jax.jit(lambda t: t, out_shardings=replicated(mesh))(tree)
    return {
        ".".join(key.key for key in path): np.asarray(leaf.addressable_data(0))
        for path, leaf in jax.tree_util.tree_leaves_with_path(whole)
    }


def relative_errors(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
    """|ours - theirs| / |theirs| of each array, in the 2-norm; padding that one of them has is left out."""
    errors = {}
    for name, b in theirs.items():
        a = ours[name]
        rows = min(a.shape[0], b.shape[0])
        a, b = a[:rows].astype(np.float64), b[:rows].astype(np.float64)
        errors[name] = float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))
    return errors


def report(mesh: Trace, one: Trace) -> tuple[list[str], bool]:
    """Lines for a reader, the worst of each kind named, and whether all are within the tolerances."""
    losses = [abs(a - b) / abs(b) for a, b in zip(mesh.losses, one.losses, strict=True)]
    grads, ends = relative_errors(mesh.gradients, one.gradients), relative_errors(mesh.end, one.end)
    bitwise = all(
        np.array_equal(mesh.start[name][: len(p)], p[: len(mesh.start[name])]) for name, p in one.start.items()
    )
    worst_gradient, worst_parameter = max(grads, key=grads.get), max(ends, key=ends.get)
    good = bitwise and max(losses) <= LOSS_TOLERANCE and grads[worst_gradient] <= GRADIENT_TOLERANCE
    good = good and ends[worst_parameter] <= PARAMETER_TOLERANCE
    lines = [
        f"initial parameters  {'bitwise equal' if bitwise else 'DIFFERENT'}",
        f"loss                {max(losses):.1e} (step {int(np.argmax(losses)) + 1} of {len(losses)}; "
        f"tolerance {LOSS_TOLERANCE:.0e})",
        f"gradient            {grads[worst_gradient]:.1e} ({worst_gradient}; tolerance {GRADIENT_TOLERANCE:.0e})",
        f"updated parameter   {ends[worst_parameter]:.1e} ({worst_parameter}; tolerance {PARAMETER_TOLERANCE:.0e})",
    ]
    return lines, good


def main(config: Config) -> int:
    """Compares the asked mesh with one device; returns the exit code."""
    try:
        config = replace(config, train=replace(config.train, compute_dtype="float32", param_dtype="float32"))
        start(config.runtime)
        sizes = mesh_sizes(config, jax.device_count())
        if sizes == ONE_DEVICE:
            raise ValueError("one device: nothing to compare; set a mesh, as runtime.cpu_devices=8 mesh.fsdp=8")
        lines, good = report(trace(config, sizes), trace(config, ONE_DEVICE))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if jax.process_index() == 0:
        print("\n".join([f"mesh {' '.join(f'{a}={n}' for a, n in sizes.items() if n > 1) or 'one device'}", *lines]))
        print("the mesh changes nothing" if good else "the mesh changes the results")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(max(map(main, JOBS)))
