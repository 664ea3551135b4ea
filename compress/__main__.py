"""Makes a trained model small: python -m compress MODEL OUT --recipe RECIPE [key=value ...]; --help says more.

python -m compress compare OUT ... puts several beside each other.

The table of what it cost goes to stdout, everything else to stderr. Exit codes: 0 done; 2 the user's mistake.
"""

import sys

from compress.options import SETTINGS, parse
from runtime import leave
from runtime.exit_codes import DONE, MISTAKE

if __name__ == "__main__":
    leave.answer_signals()
    OPTIONS = parse(sys.argv[1:])  # before the slow imports: a typo is told in a fraction of a second

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from checkpoint.config import CheckpointConfig
from checkpoint.huggingface.opened import open_pretrained
from checkpoint.store import CheckpointStore
from compress.cost import Cost, Side, bytes_of, bytes_on_disk, paired
from compress.folder import write_mark
from compress.forms import forms_for
from compress.layers import quantise
from compress.narrowing import Sizes, narrowed
from compress.own_task import question_of, tokens_of, with_task
from compress.pareto import draw, points_of, table
from compress.recipes import GROUP, RECIPES, Recipe
from compress.text import data_of, open_text, rows_of_text, rows_of_tokens
from config.compose import load_run, to_yaml
from config.schema import identity
from evaluation.scoring import Row, Scorer
from finetune.adapter_config import AdapterConfig, NoAdapter
from finetune.reference import keep_reference
from inference.config import SampleConfig
from inference.generate import generate
from inference.opening import Found, Opened, find_model, keep_pretrained
from model.forms import Forms
from model.transformer import describe
from parallel.sharding import splits
from runtime.files import folder_made
from tracking.run_directory import RunDirectory

ROUNDS = 2  # in which both models are timed by turns
ASKED = ("group", "tables", "wide", "share", "sizes", "samples", "length", "heldout")  # options that are kept
READ_ROWS = 4  # of held-out text that are timed


def main(options: argparse.Namespace) -> int:
    """Compresses; returns the exit code."""
    try:
        command = compare if "folders" in options else run
        command(options)
    except leave.MISTAKES as error:
        return leave.ended(MISTAKE, leave.one_line(error))
    return DONE


def run(options: argparse.Namespace) -> None:
    """Writes the folder and prints the table. Raises ValueError or OSError for what the user can mend."""
    began, recipe = time.perf_counter(), RECIPES[options.recipe]
    found = find_model(options.model, options.overrides, SETTINGS)
    options.group = group_of(options, recipe, found.config.adapter)
    if found.config.adapter.kind in ("qat", "freeze"):  # a whole model of floats, and so is what is made of it
        found = replace(found, forms={}, config=replace(found.config, adapter=NoAdapter()))
    if found.forms:
        raise ValueError(f"{found.path} has adapters: merge them first (python -m finetune merge {found.path} OUT)")
    if recipe.calibrated and found.config.mesh.context != 1:
        raise ValueError(f"mesh.context={found.config.mesh.context}: calibration text is not split; use data or fsdp")
    asked = question_of(found, options.task_rows)
    read, text = text_of(found, options) if recipe.calibrated or found.config.model.causal else (None, None)
    model = found.open(options.step)
    with jax.set_mesh(model.mesh):
        rows = Texts(read, options, model)
        small, forms = smaller(model, recipe, options, rows.calibration if recipe.calibrated else None)
        cost = measured(model, small, rows.heldout, options.generate)
        cost = cost if asked is None else with_task(cost, asked, model, small)
    with folder_made(options.out) as folder:
        cost = write(folder, options, found, small, forms, cost, text)
    print(cost.table(), end="")
    tell(f"{options.out}: {options.recipe} in {time.perf_counter() - began:.0f} s")


def group_of(options: argparse.Namespace, recipe: Recipe, adapter: AdapterConfig) -> int:
    """Inputs of a step: --group, else that which a run was trained with to be rounded, else GROUP.

    A run that is rounded otherwise than it was trained to be is told.
    """
    if adapter.kind != "qat":
        return options.group or GROUP
    group, grouped = options.group or adapter.group, adapter.form in ("int4", "nf4")
    if recipe.form != adapter.form or (grouped and group != adapter.group):
        size = f" in groups of {adapter.group}" if grouped else ""
        tell(f"note: {options.model} was trained to be rounded to {adapter.form}{size}, and this is another rounding")
    return group


