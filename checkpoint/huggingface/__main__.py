"""Published weights in and out: python -m checkpoint.huggingface import PATH RUN_DIR | export MODEL FOLDER; --help.

Exit codes: 0 done; 2 the user's mistake.
"""

import sys

from checkpoint.huggingface.options import parse
from runtime import leave
from runtime.exit_codes import DONE, MISTAKE

if __name__ == "__main__":
    leave.answer_signals()
    OPTIONS = parse(sys.argv[1:])  # before the slow imports: a typo is told in a fraction of a second

import argparse
import json
import shutil
import time
from dataclasses import replace

import jax
import jax.numpy as jnp

from checkpoint.huggingface.load import load
from checkpoint.huggingface.opened import open_pretrained
from checkpoint.store import CheckpointStore
from config import compose
from config.layout import model_requirements
from config.pretrained import FROM
from config.schema import identity
from data.tokenizer import load_tokenizer
from export.huggingface import export_weights
from inference.opening import keep_pretrained
from model.counts import parameter_count
from model.transformer import describe
from parallel.mesh import make_mesh, resolve
from runtime.overrides import override
from runtime.start import start
from tracking.run_directory import RunDirectory


def main(options: argparse.Namespace) -> int:
    """Imports or exports; returns the exit code."""
    try:
        {"import": import_weights, "export": export_weights}[options.command](options)
    except (ValueError, OSError) as error:
        return leave.ended(MISTAKE, leave.one_line(error))
    return DONE


def import_weights(options: argparse.Namespace) -> None:
    """Streams a published model onto the mesh and saves it as a run directory without a run.

    One that was killed is begun again. Raises ValueError where the directory holds something else, or the model is not
    one that can be read.
    """
    began, run = time.perf_counter(), RunDirectory(options.run)
    unfinished = run.path / ".importing"  # there until all is written: what a killed import left is begun again
    if run.path.exists() and {path.name for path in run.path.iterdir()} - {".lock"} and not unfinished.exists():
        raise ValueError(f"{run.path} is not empty: choose another directory")
    opened = open_pretrained(options.path, allow_pickle=options.allow_pickle)
    asked = [f"{FROM}={opened.path}", override("run.dir", str(run.path)), *options.overrides]
    config = compose.load(asked, allow_pickle=options.allow_pickle)
    start(config.runtime)
    mesh = make_mesh(resolve(config.mesh, jax.device_count(), model_requirements(config.model)))
    dtype = jnp.dtype(config.train.param_dtype)
    with run.held(), jax.set_mesh(mesh):
        unfinished.touch()
        shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
        params = load(opened, describe(config.model), mesh, dtype)
        tokenizer = load_tokenizer(config.tokenizer)
        tokenizer.save(run.tokenizer)
        keep_pretrained(str(opened.path), run)
        store = CheckpointStore(run.path / "checkpoints", replace(config.checkpoint, asynchronous=False))
        record = {"identity": identity(config), "data": None, "progress": {}, "spent": {}}
        saved = store.save(0, {"params": params}, record)
        store.close()
        if not saved:
            raise ValueError("; ".join(store.poll()) or f"{store.directory} could not be written")
        run.write_config(compose.to_yaml(replace(config, train=replace(config.train, seq_len=opened.length))))
        run.imported.write_text(json.dumps({"path": config.weights.path, "digest": config.weights.digest}))
        unfinished.unlink()
    count, seconds = parameter_count(config.model).total, time.perf_counter() - began
    said = f"{count / 1e6:.1f}M parameters of {opened.family.model_type}"
    print(f"{run.path}: {said} in {seconds:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(OPTIONS))
