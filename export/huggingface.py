"""A model as a folder that transformers opens: config, tokenizer, chat template and safetensors."""

import argparse
import json
import sys
import time
from dataclasses import replace

import jax

from checkpoint.huggingface.config_json import read_config, with_labels, write_config
from checkpoint.huggingface.export import export
from checkpoint.huggingface.opened import SMALL_FILES, open_pretrained
from export.weights import plain_params
from inference.opening import Opened, chat_of, find_model
from tracking.run_directory import RunDirectory

PROBLEMS = {"several": "multi_label_classification", "regression": "regression"}  # of task.options.kind
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


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
    params = plain_params(found, model)
    with jax.set_mesh(model.mesh):
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
