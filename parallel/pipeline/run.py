"""One interpreter for every pipeline schedule: rows of operations run as one SPMD program over the `pipe` axis.

A stage is a device along `pipe`; a tick is a step of the schedule; a slot is a place in a pool (parallel/pipeline/
buffers.py) where a value waits. All stages scan over the ticks. In a tick

    1. all stages embed a microbatch together, if one begins;
    2. each stage reads its x (the embedding, or a message slot) and does its own operation: forward (x to y, keeping
       what gradients need), backward (dy to dx), weight (weight gradients from what was kept and held), or nothing;
    3. all stages take the loss of a microbatch together, if one has come out of the last stage, and its gradient
       becomes the message that the last stage's backward will read; likewise the embedding's gradient at the other end;
    4. what an operation made travels to the neighbour's message slot, by a permutation of just the pairs of this tick.

Embedding and loss belong to no stage: the vocabulary's rows are split over all of them, which work on each microbatch
together, so that no stage carries more than the others.

The program is manual over `pipe` and `data` and automatic over the other axes. Inside an operation, stages take
different branches, so collectives there must have replica groups; a permutation of another axis would wait for stages
that never come.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from parallel.manual import vary
from parallel.pipeline.buffers import AT_MOST_ONCE, OPS, Buffers, allocate
from parallel.pipeline.phases import Phases, phases
from parallel.pipeline.schedules import BACKWARD, FORWARD, WEIGHT, PipelineSchedule

MANUAL = ("pipe", "data")  # over data too, so that gradients of microbatches add up before they are reduced, once


@dataclass(frozen=True)
class Program:
    """The functions that a pipeline runs, of one microbatch. Shapes are those of one data shard.

    `micro` holds the microbatch's arrays, `shared` the parameters outside the layers that have gradients and `fixed`
    those that have none, of which the specs say what is split over `pipe`; `embed` and `loss` run on all stages at once
    and may reduce over `pipe`.
    """

    prepare: Callable[[Any], Any]  # micro -> info: what every layer needs to know besides x
    embed: Callable[[Any, Any, Any], jax.Array]  # (shared, fixed, micro) -> x
    layer: Callable[[Any, Any, jax.Array], tuple]  # (params, (meta, info), x) -> (x, objective or None, aux or None)
    loss: Callable[[Any, Any, jax.Array, Any], tuple]  # (shared, fixed, x, micro) -> (objective, sums)
    shared_specs: Any  # PartitionSpecs, a prefix of the pytree of shared parameters
    fixed_specs: Any = None  # the same of the fixed ones
    unroll: bool = False  # the layers of a stage, instead of a scan
    in_turn: bool = False  # these compute their gradients one after the other, see model.in_turn


def slots(layers: int, schedule: PipelineSchedule) -> tuple[int, ...]:
    """The layer in each row of the stacked parameters, stage by stage; -1 marks rows that hold none.

    The first `layers % parts` virtual stages have a layer more than the others. Raises ValueError when there are fewer
    layers than virtual stages.
    """
    parts = len(schedule.placement)
    if layers < parts:
        raise ValueError(
            f"model.layers={layers} is less than {schedule.stages} stages * {schedule.chunks} chunks = {parts} virtual "
            f"stages; use at most {layers} of them, or more layers"
        )
    base, more = divmod(layers, parts)
    rows = base + (more > 0)
    layer_of = np.full((schedule.stages, schedule.chunks, rows), -1)
    first = 0
    for v, (stage, chunk) in enumerate(schedule.placement):
        count = base + (v < more)
        layer_of[stage, chunk, :count] = np.arange(first, first + count)
        first += count
    return tuple(int(layer) for layer in layer_of.flat)


def _at(tree, *index):
    """The entries of stacked arrays at `index`, one of each leading dim."""

    def one(a):
        starts = [jnp.asarray(i, jnp.int32) for i in index] + [jnp.int32(0)] * (a.ndim - len(index))
        return jax.lax.dynamic_slice(a, starts, (*[1] * len(index), *a.shape[len(index) :])).reshape(
            a.shape[len(index) :]
        )

    return jax.tree.map(one, tree)


def _put(tree, value, *index):
    """Stacked arrays with the entries at `index` replaced, in place."""

    def one(a, v):
        starts = [jnp.asarray(i, jnp.int32) for i in index] + [jnp.int32(0)] * v.ndim
        return jax.lax.dynamic_update_slice(a, v.astype(a.dtype).reshape(*[1] * len(index), *v.shape), starts)

    return jax.tree.map(one, tree, value)


def _add(total, value, *index):
    """Stacked totals with `value` added to the entries at `index`."""
    return _put(total, jax.tree.map(lambda t, v: t + v.astype(t.dtype), _at(total, *index), value), *index)


def _pool(like, *count: int):
    """Zeros for `count` entries like this."""
    return vary(jax.tree.map(lambda a: jnp.zeros((*count, *a.shape), a.dtype), like), MANUAL)


def _when(condition, function: Callable, carry, name: str):
    """`function(carry)` if the condition holds, else `carry`, in place.

    A loop of at most one turn: the compiler copies what passes through a conditional, but not what a loop carries.
    """
    turn = lambda state: (jnp.zeros_like(state[0]), function(state[1]))
    with jax.named_scope(f"{AT_MOST_ONCE}.{name}"):
        return jax.lax.while_loop(lambda state: state[0], turn, (condition, carry))[1]


def _on(stage: int, x: jax.Array) -> jax.Array:
    """x of one stage, on all stages."""
    return jax.lax.psum(jnp.where(jax.lax.axis_index("pipe") == stage, x, jnp.zeros_like(x)), "pipe")


class _Layers:
    """The layers of a stage, chunk by chunk, and what they do in each operation of the schedule.

    `pools` hold what operations leave to each other, by slot and layer: "aux" and "gradients" (by chunk and layer), and
    what is kept and held (see parallel.pipeline.phases).
    """

    def __init__(self, program: Program, layers, meta, info, x: jax.Array, padded: bool):
        self.program, self.layers, self.meta, self.padded = program, layers, meta, padded
        self.rows = meta["layer"].shape[1]
        self.first = jax.tree.map(lambda a: a[0, 0], (layers, meta))
        self.phases: Phases = phases(program.layer, self.first[0], (self.first[1], info), x)
        self.info, self.x = info, x

    def pools(self, chunks: int, b: Buffers, *, trained: bool, split: bool) -> dict:
        """Empty pools."""
        params, constants = self.first[0], (self.first[1], self.info)

        def shapes():
            _, _, aux, kept_input, kept_weight = self.phases.forward(params, constants, self.x)
            _, held = self.phases.backward(params, constants, kept_input, kept_weight, self.x)
            return aux, kept_input, kept_weight, held

        aux, kept_input, kept_weight, held = jax.eval_shape(shapes)
        pools = {"aux": _pool(aux, chunks, self.rows)}
        if trained:
            pools["kept_input"] = _pool(kept_input, b.kept_input, self.rows)
            pools["kept_weight"] = _pool(kept_weight, b.kept_weight, self.rows)
            pools["gradients"] = vary(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), self.layers), MANUAL)
        if split:
            pools["held"] = _pool(held, b.held, self.rows)
        return pools

    def _each(self, work: Callable, chunk, x, pools, *, reverse: bool = False):
        """`work(x, pools, i, params, meta) -> (x, pools)` for each layer i of a chunk."""

        def row(carry, i):
            params, meta = _at(self.layers, chunk, i), _at(self.meta, chunk, i)
            run = lambda carry: vary(work(*carry, i, params, meta), MANUAL)
            return (_when(meta["layer"] >= 0, run, carry, "layer") if self.padded else run(carry)), None

        unroll = self.rows if self.program.unroll else 1
        return jax.lax.scan(row, (x, pools), jnp.arange(self.rows), reverse=reverse, unroll=unroll)[0]

    def evaluate(self, row, info, x, pools):
        """Forward, and nothing is kept."""

        def work(x, pools, i, params, meta):
            y, _, aux = self.program.layer(params, (meta, info), x)
            return y, pools | {"aux": _add(pools["aux"], aux, row.chunk, i)}

        return self._each(work, row.chunk, x, pools)

    def forward(self, row, info, x, pools):
        """x to y."""

        def work(x, pools, i, params, meta):
            y, _, aux, kept_input, kept_weight = self.phases.forward(params, (meta, info), x)
            return y, pools | {
                "aux": _add(pools["aux"], aux, row.chunk, i),
                "kept_input": _put(pools["kept_input"], kept_input, row.kept_input, i),
                "kept_weight": _put(pools["kept_weight"], kept_weight, row.kept_weight, i),
            }

        return self._each(work, row.chunk, x, pools)

    def backward(self, row, info, dy, pools):
        """dy to dx; the weight gradients are left to `weight` where pools have a place for it, else added at once."""

        def work(dy, pools, i, params, meta):
            kept_weight = _at(pools["kept_weight"], row.kept_weight, i)
            kept_input = _at(pools["kept_input"], row.kept_input, i)
            dx, held = self.phases.backward(params, (meta, info), kept_input, kept_weight, dy)
            if "held" in pools:
                return dx, pools | {"held": _put(pools["held"], held, row.held, i)}
            dparams = self.phases.weight(params, (meta, info), kept_weight, held)
            if self.program.in_turn:
                dx = dx + pools["turn"].astype(dx.dtype)
                dparams, turn = jax.lax.optimization_barrier((dparams, nothing))
                pools = pools | {"turn": turn}
            return dx, pools | {"gradients": _add(pools["gradients"], dparams, row.chunk, i)}

        # a zero comes with the gradients of a layer, and the next dx needs it
        nothing = vary(jnp.zeros((), jnp.float32), MANUAL)
        dx, pools = self._each(work, row.chunk, dy, pools | {"turn": nothing}, reverse=True)
        return dx, {name: pool for name, pool in pools.items() if name != "turn"}

    def weight(self, row, info, out, pools):
        """Adds the weight gradients; `out` passes through."""

        def work(out, pools, i, params, meta):
            kept, held = _at(pools["kept_weight"], row.kept_weight, i), _at(pools["held"], row.held, i)
            dparams = self.phases.weight(params, (meta, info), kept, held)
            return out, pools | {"gradients": _add(pools["gradients"], dparams, row.chunk, i)}

        return self._each(work, row.chunk, out, pools)


def run(program: Program, schedule: PipelineSchedule, layers, meta, shared, fixed, micros, *, padded: bool = False):
    """Runs the schedule over microbatches; under jit, with a mesh of `schedule.stages` stages in context.

    `layers` and `meta` (what has no gradient; with an int32 "layer", -1 where there is none) are stacked in the order
    of `slots`; leaves of `micros` are (microbatches, B, ...), or (microbatches, 1, ...) where all sequences share them.
    Returns sums, aux (by layer), and, if the schedule has backward operations, the gradients of layers and shared,
    float32.
    """
    buffers = allocate(schedule)
    data = jax.sharding.get_abstract_mesh().shape["data"]
    trained = bool((buffers.ticks.embed_gradient >= 0).any())
    rows = lambda a: P(None, "data") if a.shape[1] > 1 or data == 1 else P()
    in_specs = (P("pipe"), P("pipe"), program.shared_specs, program.fixed_specs, jax.tree.map(rows, micros))
    out_specs = (P(), P("pipe"), *((P("pipe"), program.shared_specs) if trained else ()))
    body = partial(_stage, program, schedule, buffers, padded, trained)
    return jax.shard_map(body, in_specs=in_specs, out_specs=out_specs, axis_names=set(MANUAL))(
        layers, meta, shared, fixed, micros
    )


def _stage(program: Program, schedule: PipelineSchedule, b: Buffers, padded: bool, trained: bool, *arguments):
    """What one stage does; the arguments are its own parts of those of `run`."""
    layers, meta, shared, fixed, micros = arguments
    stacked = lambda a: a.reshape(schedule.chunks, a.shape[0] // schedule.chunks, *a.shape[1:])
    layers, meta = jax.tree.map(stacked, vary((layers, meta), MANUAL))
    # what is the same on all stages stays so; over data the gradients shall differ until the end
    shared, fixed, micros = vary((shared, fixed, micros), ("data",))
    together = _Together(program, schedule, shared, fixed, micros, trained)
    info_of = lambda microbatch: vary(program.prepare(_at(micros, microbatch)), MANUAL)
    nothing = together.nothing
    stage_layers = _Layers(program, layers, meta, info_of(0), nothing, padded)
    operations = {FORWARD: stage_layers.forward if trained else stage_layers.evaluate}
    operations |= {BACKWARD: stage_layers.backward} if trained else {}
    operations |= {WEIGHT: stage_layers.weight} if schedule.split else {}

    def send(pattern):
        def exchange(out):
            arrived = [jax.lax.ppermute(out, "pipe", pairs) for pairs in pattern]
            return arrived + [nothing] * (b.stages.received.shape[-1] - len(arrived))

        return exchange

    stage = jax.lax.axis_index("pipe")

    def tick(carry, now):
        rows, all_stages = now
        row = _at(rows, stage)
        messages, pools, sums, gradients, out = carry
        x = jnp.where(row.first, together.embed(all_stages.embed), _at(messages, row.source))
        for kind, operation in operations.items():
            work = lambda c, o=operation: vary(o(row, info_of(row.microbatch), x, c[1]), MANUAL)
            out, pools = _when(row.op == OPS[kind], work, (out, pools), kind)
        messages = _put(messages, out, row.deposit)
        sums, gradients, dx = together.loss(all_stages.loss, out, sums, gradients)
        if trained:
            messages = _put(messages, dx, row.loss_deposit)
            gradients = together.embed_gradient(all_stages.embed_gradient, out, gradients)
        with jax.named_scope("send"):
            arrived = jax.lax.switch(all_stages.pattern, [send(pattern) for pattern in b.patterns], out)
        for i, message in enumerate(arrived):
            messages = _put(messages, message, row.received[i])
        return (messages, pools, sums, gradients, out), None

    pools = stage_layers.pools(schedule.chunks, b, trained=trained, split=schedule.split)
    carry = (_pool(nothing, b.messages), pools, together.sums, together.gradients, nothing)
    (_, pools, sums, gradients, _), _ = jax.lax.scan(tick, carry, jax.tree.map(jnp.asarray, (b.stages, b.ticks)))

    over_data = lambda tree: jax.tree.map(lambda a: jax.lax.psum(a, "data"), tree)
    flat = lambda tree: jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), over_data(tree))
    out = over_data(sums), flat(pools["aux"])
    return (*out, flat(pools["gradients"]), over_data(gradients)) if trained else out


class _Together:
    """What all stages do at once for a microbatch: embedding and loss, with the gradients of the shared parameters."""

    def __init__(self, program: Program, schedule: PipelineSchedule, shared, fixed, micros, trained: bool):
        self.shared, self.trained = shared, trained
        self.first, self.last = schedule.placement[0][0], schedule.placement[-1][0]
        self._embed = lambda shared, m: program.embed(shared, fixed, _at(micros, m))
        self._loss = lambda shared, x, m: program.loss(shared, fixed, x, _at(micros, m))
        x = jax.eval_shape(self._embed, shared, 0)
        self.nothing = vary(jnp.zeros(x.shape, x.dtype), MANUAL)
        sums = jax.eval_shape(self._loss, shared, self.nothing, 0)[1]
        self.sums = vary(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums), ("data",))
        self.gradients = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), shared) if trained else None

    def embed(self, m) -> jax.Array:
        """x of microbatch m on all stages; zeros for m = -1, as below."""
        return jax.lax.cond(m >= 0, lambda: vary(self._embed(self.shared, m), MANUAL), lambda: self.nothing)

    def loss(self, m, y, sums, gradients):
        """Adds the loss of what came out of the last virtual stage; returns its gradient too."""

        def compute(carry):
            sums, gradients, _ = carry
            x = _on(self.last, y)
            if not self.trained:
                return jax.tree.map(jnp.add, sums, self._loss(self.shared, x, m)[1]), gradients, self.nothing
            gradient = jax.value_and_grad(self._loss, argnums=(0, 1), has_aux=True)
            (_, new), (dshared, dx) = gradient(self.shared, x, m)
            return jax.tree.map(jnp.add, sums, new), jax.tree.map(jnp.add, gradients, dshared), vary(dx, MANUAL)

        return _when(m >= 0, compute, (sums, gradients, self.nothing), "loss")

    def embed_gradient(self, m, dx, gradients):
        """Adds the gradient of the embedding's parameters that follows from the first virtual stage's dx."""

        def compute(gradients):
            pull = jax.vjp(lambda shared: self._embed(shared, m), self.shared)[1]
            (dshared,) = pull(_on(self.first, dx))
            return jax.tree.map(jnp.add, gradients, dshared)

        return _when(m >= 0, compute, gradients, "embed_gradient")
