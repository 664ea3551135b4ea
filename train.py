"""Trains a transformer: python train.py [key=value ...]. Keys: python train.py --help. Exit codes: README.

One loop, in the order in which things happen: mesh, run directory, data, model, restore, compile, loop, end.
"""

import sys
import time

from runtime import heap, launch, leave

if __name__ == "__main__":
    heap.start_undivided()
    leave.answer_signals()
    BEGAN = time.perf_counter()  # the slow imports count

from config.command_line import command_line, next_commands
from config.compose import compute_dtype, load_run, to_yaml
from config.layout import in_processes, mesh_sizes
from config.schema import Config, differences, identity, shared

if __name__ == "__main__":
    JOBS = command_line(sys.argv[1:])  # before the slow imports: a typo is told in a fraction of a second

import logging
import secrets
import signal
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from checkpoint.store import CheckpointStore, Restored
from evaluation.in_training import Tasks
from finetune.adapters.adaptation import adapted
from finetune.opening import open_subject
from inference.ahead import Ahead
from inference.generate import continuations
from inference.opening import first_state, keep_pretrained, new_head, resumed_state
from parallel.mesh import make_mesh
from parallel.sharding import replicated
from performance.fits import Room, memory_of
from performance.hardware import peak_flops
from performance.profile import ProfiledStep
from planner.choice import forecast, planned
from runtime.agreement import agreed, code_versions, require_same, require_shared
from runtime.exit_codes import DONE, FAULT, MISTAKE, PREEMPTED
from runtime.start import start, transfer_guard
from runtime.stop import StopSignal
from tracking.console import Console, human
from tracking.prometheus import exporter
from tracking.reporting import introduce
from tracking.run_directory import RunDirectory
from tracking.sinks import Sink
from training.heldout import Progress
from training.job import Job, make_job
from training.state import TrainState, has_vocabulary

log = logging.getLogger("isomesh.train")
WORDS = {DONE: "done", PREEMPTED: "preempted"}  # of how a run ended


def main(jobs: list[Config], began: float | None = None) -> int:
    """Runs each job (several in a multirun); returns the exit code of the first that did not end well."""
    for config in jobs:
        try:
            start(config.runtime)
            code, began = train(config, began or time.perf_counter()), None  # a second job begins after the first
        except leave.MISTAKES as error:
            code = leave.ended(MISTAKE, leave.one_line(error))
        except KeyboardInterrupt:  # twice in the loop
            code = leave.ended(*leave.SIGNALS[signal.SIGINT])
        if code != DONE:
            return code
    return DONE


def train(config: Config, began: float) -> int:
    """One run, from its config to its exit code. Raises ValueError or OSError for what is wrong before the loop."""
    require_same(shared(config) | code_versions())
    config = planned(in_processes(config, jax.default_backend(), jax.process_count()), jax.devices())
    mesh, primary = make_mesh(mesh_sizes(config, jax.device_count())), jax.process_index() == 0
    run, t = RunDirectory(Path(config.run.dir)), config.train
    with run.held() if primary else nullcontext(), exporter(config.metrics, run.path.name, t.steps, primary) as sinks:
        return train_in(run, config, mesh, began, sinks)


