"""results.jsonl from run directories and W&B: every planted fault is named, and none has a loss to be fitted."""

import json
import math
import re
import shutil
import time
from dataclasses import asdict

import pytest
import wandb
import yaml

from config.compose import load
from config.schema import identity
from scaling.fit.runs_table import read_table
from scaling.sweep.collect import collect, find, write
from scaling.sweep.design import SweepConfig, design
from scaling.sweep.run import place
from scaling.sweep.run_directories import append
from scaling.sweep.wandb_files import read_offline

SWEEP = SweepConfig(
    *("toy", "ladder", (8, 16, 24)),
    **{"tokens_per_parameter": 0.6, "seeds": (2,), "batch_size": (2,), "eval_sequences": 4, "evaluations": 5},
    overrides=("train.seq_len=32", "tokenizer=bytes", "optimizer.schedule=constant", "optimizer.warmup_steps=4"),
)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Six planned runs and the config of each."""
    base = load(list(SWEEP.overrides))
    runs = design(SWEEP, base.model, 32)
    configs = {run.settings["wandb.name"]: load(list(run.overrides)) for run in runs}
    identify = lambda run: (identity(configs[run.settings["wandb.name"]]), 2)
    return place(runs, identify, tmp_path_factory.mktemp("runs"), "code"), configs


def history(run, loss=4.0):
    """What a run of `loss` at its end logs."""
    rows, every = [], math.ceil(run.steps / 5)
    for step in range(1, run.steps + 1):
        tokens = step * run.batch_size * run.seq_len
        rows.append({"step": step, "tokens": tokens, "train/loss": 5.0, "perf/wall_s": 1.0 * step, "epoch": step / 5})
        if step % every == 0 or step == run.steps:
            rows.append({"step": step, "tokens": tokens, "eval/loss": loss + 1 - step / run.steps})
    return rows


@pytest.fixture
def runs(plan, tmp_path):
    """A directory of the six runs, whole; `edit(place)` gives the path of one."""
    planned, configs = plan
    for number, one in enumerate(planned):
        directory = tmp_path / one.directory.name
        directory.mkdir()
        values = json.loads(json.dumps(asdict(configs[one.run.settings["wandb.name"]])))
        values["run"] |= {"id": f"id{number}", "dir": str(directory)}
        (directory / "config.yaml").write_text(yaml.safe_dump(values))
        lines(directory, history(one.run, 3 + number / 10))
        known = {"group": one.run.group, "label": one.run.label, "code_digest": one.code}
        append(directory, began=number, machine="m", commit="c", **known)
    return tmp_path


def lines(directory, rows):
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit(directory, change):
    path = directory / "metrics.jsonl"
    rows = [change(json.loads(line)) for line in path.read_text().splitlines()]
    lines(directory, [row for row in rows if row is not None])


def rows_of(runs, plan=None, **options):
    found = collect(find([runs]), identity, plan and plan[0], **options)
    return {(row.get("label"), row.get("seed"), row.get("source")): row for row in found}, found


def test_sound_runs_have_all_their_provenance(runs, plan, tmp_path):
    _, found = rows_of(runs, plan)
    assert len(found) == 6
    for row in found:
        assert row["fault"] is None
        run = next(one for one in plan[0] if one.config_digest == row["config_digest"]).run
        assert (row["parameters"], row["tokens"], row["flops"]) == (run.parameters, run.tokens, run.flops)
        assert row["model_flops"] == run.flops_per_token * run.tokens
        assert (row["seed"], row["group"], row["machine"], row["commit"]) == (run.seed, run.group, "m", "c")
        assert row["unique_tokens"] == pytest.approx(run.tokens / max(1, run.steps / 5), rel=1e-3)
    assert sorted(row["loss"] for row in found) == pytest.approx([3 + place / 10 for place in range(6)])
    write(found, tmp_path / "results.jsonl")
    table = read_table(tmp_path / "results.jsonl", {"N": "parameters", "D": "tokens", "C": "flops", "loss": "loss"})
    assert len(table) == 6
    assert not table.refused


FAULTS = {
    "NaN row": (lambda d: edit(d, lambda r: r | {"eval/loss": "NaN"} if "eval/loss" in r else r), "eval/loss is nan"),
    "diverged": (lambda d: edit(d, lambda r: r | {"eval/loss": 9.0} if "eval/loss" in r else r), "above log 256"),
    "stopped at a NaN": (
        lambda d: edit(d, lambda r: None if r["step"] > 9 else r | {"train/loss": "NaN"} if r["step"] == 9 else r),
        "train/loss is nan at step 9",
    ),
    "examples": (lambda d: edit(d, lambda r: r | {"tokens": r["step"] * 2}), "units mixed up: tokens is 2 at step 1"),
    "other units": (lambda d: edit(d, lambda r: r | {"tokens": r["tokens"] / 1e3}), "units mixed up"),
    "truncated": (
        lambda d: (d / "metrics.jsonl").write_bytes((d / "metrics.jsonl").read_bytes()[:-20]),
        "no eval/loss at its end",
    ),
    "unfinished": (lambda d: edit(d, lambda r: None if r["step"] > 9 else r), "unfinished: step 9 of"),
    "no config": (lambda d: (d / "config.yaml").unlink(), "never got as far"),
    "config cut": (
        lambda d: (d / "config.yaml").write_text((d / "config.yaml").read_text()[:900]),
        "config.yaml is damaged|config cannot be read",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_never_fitted(runs, plan, fault, tmp_path):
    break_it, message = FAULTS[fault]
    broken = runs / plan[0][2].directory.name
    break_it(broken)
    _, found = rows_of(runs)
    bad = [row for row in found if row["loss"] is None]
    assert {row["source"] for row in bad if "source" in row} == {str(broken)}
    assert any(re.search(message, row["fault"]) for row in bad)
    write(found, tmp_path / "results.jsonl")
    table = read_table(tmp_path / "results.jsonl", {"N": "parameters", "D": "tokens", "loss": "loss"})
    assert len(table) == 5
    assert any(bad[0]["fault"] == row.reason for row in table.refused)


def test_duplicates_count_once(runs, plan):
    first = runs / plan[0][0].directory.name
    again = shutil.copytree(first, runs / "again")
    edit(again, lambda r: r | {"eval/loss": r["eval/loss"] * 1.01} if "eval/loss" in r else r)
    found = {row["source"]: row for row in collect(find([runs]), identity, plan[0])}
    assert found[str(first)]["loss"] == pytest.approx(3.0)
    assert found[str(again)]["loss"] is None
    assert f"duplicate of {first}, loss 3.03 against 3" in found[str(again)]["fault"]


def test_missing_seeds_and_foreign_runs(runs, plan):
    gone = plan[0][3]
    shutil.rmtree(runs / gone.directory.name)
    for known in (plan, None):
        _, found = rows_of(runs, known)
        missing = [row for row in found if (row["fault"] or "").startswith(f"missing: seed 1 of {gone.run.label}")]
        assert len(missing) == 1
        assert missing[0]["loss"] is None
    foreign = runs / plan[0][0].directory.name
    values = yaml.safe_load((foreign / "config.yaml").read_text())
    values["optimizer"]["lr"] *= 2
    (foreign / "config.yaml").write_text(yaml.safe_dump(values))
    found = {row.get("source"): row for row in rows_of(runs, plan)[1]}
    assert "not asked for by the sweep" in found[str(foreign)]["fault"]
    assert found[str(foreign)]["loss_seen"] == pytest.approx(3.0)


def test_probes_and_a_sound_file_with_a_torn_line(runs, plan):
    one, two = (runs / planned.directory.name for planned in plan[0][:2])
    (one / "attempts.jsonl").write_text("")
    append(one, began=0, group="measured")
    with (two / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "tok')
    found = {row["source"]: row for row in rows_of(runs)[1] if "source" in row}
    assert str(one) not in found
    assert found[str(two)]["loss"] is not None
    assert "cut short" in found[str(two)]["note"]


@pytest.mark.parametrize("schedule", ["constant", "wsd", "cosine"])
def test_points_only_where_the_schedule_allows(runs, plan, schedule):
    for one in plan[0]:
        path = runs / one.directory.name / "config.yaml"
        values = yaml.safe_load(path.read_text())
        values["optimizer"] |= {"schedule": schedule, "decay_fraction": 0.3}
        path.write_text(yaml.safe_dump(values))
    if schedule == "cosine":
        with pytest.raises(ValueError, match="constant or wsd"):
            rows_of(runs, points=True)
        return
    _, found = rows_of(runs, points=True)
    for row in found:
        assert row["flops"] == pytest.approx(6 * row["parameters"] * row["tokens"], rel=1e-3)
    usable = [row for row in found if row["loss"] is not None]
    assert {row["kind"] for row in usable} == {"point"}
    ends = [row for row in found if row["kind"] == "end"]
    assert len(usable) == 6 * (5 if schedule == "constant" else 3)
    assert all("has decayed" in row["fault"] for row in ends)
    assert len(ends) == (0 if schedule == "constant" else 6)


def written(directory) -> bool:
    """Whether the file of an offline run is whole; at first it tells of no run, and then of one without a loss."""
    try:
        (row,) = collect(find([directory]), identity)
        return row["loss"] is not None and not read_offline(directory)[3]
    except ValueError:
        return False


def test_wandb_offline_directories(plan, tmp_path):
    """Written by W&B itself; the same rows as from run directories."""
    one = plan[0][0]
    settings = wandb.Settings(silent=True, console="off")
    config = asdict(plan[1][one.run.settings["wandb.name"]])
    options = {"mode": "offline", "project": "p", "id": "abc", "dir": str(tmp_path), "settings": settings}
    run = wandb.init(**options, config=config)
    for row in history(one.run, 3.0):
        run.log(row, step=row["step"])
    run.finish()
    (directory,) = tmp_path.glob("wandb/offline-run-*")
    deadline = time.monotonic() + 60  # W&B's own process may still be writing
    while not written(directory) and time.monotonic() < deadline:
        time.sleep(0.05)
    (row,) = collect(find([directory]), identity)
    assert row["loss"] == pytest.approx(3.0)
    assert (row["run"], row["config_digest"], row["seed"]) == ("abc", one.config_digest, 0)
    assert (row["parameters"], row["tokens"]) == (one.run.parameters, one.run.tokens)
    # cut short, it is named, and not used
    (file,) = directory.glob("run-*.wandb")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    (row,) = collect(find([directory]), identity)
    assert row["loss"] is None
    assert "cut short" in row["fault"]
    # one flipped bit, too
    file.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    assert "damaged" in read_offline(directory)[3]


def test_a_run_that_was_killed_at_once_is_there_and_not_missing(runs, plan):
    one = plan[0][0]
    directory = runs / one.directory.name
    shutil.rmtree(directory)
    append(directory, began=0, config=one.config_digest)
    (directory / "wandb" / "offline-run-1").mkdir(parents=True)  # W&B had not got far, either
    (row,) = [row for row in rows_of(runs, plan)[1] if row["fault"]]
    assert (row["source"], row["loss"]) == (str(directory), None)
    assert "never got as far" in row["fault"]


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        find([tmp_path])
    with pytest.raises(ValueError, match="is no directory"):
        find([tmp_path / "nowhere"])