def text_of(found: Found, options: argparse.Namespace) -> tuple[Callable, dict[str, str]]:
    """What reads rows of text as rows_of_text does, and where they come from: --data, else the run's own.

    Raises ValueError for rows that are longer than the model has positions.
    """
    directory, config, asked = RunDirectory(found.path), found.config, options.data
    if config.model.positions == "learned" and options.length > found.reach:
        raise ValueError(
            f"--length {options.length}: the model has {found.reach} positions; give --length {found.reach}"
        )
    tokens = None if asked else tokens_of(found)
    if tokens is not None:
        read, text = partial(rows_of_tokens, tokens), {"source": "task", "path": config.task.path}
    else:
        own = config.data if directory.config.exists() and not directory.imported.exists() else None
        data = data_of(asked, own, config.data.cache)
        read = partial(rows_of_text, open_text(data, config.tokenizer, found.tokenizer, directory.tokenizer))
        text = {"source": data.source, "path": data.path}
    tell(f"text: {text['path'] or text['source']}" + ("" if asked else "; --data names other"))
    return read, text


def compare(options: argparse.Namespace) -> None:
    """Prints what several folders cost, and draws it if asked to. Raises ValueError or OSError."""
    points = points_of(options.folders)
    if options.picture:
        draw(points, options.picture)
    print(table(points), end="")


def smaller(model: Opened, recipe: Recipe, options: argparse.Namespace, samples: np.ndarray | None) -> tuple:
    """The model as the recipe makes it, and the forms of its parts: none where it is one of floats."""
    progress = lambda done, total: tell(f"layer {done} of {total}") if done in (1, total) or done % 5 == 0 else None
    shared = model.description, model.params, model.mesh
    if recipe.form == "narrow":
        forms, config = {}, replace(model.config, model=Sizes(**options.sizes).of(model.config.model))
        description, params = narrowed(*shared, config.model, samples, progress)
    else:
        tables, config = options.tables == "int8", model.config
        forms = forms_for(model.description, recipe, options.group, tables, options.share, options.wide)
        description, params = quantise(*shared, forms, recipe.method, samples, progress)
    if recipe.is_dense:
        dtype, forms = jax.tree.leaves(model.params)[0].dtype, {}
        description, params = describe(config.model), jax.tree.map(lambda p: p.astype(dtype), params)
    return replace(model, config=config, description=description, params=params), forms