def train_in(run: RunDirectory, config: Config, mesh: jax.sharding.Mesh, began: float, sinks: list[Sink]) -> int:
    """The run, in a directory that no other process enters meanwhile. Raises MemoryError for what does not fit."""
    primary = jax.process_index() == 0
    dtype = agreed(lambda: compute_dtype(config, run.holds_results(), jax.default_backend()))
    config = replace(config, train=replace(config.train, compute_dtype=dtype))
    config, t = replace(config, run=replace(config.run, id=agreed(lambda: claim(config, run)))), config.train
    require_shared(Path(config.checkpoint.dir or run.path))
    peak = peak_flops(t.compute_dtype, list(mesh.devices.flat))  # on a CPU measured, on one device: before set_mesh
    with Console(run.path.name, run.log, t.steps, primary) as console, jax.set_mesh(mesh), ExitStack() as loop:
        # -------------------------------------------------------------------------------------------------------- data
        subject = open_subject(config, mesh, console.preparation)  # pretraining on text, or a task
        config, tokenizer, feed = subject.config, subject.tokenizer, subject.feed
        if primary:
            tokenizer.save(run.tokenizer)
        # at this point we have the batch of any step, the same on every mesh, and what is held out

        # ------------------------------------------------------------------------------------------------------- model
        job = make_job(config, mesh, loss=subject.loss, **adapted(config, new_head(config)))
        limit = memory_of(mesh.local_devices[0])
        room = Room(job.abstract, limit, t, config.optimizer, mesh.shape, job.saved["params"])
        room.check()
        tasks = Tasks(config, job, tokenizer)
        # at this point we know the shape and the layout of every array, and none has been made

        # ----------------------------------------------------------------------------------------------------- restore
        store = CheckpointStore(Path(config.checkpoint.dir or run.path / "checkpoints"), config.checkpoint)
        ours = {"identity": identity(config), "data": subject.digest}
        restored = restore(config, store, job, ours)
        with room.told():
            state, first, progress = beginning(job, config, restored)
        if first >= t.steps:
            console.note(f"nothing to do: {run.path} has {first} steps, and train.steps={t.steps}")
            store.close()
            console.finish({"checkpoints": store.directory}, next_commands(config, launch.words(), done=True))
            return DONE
        if primary:
            run.write_config(to_yaml(config))
            keep_pretrained(config.weights.path, run)
        subject.begin(job, lambda: (beginning(job, config, None)[0] if restored else state).params, run.path)
        # at this point the state after step `first` lies on the mesh

        # ----------------------------------------------------------------------------------------------------- compile
        compiling = time.perf_counter()
        batch = feed.batch(first)
        judge = subject.judge(job, batch)
        with room.told():
            step = job.compile(job.step, batch)
        compile_s, memory = time.perf_counter() - compiling, step.memory_analysis()
        room.check(memory)
        ahead = Ahead(mesh, job.description, job.abstract.params, tokenizer, config.sample, t.compute_dtype)

        facts = {"data": f"{subject.source}, {human(subject.size)} {subject.unit}"}
        facts |= {"steps": f"{first} to {t.steps}, {feed.stream.epoch(t.steps):.2f} epochs", "run": str(run.path)}
        told = forecast(config, mesh, memory, facts | feed.told, feed.stream.metrics)
        reporter = introduce(config, run, job, console, *told, peak, memory, compile_s, began, restored, sinks)
        meter = reporter.meter
        step = ProfiledStep(step, t.profile, first, run.path / "profile", meter, console)
        # at this point the step is compiled, and all that is told of it has somewhere to go

        def save(number: int, metric: float | None = None) -> bool:
            record = {**ours, "progress": asdict(progress), "spent": asdict(meter.spent())}
            return store.save(number, job.to_saved(state), record, metric=metric)

        # -------------------------------------------------------------------------------------------------------- loop
        code, number, saved = DONE, first, first
        out_of_patience = lambda: 0 < t.patience <= progress.since_best
        heap.make_room(memory.temp_size_in_bytes * jax.local_device_count())
        stop = loop.enter_context(StopSignal())  # before it, a signal ends the run at once
        meter.start(first, first * t.batch_size * t.seq_len)
        try:
            for number in range(first + 1, 1 + (first if out_of_patience() else t.steps)):
                with meter.data_wait():
                    batch = feed.batch(number - 1)
                with transfer_guard(config.runtime):
                    state, metrics = step(state, batch)
                bad = reporter.push(number, metrics)
                last, due, stopping = number == t.steps, store.due(number, time.monotonic()), stop.requested(number)
                evaluating = t.eval_every > 0 and (last or number % t.eval_every == 0)
                if due or stopping or last or evaluating or tasks.due(number, last):
                    bad = bad or reporter.settle()
                if bad is not None:
                    code = FAULT
                    break
                with meter.pause():
                    rank, best = None, False
                    if evaluating:
                        found = judge.evaluate(state.params)
                        rank, best = found.rank, progress.take(found.rank)
                        reporter.evaluated(number, found, best)
                    if tasks.due(number, last):
                        reporter.answered(number, tasks.metrics(state.params))
                    keep_best = best and config.checkpoint.keep_best > 0 and config.checkpoint.every > 0
                    if due or stopping or last or keep_best:
                        save(number, rank)
                        saved = number
                if stopping and not last:
                    console.warn(f"{stop.reason}: stopping after step {number}")
                    code = PREEMPTED
                    break
                if out_of_patience():
                    console.note(f"no better {judge.watched} in {t.patience} evaluations: stopping after step {number}")
                    break
            if code == FAULT:  # the step that was not finite left the state as it was before it
                number = int(state.step)
                state = replace(state, halted=jax.device_put(np.False_, replicated(mesh)))
            if saved != number:
                save(number)
        except Exception as error:
            leave.hear_others()
            if saved == first and room.exhausted(error):  # what it was asked for does not fit
                raise MemoryError(room.explain(memory)) from None
            log.exception("a fault after step %d", number)
            console.warn(f"{type(error).__name__} after step {number}; the run goes on from its last checkpoint")
            code = FAULT
            if jax.process_count() > 1:  # the others may be gone, and a clean exit would wait for them
                leave.leave_for(error, told=primary)
        # at this point the last state is handed to the checkpoints

        # --------------------------------------------------------------------------------------------------------- end
        step.close()
        return end(code, number, config, run, job, state, tokenizer, store, reporter, ahead)


