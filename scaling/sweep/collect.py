"""From run directories and offline W&B directories to results.jsonl: one row a run, with its provenance.

A row either has a `loss`, or a `fault` that says why it has none: nothing faulty is dropped, and nothing faulty can be
fitted by accident. `loss_seen` keeps what a faulty run ended with.
"""

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from model.config import ModelConfig, RopeScaling
from model.counts import flops_per_token, parameter_count
from scaling.fit.laws import FLOPS_PER_TOKEN_AND_PARAMETER
from scaling.strict_json import dumps
from scaling.sweep.run import PROBES, Planned, config_digest
from scaling.sweep.run_directories import ATTEMPTS, fault_of, read_lines
from scaling.sweep.wandb_files import read_offline
from tracking.metrics_file import NONFINITE

SAME_LOSS = 1e-5  # relative: what two runs of one config may differ by


@dataclass
class Source:
    """What one run left behind: its config, its metrics and where it ran, or what is wrong with these files."""

    path: str
    config: dict = field(default_factory=dict)
    metrics: list[dict] = field(default_factory=list)
    provenance: dict = field(default_factory=dict)
    wrong: str = ""  # what is wrong with its files


def find(paths: Iterable[Path]) -> list[Source]:
    """All runs under the paths. A W&B directory of a run whose own directory is there too is the same run.

    Raises ValueError for a path that is not there or holds no run.
    """
    sources = []
    for path in {path.resolve(): path for path in paths}.values():  # named twice is there once
        if not path.is_dir():
            raise ValueError(f"{path} is no directory")
        directories = sorted({file.parent for name in ("metrics.jsonl", ATTEMPTS) for file in path.rglob(name)})
        found = [_from_directory(directory) for directory in directories]
        offline = [*([path] if path.name.startswith("offline-run-") else []), *sorted(path.rglob("offline-run-*"))]
        ours = {source.provenance.get("run") for source in found}
        apart = [one for one in offline if not set(directories) & set(one.parents)]  # no part of a run directory
        found += [source for source in _from_wandb(apart) if source.provenance.get("run", "") not in ours]
        if not found:
            raise ValueError(f"{path} holds no run: no metrics.jsonl, no offline-run-* of W&B")
        sources += found
    return [source for source in sources if source.provenance.get("group") != PROBES]


def _from_directory(directory: Path) -> Source:
    attempts, _ = read_lines(directory / ATTEMPTS)
    begun = next((one for one in attempts if "began" in one), {})
    keys = ("machine", "commit", "code_digest", "group", "label", "began")
    source = Source(str(directory), provenance={key: begun[key] for key in keys if key in begun})
    source.provenance |= {"config_digest": begun["config"]} if "config" in begun else {}
    source.metrics, torn = read_lines(directory / "metrics.jsonl")
    try:
        source.config = yaml.safe_load((directory / "config.yaml").read_text())
        source.provenance["run"] = source.config["run"]["id"] or directory.name
    except FileNotFoundError:
        source.wrong = "never got as far as its config.yaml"
    except (yaml.YAMLError, KeyError, TypeError):
        source.config, source.wrong = {}, "config.yaml is damaged or cut short"
    if torn and not source.wrong:
        source.wrong = "metrics.jsonl has a line that is damaged or cut short"
    return source


def _from_wandb(directories: list[Path]) -> list[Source]:
    """One source a run: its lives, each a directory, put together; later lives replace steps that were run again."""
    runs: dict[str, Source] = {}
    for directory in directories:
        try:
            config, history, facts, wrong = read_offline(directory)
        except ValueError as error:
            runs[str(directory)] = Source(str(directory), wrong=str(error))
            continue
        history = [{k: NONFINITE.get(v, v) if isinstance(v, str) else v for k, v in row.items()} for row in history]
        if (run := runs.get(facts["run"])) is None:
            group = (config.get("wandb") or {}).get("group")
            run = runs[facts["run"]] = Source(str(directory), config, [], facts | ({"sweep": group} if group else {}))
        first = min((row["step"] for row in history), default=math.inf)
        run.metrics = [row for row in run.metrics if row["step"] < first] + history
        run.config, run.wrong = config, wrong or run.wrong
    return list(runs.values())


# ---------------------------------------------------------------------------------------------------------------- rows