class Texts:
    """Rows of tokens for a model on its mesh."""

    def __init__(self, read: Callable | None, options: argparse.Namespace, model: Opened):
        """read: rows of (split, count, length), as rows_of_text; None where the recipe needs no text."""
        parts, even = splits("batch"), splits("residual")
        if options.length % even:
            raise ValueError(
                f"--length {options.length} must be a multiple of {even}, which the mesh splits tokens into"
            )
        samples = -(-options.samples // parts) * parts
        causal = read is not None and model.config.model.causal
        self.calibration = None if read is None else read("train", samples, options.length)[:, :-1]
        self.heldout = read("heldout", options.heldout, options.length) if causal else None


def tell(line: str) -> None:
    """On stderr."""
    print(line, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------- what it cost


def measured(before: Opened, after: Opened, heldout: np.ndarray | None, tokens: int) -> Cost:
    """Bytes in memory, the loss of held-out rows (N, T + 1), the speed of reading and of `tokens` new ones."""
    sides = [Side(bytes_of(model.params), 0) for model in (before, after)]
    if heldout is None:
        return Cost(*sides)
    scorers = [Scorer(model.description, model.params, model.mesh, model.dtype) for model in (before, after)]
    losses = [losses_of(scorer, heldout) for scorer in scorers]
    sides = [replace(side, loss=float(loss.mean())) for side, loss in zip(sides, losses, strict=True)]
    if tokens:
        few = heldout[:READ_ROWS]
        read = by_turns([lambda s=scorer: losses_of(s, few) for scorer in scorers])
        written = by_turns([lambda m=model: continue_row(m, few[0], tokens) for model in (before, after)])
        speeds = zip(sides, read, written, strict=True)
        sides = [replace(side, reads=few[:, 1:].size / r, writes=tokens / w) for side, r, w in speeds]
    return Cost(*sides, paired(*losses), heldout[:, 1:].size)


def losses_of(scorer: Scorer, rows: np.ndarray) -> np.ndarray:
    """The mean loss of each row's tokens but its first."""
    places = np.arange(rows.shape[1] - 1, dtype=np.int32)
    scores = scorer.scores_of([Row(row[:-1], places, row[1:]) for row in rows])
    return np.array([one.nll_C.astype(np.float64).mean() for one in scores])


def continue_row(model: Opened, row: np.ndarray, tokens: int) -> None:
    """Generates from the first tokens of a row, greedily, one sequence."""
    sample = SampleConfig(tokens=tokens, temperature=0.0)
    generate(model.description, model.params, [row[:16].tolist()], sample, dtype=model.dtype)


def by_turns(calls: list) -> list[float]:
    """The shortest seconds of each, after a first call that compiles it."""
    best = [float("inf")] * len(calls)
    for call in calls:
        call()
    for _ in range(ROUNDS):
        for number, call in enumerate(calls):
            began = time.perf_counter()
            call()
            best[number] = min(best[number], time.perf_counter() - began)
    return best


# ----------------------------------------------------------------------------------------------------------- the folder


def write(folder: Path, options, found: Found, small: Opened, forms: Forms, cost: Cost, text) -> Cost:
    """Fills the folder; returns the cost with the bytes on disk."""
    source, config = RunDirectory(found.path), small.config
    kept = RunDirectory(folder)
    if source.config.exists() and not source.imported.exists() and not source.pretrained.exists():
        if config.tokenizer.kind != "bytes":
            found.tokenizer.save(kept.tokenizer)
    else:
        found.tokenizer.save(kept.tokenizer)
        keep_pretrained(str(found.path), kept)
    keep_reference(found.path, folder)
    if found.begin or not source.config.exists() or source.imported.exists():
        kept.imported.write_text(json.dumps({"path": str(found.path), "digest": small.digest}))
    run = replace(config.run, dir=str(options.out), id=None)
    config = replace(config, run=run, checkpoint=CheckpointConfig())
    store = CheckpointStore(folder / "checkpoints", replace(config.checkpoint, asynchronous=False))
    record = {"identity": identity(config), "data": None, "progress": {}, "spent": {}}
    saved = store.save(small.step or 0, {"params": small.params}, record)
    store.close()
    if not saved:
        raise ValueError("; ".join(store.poll()) or f"{folder} could not be written")
    before = replace(cost.before, disk=bytes_of_weights(found.path, small.step))
    cost = replace(cost, before=before, after=replace(cost.after, disk=bytes_on_disk(folder / "checkpoints")))
    body = provenance(options, found, small, text)
    told = {"recipe": options.recipe, "model": str(found.path), **cost.as_json(), "provenance": body}
    (folder / "cost.json").write_text(json.dumps(told, indent=2) + "\n")
    (folder / "cost.md").write_text(f"{options.recipe} of {found.path}\n\n{cost.table()}")
    kept.write_config(to_yaml(config))
    if forms:  # else it is a model of floats, like any that was trained
        write_mark(folder, forms, body)
    return cost


def bytes_of_weights(path: Path, step: int | None) -> int:
    """Of the files that hold a model: of a run one checkpoint, and the base of which it trained some parameters."""
    if not RunDirectory(path).config.exists():
        return sum(map(bytes_on_disk, open_pretrained(path).source.files()))
    config = load_run(path)
    checkpoints = Path(config.checkpoint.dir or path / "checkpoints")
    newest = max(checkpoints.glob("[0-9]" * 8), default=checkpoints)
    found = bytes_on_disk(newest if step is None else checkpoints / f"{step:08d}")
    below = config.weights.path if config.adapter.kind == "freeze" else None
    return found + (bytes_of_weights(Path(below), None) if below else 0)


def provenance(options, found: Found, small: Opened, text: dict[str, str] | None) -> dict:
    """Where a compressed model came from, and how it was made."""
    asked = {name: getattr(options, name) for name in ASKED}
    source = {"path": str(found.path), "step": small.step, "digest": small.digest}
    return {
        "recipe": {"name": options.recipe, **asdict(RECIPES[options.recipe]), **asked},
        "source": source,
        "calibration": text if RECIPES[options.recipe].calibrated else None,
        "jax": jax.__version__,
    }


if __name__ == "__main__":
    sys.exit(main(OPTIONS))
