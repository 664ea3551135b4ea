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

from checkpoint.huggingface.config_json import read_config, with_labels, write_config
from checkpoint.huggingface.export import export
from checkpoint.huggingface.load import load
from checkpoint.huggingface.opened import SMALL_FILES, open_pretrained
from checkpoint.store import CheckpointStore
from compress.forms import dense
from config import compose
from config.layout import model_requirements
from config.pretrained import FROM
from config.schema import identity
from data.tokenizer import load_tokenizer
from finetune.adapters.merging import merge
from inference.opening import Opened, chat_of, find_model, keep_pretrained
from model.counts import parameter_count
from model.transformer import describe
from parallel.mesh import make_mesh, resolve
from runtime.overrides import override
from runtime.start import start
from tracking.run_directory import RunDirectory

PROBLEMS = {"several": "multi_label_classification", "regression": "regression"}  # of task.options.kind
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def main(options: argparse.Namespace) -> int:
    """Imports or exports; returns the exit code."""
    try:
        {"import": import_weights, "export": export_weights}[options.command](options)
    except (ValueError, OSError) as error:
        return leave.ended(MISTAKE, leave.one_line(error))
    return DONE


def import_weights(options: argparse.Namespace) -> None:
    """Streams a published model onto the mesh and saves it as a run directory without a run."""
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


def export_weights(options: argparse.Namespace) -> None:
    """Writes a model as a folder that transformers opens."""
    began, found = time.perf_counter(), find_model(options.path, options.overrides)
    model = found.open(options.step)
    kept = kept_config(model)
    written = write_config(model.config.model, found.reach, options.family) if kept is None else kept
    if found.config.task and found.config.task.labels and found.config.model.labels:
        task = found.config.task
        problem = PROBLEMS.get(task.options.get("kind"), "single_label_classification")
        written = with_labels(written, found.config.model.head, task.labels, problem)
    came = (kept or {}).get("dtype") or (kept or {}).get("torch_dtype")
    if came not in NAMES:
        came = "float32" if RunDirectory(model.path).config.exists() else open_pretrained(model.path).dtype
    dtype = NAMES.get(options.dtype or came, "F32")
    written = {key: value for key, value in written.items() if key != "torch_dtype"}
    texts = small_texts(model)
    eos = {"eos_token_id": ends(model)}
    if kept is None:
        written |= {"eos_token_id": model.tokenizer.eos_id, "bos_token_id": model.tokenizer.eos_id}
    texts.setdefault("generation_config.json", json.dumps(eos | {"do_sample": True}, indent=2) + "\n")
    with jax.set_mesh(model.mesh):
        params = model.params
        if model.config.adapter.kind != "none":
            params = merge(model.description, params, model.mesh).params
        elif found.forms:
            params = dense(model.description, params)
        size = export(options.folder, model.config.model, written, params, dtype, texts)
    seconds = time.perf_counter() - began
    said = f"{written['model_type']}, {size / 1e9:.2f} GB of {dtype}"
    print(f"{options.folder}: {said} in {seconds:.1f} s", file=sys.stderr)


def ends(model: Opened) -> int | list[int]:
    """The tokens that end a generated text: those of the chat template, if there is one, too."""
    try:
        stops = chat_of(model.path).stop_ids
    except ValueError:
        stops = ()
    both = sorted({model.tokenizer.eos_id, *stops})
    return both if len(both) > 1 else both[0]


def kept_config(model: Opened) -> dict | None:
    """The config.json that a run's weights came with, if the model still is what it says."""
    for folder in (RunDirectory(model.path).pretrained, model.path):
        if (folder / "config.json").is_file():
            kept = json.loads((folder / "config.json").read_text())
            ours = replace(model.config.model, dropout=0.0)
            theirs = replace(read_config(kept, set()), scan_layers=ours.scan_layers, head=ours.head, labels=ours.labels)
            if theirs == ours:
                return kept
    return None


def small_texts(model: Opened) -> dict[str, str]:
    """The tokenizer and what else goes with the weights, by file name."""
    texts = {}
    for folder in (model.path, RunDirectory(model.path).pretrained):
        for name in set(SMALL_FILES) - {"config.json"}:
            if (folder / name).is_file():
                texts[name] = (folder / name).read_text()
    texts.setdefault("tokenizer.json", model.tokenizer.as_json())
    return texts


if __name__ == "__main__":
    sys.exit(main(OPTIONS))