def beginning(job: Job, config: Config, restored: Restored | None) -> tuple[TrainState, int, Progress]:
    """The state to go on from, on the mesh; how many steps it has behind it; the best evaluation so far."""
    if restored is None:
        return first_state(job, config), 0, Progress()
    return resumed_state(job, config, restored.state), restored.step, Progress(**restored.record["progress"])


def end(code, number, config: Config, run: RunDirectory, job: Job, state, tokenizer, store, reporter, ahead) -> int:
    """Waits for the last checkpoint, lets a trained model write, says where all is; returns the exit code."""
    console = reporter.console
    if lost := store.lost():
        code = FAULT
    store.close()
    if code == DONE and config.sample.tokens and config.model.generates:
        texts = samples(job, state.params, tokenizer, config, console, ahead)
        reporter.sinks.log_samples(number, texts)
        if jax.process_index() == 0:
            run.write_samples(number, texts)
    reporter.sinks.close()
    console.finish(
        run.files(store.directory), next_commands(config, launch.words(), done=code == DONE), WORDS.get(code, "stopped")
    )
    if lost:
        console.warn(lost)
    return code


def samples(job: Job, params, tokenizer, config: Config, console: Console, ahead: Ahead) -> list[tuple[str, str]]:
    """Prompts with what the model makes of them; nothing but a warning where that fails: the training is done."""
    dtype = jnp.dtype(config.train.compute_dtype)
    try:
        with job.for_inference(params) as (description, params):
            texts = continuations(description, params, tokenizer, config.sample, dtype, ahead.programs())
    except (ValueError, OSError) as error:
        console.warn(f"no samples: {error}")
        return []
    console.samples(texts)
    return texts


def claim(config: Config, run: RunDirectory) -> str:
    """Decides whether this run may use its directory, and returns the run's W&B id.

    1. An empty directory is taken.
    2. That of the same run (same seed, model, data, optimizer; mesh and length may differ) is gone on with.
    3. Anything else is refused by a ValueError, so that no two runs mix.
    """
    if run.holds_results():
        theirs = load_run(run.path)
        if found := differences(identity(config), identity(theirs)):
            raise ValueError(f"{run.path} holds another run: {'; '.join(found[:4])}; choose another run.dir")
        if config.checkpoint.resume == "never":
            raise ValueError(f"{run.path} holds this run already and checkpoint.resume=never; choose another run.dir")
        return config.run.id or theirs.run.id or secrets.token_hex(4)
    return config.run.id or secrets.token_hex(4)


def restore(config: Config, store: CheckpointStore, job: Job, ours: dict) -> Restored | None:
    """Decides where a run begins.

    1. From the newest intact checkpoint, on whatever mesh it was written; damaged ones are named and passed over.
    2. If all are damaged, or belong to another run: a ValueError, never a silent fresh start.
    3. If there is none: afresh, unless checkpoint.resume=require.
    """
    if config.checkpoint.resume == "never":
        if store.steps():
            raise ValueError(f"{store.directory} holds checkpoints and checkpoint.resume=never; choose another one")
        return None
    restored = store.restore(job.saved, resize=has_vocabulary(job.description.specs))
    if restored is None:
        if config.checkpoint.resume == "require":
            raise ValueError(f"checkpoint.resume=require, but {store.directory} holds no checkpoint")
        return None
    if found := differences(ours["identity"], restored.record["identity"]):
        raise ValueError(f"{store.directory} holds checkpoints of another run: {'; '.join(found[:4])}")
    if ours["data"] != restored.record["data"]:
        raise ValueError(
            f"the data of this run have changed since {store.directory} was written: "
            "the run cannot go on with the same tokens; start another with another run.dir"
        )
    return restored


if __name__ == "__main__":
    code = main(JOBS, BEGAN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all is saved: a second SIGTERM must not change the exit code
    leave.finish(code)
