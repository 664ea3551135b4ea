"""Adapters merged, out and in, and what teachers say: python -m finetune merge|export|import|teach ...; see --help.

Exit codes: 0 done; 2 the user's mistake.
"""

import sys

from finetune.options import GROUPS, parse
from runtime import leave
from runtime.exit_codes import DONE, MISTAKE

if __name__ == "__main__":
    leave.answer_signals()
    OPTIONS = parse(sys.argv[1:])  # before the slow imports: a typo is told in a fraction of a second

import argparse
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from checkpoint.config import CheckpointConfig, WeightsConfig
from checkpoint.store import CheckpointStore
from config.compose import load, to_yaml
from config.layout import mesh_sizes
from config.pretrained import FROM
from config.schema import Config, identity
from finetune.adapter_config import NoAdapter
from finetune.adapters import peft_format
from finetune.adapters.adaptation import adaptation, is_adapter
from finetune.adapters.base import begun
from finetune.adapters.merging import merge
from finetune.opening import open_task
from finetune.reference import keep_reference
from finetune.teacher import keep
from inference.adapters import family_at
from inference.opening import Found, adaptation_of, find_model, keep_pretrained
from model.transformer import describe
from parallel.mesh import make_mesh
from runtime.files import folder_made
from runtime.overrides import override
from runtime.start import start
from tracking.run_directory import RunDirectory
from training.subject import pretraining
from training.trainable import chosen, joined


def main(options: argparse.Namespace) -> int:
    """Does what was asked for; returns the exit code."""
    command = {"merge": merge_run, "export": export_run, "import": import_adapter, "teach": keep_teacher}[
        options.command
    ]
    began = time.perf_counter()
    try:
        said = command(options)
    except leave.MISTAKES as error:
        return leave.ended(MISTAKE, leave.one_line(error))
    print(f"{options.out}: {said} in {time.perf_counter() - began:.1f} s", file=sys.stderr)
    return DONE


def adapted_run(options: argparse.Namespace) -> Found:
    """The run that an option names. Raises ValueError for one without adapters."""
    found = find_model(options.run, options.overrides, GROUPS)
    if found.config.adapter.kind == "none":
        raise ValueError(f"{options.run} has no adapters: adapter.kind={found.config.adapter.kind}")
    return found


# ---------------------------------------------------------------------------------------------------------------- merge


def merge_run(options: argparse.Namespace) -> str:
    """Writes a whole model. Raises ValueError or OSError for what the user can mend."""
    found = adapted_run(options)
    model = found.open(options.step)
    with jax.set_mesh(model.mesh):
        params = merge(model.description, model.params, model.mesh).params
        config = replace(found.config, adapter=NoAdapter(), weights=WeightsConfig())
        config = replace(config, train=replace(config.train, param_dtype="float32"))
        params = jax.tree.map(lambda p: p.astype("float32"), params)
        with folder_made(options.out) as folder:
            write_run(folder, options.out, config, found, params, model.step or 0)
    return f"step {model.step} of {options.run}, merged"


def write_run(folder: Path, out: Path, config: Config, found: Found, params: dict, step: int) -> None:
    """Fills a folder, which is going to be `out`, with what a run's directory holds."""
    kept = RunDirectory(folder)
    if config.tokenizer.kind != "bytes":
        found.tokenizer.save(kept.tokenizer)
    if RunDirectory(found.path).pretrained.exists() or not RunDirectory(found.path).config.exists():
        keep_pretrained(str(found.path), kept)
    keep_reference(found.path, folder)
    config = replace(config, run=replace(config.run, dir=str(out), id=None), checkpoint=CheckpointConfig())
    store = CheckpointStore(folder / "checkpoints", replace(config.checkpoint, asynchronous=False))
    record = {"identity": identity(config), "data": None, "progress": {}, "spent": {}}
    saved = store.save(step, {"params": params}, record)
    store.close()
    if not saved:
        raise ValueError("; ".join(store.poll()) or f"{out} could not be written")
    kept.write_config(to_yaml(config))


# ----------------------------------------------------------------------------------------------------- peft, out and in


def export_run(options: argparse.Namespace) -> str:
    """Writes peft's two files. Raises ValueError or OSError for what the user can mend."""
    found = adapted_run(options)
    if found.config.adapter.kind in ("freeze", "qat"):
        raise ValueError(f"{options.run} has no adapters: adapter.kind={found.config.adapter.kind}")
    if own := adaptation_of(found.config).trained_of(found.config.model):  # by adapter.also, or a task's head
        raise ValueError(
            f"{options.run} has trained the model's own {own[0]}, and peft's files hold adapters alone: merge instead "
            f"(python -m finetune merge {options.run} OUT)"
        )
    family = family_at(found.path, found.config, found.reach)
    model = found.open(options.step)
    params = jax.tree.map(np.asarray, jax.device_get(chosen(model.params, is_adapter)))
    about = {"base_model_name_or_path": found.config.weights.path}
    with folder_made(options.out) as folder:
        size = peft_format.export(folder, family, found.config.model, found.forms, params, about)
    return f"{found.config.adapter.kind} of {options.run}, {size / 1e6:.2f} MB for peft"


def import_adapter(options: argparse.Namespace) -> str:
    """Writes a run's directory with the adapter. Raises ValueError or OSError for what the user can mend."""
    published, base = peft_format.open_published(options.adapter), find_model(options.base)
    family = family_at(base.path, base.config, base.reach)
    settings = peft_format.settings(published, family, base.config.model)
    asked = [override(FROM, str(base.path)), *settings, override("run.dir", str(options.out)), *options.overrides]
    config = load(asked)
    config = replace(config, train=replace(config.train, seq_len=base.config.train.seq_len))
    adapts = adaptation(config.adapter, config.model, config.train.steps)
    found = replace(base, config=replace(base.config, runtime=config.runtime, mesh=config.mesh))
    model = found.open()  # its weights are read, so that a base that does not open is told now
    with jax.set_mesh(model.mesh):
        description = describe(config.model, forms=adapts.forms)
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), chosen(description.shapes, is_adapter))
        first = chosen(begun(description, joined(model.params, zeros), model.mesh), is_adapter)
        params = peft_format.read(published, family, config.model, adapts.forms, jax.device_get(first))
        params = jax.tree.map(jax.device_put, params, chosen(description.shardings(model.mesh), is_adapter))
        with folder_made(options.out) as folder:
            write_run(folder, options.out, config, base, params, 0)
    return f"{published.config['peft_type']} of {options.adapter}, on {base.path}"


# ------------------------------------------------------------------------------------------------------------- teachers


def keep_teacher(options: argparse.Namespace) -> str:
    """Writes what a teacher says of the batches of a run. Raises ValueError or OSError for what the user can mend."""
    config = load(options.overrides)
    if config.task is None or config.task.kind != "distillation" or config.task.options.get("kept"):
        raise ValueError("teach: the run is none with a teacher; set task=distillation task.options.teacher=PATH")
    start(replace(config.runtime, coordinator=None, processes=1, process_id=-1))
    mesh, steps = make_mesh(mesh_sizes(config, jax.device_count())), config.train.steps
    tell = lambda done: done % 100 or print(f"step {done} of {steps}", file=sys.stderr)
    with jax.set_mesh(mesh):
        subject = pretraining(config, mesh)
        task = open_task(subject.config, subject.tokenizer)
        with folder_made(options.out) as folder:
            keep(folder, subject, task.options, mesh, steps, tell)
    return f"{steps} steps of {task.options.teacher}, {task.options.top_k} tokens each"


if __name__ == "__main__":
    sys.exit(main(OPTIONS))