def collect(
    sources: list[Source],
    identity: Callable[[dict], dict],
    planned: list[Planned] | None = None,
    *,
    points: bool = False,
) -> list[dict]:
    """Rows of results.jsonl, with those planned and not there. `identity`: config.identity.

    points: every evaluation while the learning rate was at its peak is a row, as far as a schedule has such a time
    (constant, wsd); ends of decayed runs are then not comparable, and faults. Raises ValueError if there is no such.
    """
    rows = [_row(source, identity) for source in sources]
    if planned is not None:
        _match(rows, planned)
    _mark_duplicates(rows, {one.directory.name for one in planned or ()})
    rows += _missing(rows, planned)
    if points:
        by_path = {source.path: source for source in sources}
        rows = [one for row in rows for one in _points(row, by_path.get(row.get("source")))]
        if not any(row["kind"] == "point" for row in rows):
            raise ValueError("--points: no run was evaluated while optimizer.schedule=constant or wsd held its peak")
    return sorted(rows, key=lambda row: (row.get("flops") or 0, row.get("parameters") or 0, row.get("seed") or 0))


def _row(source: Source, identity: Callable[[dict], dict]) -> dict:
    """One run's end; its loss is None where its `fault` speaks against it."""
    known = {**source.provenance, "source": source.path, "kind": "end"}
    known.setdefault("run", Path(source.path).name)
    try:
        train, optimizer, values = source.config["train"], source.config["optimizer"], dict(source.config["model"])
        values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        model = ModelConfig(**values)
        digest = config_digest(identity(source.config), train["steps"], train["eval_batches"])
    except (KeyError, TypeError, ValueError) as error:
        return {**known, "loss": None, "fault": source.wrong or f"its config cannot be read: {error}"}
    steps, batch, seq_len = train["steps"], train["batch_size"], train["seq_len"]
    ends = [row for row in source.metrics if row["step"] == steps and "eval/loss" in row]
    count, tokens = parameter_count(model), steps * batch * seq_len
    walls = [row["perf/wall_s"] for row in source.metrics if "perf/wall_s" in row]
    epochs = next((row["epoch"] for row in source.metrics[::-1] if row.get("epoch")), None)
    last = max((row["step"] for row in source.metrics), default=0)
    loss = ends[-1]["eval/loss"] if ends else None
    sound = loss is not None and math.isfinite(loss)
    fault = _fault(source, model, train, ends, last)
    return {
        **known,
        "loss": None if fault else loss,
        "bits_per_byte": ends[-1].get("eval/bits_per_byte") if ends and not fault else None,
        "fault": fault or None,
        "note": source.wrong if source.wrong and not fault else None,
        "loss_seen": loss if fault and sound else None,
        "parameters": count.total,
        "embedding_parameters": count.embedding,
        "tokens": tokens,
        "unique_tokens": round(tokens * last / steps / max(1.0, epochs)) if epochs else None,
        "flops": float(FLOPS_PER_TOKEN_AND_PARAMETER * count.total * tokens),
        "model_flops": flops_per_token(model, seq_len) * tokens,
        **{name: getattr(model, name) for name in ("width", "layers", "heads", "parametrization")},
        **{"steps": steps, "batch_size": batch, "seq_len": seq_len, "seed": source.config["seed"]},
        **{name: optimizer[name] for name in ("lr", "schedule", "warmup_steps", "decay_fraction")},
        "seconds": max(walls, default=None),
        "config_digest": digest,
    }


def _fault(source: Source, model: ModelConfig, train: dict, ends: list[dict], last: int) -> str:
    """Why the end of a run is not to be used; empty where nothing speaks against it."""
    steps, batch, seq_len = train["steps"], train["batch_size"], train["seq_len"]
    if diverged := fault_of(source.metrics, model.vocab_size):
        return diverged
    for row in source.metrics:
        if "tokens" in row and row["tokens"] != row["step"] * batch * seq_len:
            examples = ": examples, not tokens" if row["tokens"] == row["step"] * batch else ""
            right = f"{row['step']} x {batch} x {seq_len} = {row['step'] * batch * seq_len}"
            return f"units mixed up: tokens is {row['tokens']:.10g} at step {row['step']}, not {right}{examples}"
    if not ends:
        cut = f"; {source.wrong}" if source.wrong else ""
        what = f"unfinished: step {last} of {steps}" if last < steps else "no eval/loss at its end: train.eval_every=0?"
        return what + cut
    if len({row["eval/loss"] for row in ends}) > 1:
        return f"step {steps} is there {len(ends)} times, with different losses"
    return ""


def _match(rows: list[dict], planned: list[Planned]) -> None:
    """Gives rows the group of the run that they are, and faults those that the sweep does not ask for."""
    asked = {one.config_digest: one for one in planned}
    for row in rows:
        if one := asked.get(row.get("config_digest")):
            row |= {"group": one.run.group, "label": one.run.label}
        elif "config_digest" in row:
            _spoil(row, "not asked for by the sweep as it is now")


def _mark_duplicates(rows: list[dict], preferred: set[str]) -> None:
    """Of several sound runs of one config, seed included, the planned directory counts, else the first that began."""
    order = sorted(rows, key=lambda r: (Path(r["source"]).name not in preferred, r.get("began", math.inf), r["source"]))
    kept: dict[str, dict] = {}
    for row in order:
        if row["loss"] is None:
            continue
        first = kept.setdefault(row["config_digest"], row)
        if first is row:
            continue
        other = " made by other code" if first.get("code_digest") != row.get("code_digest") else ""
        apart = abs(row["loss"] / first["loss"] - 1)
        losses = f", loss {row['loss']:.6g} against {first['loss']:.6g}" if apart > SAME_LOSS else ""
        _spoil(row, f"duplicate of {first['source']}{other}{losses}")


def _spoil(row: dict, fault: str) -> None:
    if row["loss"] is not None:
        row |= {"loss_seen": row["loss"], "loss": None, "bits_per_byte": None}
    row["fault"] = f"{row['fault']}; {fault}" if row.get("fault") else fault


def _missing(rows: list[dict], planned: list[Planned] | None) -> list[dict]:
    """A row for each run that should be there: planned, or without a plan a seed that other sizes of its group have."""
    there, empty = {row.get("config_digest") for row in rows}, {"loss": None, "kind": "end"}
    if planned is not None:
        return [
            {"run": one.directory.name, "label": one.run.label, "group": one.run.group, "seed": one.run.seed, **empty}
            | {"fault": f"missing: seed {one.run.seed} of {one.run.label} was not run"}
            for one in planned
            if one.config_digest not in there
        ]
    seeds: dict[tuple, dict[str, set[int]]] = {}
    for row in rows:
        if row.get("group") and "seed" in row:
            seeds.setdefault(row["group"], {}).setdefault(row.get("label", ""), set()).add(row["seed"])
    return [
        {"run": f"{label}-s{seed}", "label": label, "group": group, "seed": seed, **empty}
        | {"fault": f"missing: seed {seed} of {label}, which other sizes of {group} have"}
        for group, labels in seeds.items()
        for label, has in labels.items()
        for seed in sorted(set().union(*labels.values()) - has)
    ]


def _points(row: dict, source: Source | None) -> list[dict]:
    """The row's run as points at its peak learning rate, and its end."""
    schedule = row.get("schedule")
    if source is None or "fault" not in row or row["fault"] or schedule not in ("constant", "wsd"):
        if row["loss"] is not None:
            _spoil(row, f"its learning rate decays ({schedule}): its end is not comparable with points before a decay")
        return [row]
    stable = row["steps"]
    if schedule == "wsd":
        stable = max(row["warmup_steps"], round(row["steps"] * (1 - row["decay_fraction"])))
    made = []
    for one in source.metrics:
        if "eval/loss" in one and row["warmup_steps"] < one["step"] <= stable:
            share = one["step"] / row["steps"]
            part = {name: row[name] * share for name in ("flops", "model_flops")}
            part |= {"tokens": round(row["tokens"] * share), "loss": one["eval/loss"], "kind": "point"}
            # a part of a run has no group of its own: a budget's runs end there
            made.append({**row, **part, "bits_per_byte": one.get("eval/bits_per_byte"), "group": None, "seconds": None})
    if schedule == "wsd":
        _spoil(row, "its learning rate has decayed: its end is not comparable with points before the decay")
        made.append(row)
    return made


def write(rows: list[dict], path: Path) -> None:
    """Replaces results.jsonl at once: one object a line, without keys that a row has no value for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    kept = [{k: v for k, v in row.items() if v is not None or k == "loss"} for row in rows]
    temporary.write_text("".join(dumps(row) + "\n" for row in kept))
    os.replace(temporary, path)
