"""The report of an experiment: its numbers are the analysis', its page is whole, safe and the same every time."""

import json
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from runpy import run_module

import numpy as np
import pytest

from scaling.fit.law_fit import fit
from scaling.fit.laws import HOFFMANN, predict
from scaling.fit.runs_table import read_table
from scaling.report import content, figures
from scaling.report.content import AS_COLLECTED, ReportRequest, assemble, columns_of

TRUTH = {"E": 1.9, "A": 60.0, "B": 120.0, "alpha": 0.33, "beta": 0.31}
BUDGETS = (2e11, 5e11, 1.25e12, 3e12, 8e12)
HOSTILE = "<script>alert('x')</script>\"&"


def best_n(c):
    e, a, b, alpha, beta = TRUTH.values()
    return (alpha * a / (beta * b) * (c / 6) ** beta) ** (1 / (alpha + beta))


def rows(seed=0, budgets=BUDGETS, noise=0.003):
    """As `collect` writes them: six sizes around each budget's optimum, three seeds at the two smallest budgets."""
    rng, made = np.random.default_rng(seed), []
    for place, c in enumerate(budgets):
        for factor in (0.22, 0.42, 0.75, 1.4, 2.6, 4.6):
            n = round(best_n(c) * factor)
            d = round(c / 6 / n)
            clean = float(predict(HOFFMANN, TRUTH, {"N": n, "D": d}))
            for run_seed in range(3 if place < 2 else 1):
                row = {"group": f"{c:.3g}", "label": f"n{n}", "parameters": n, "tokens": d, "flops": 6.0 * n * d}
                row |= {"run": f"n{n}-s{run_seed}", "seed": run_seed, "kind": "end", "commit": "0a1b2c"}
                made.append(row | {"loss": clean * float(np.exp(noise * rng.standard_normal()))})
    return made


def write(folder: Path, made: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


def main(arguments: list[str]) -> int:
    """The entry point in this process, for speed; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["scaling", *arguments])
        with pytest.raises(SystemExit) as ended:
            run_module("scaling", run_name="__main__")
    return ended.value.code


def report(folder: Path, **options) -> dict:
    table = folder / "results.jsonl"
    return assemble(table, columns_of(table), ReportRequest(HOFFMANN, **{"draws": 100, **options}))


class Page(HTMLParser):
    """Collects what the tests look at; `problems` are tags that do not close in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.problems, self.words, self.links, self.values = [], [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open += [] if tag in self.VOID else [tag]
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data", "style")]
        self.values += [float(value) for name, value in attrs if (tag, name) == ("data", "value")]
        self.problems += [name for name, _ in attrs if name.startswith("on")]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(tag)

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module", autouse=True)
def small():
    """Few budgets along a curve, few pixels: the time of a test is in both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(content, "CURVE", 2)
        patch.setattr(figures, "DPI", 40)
        yield


@pytest.fixture(scope="module")
def faulty(tmp_path_factory, small):
    """A written report: one run diverged, one with hostile texts is missing, another is hostile and fitted, one is far
    off."""
    made = rows(seed=1)
    made[7] |= {"loss": None, "fault": "diverged: train/loss was nan at step 412"}
    made[20] |= {"loss": None, "fault": f"missing: {HOSTILE}"}
    made[40]["loss"] *= 1.05
    made[40]["label"] = made[3]["label"] = made[3]["commit"] = HOSTILE
    folder = write(tmp_path_factory.mktemp("report") / "a <b> & c", made)
    (folder / "sweep.yaml").write_text(f"name: x # {HOSTILE}\n")
    assert main(["report", str(folder), "--bootstrap", "100", "--seed", "3"]) == 0
    return folder


def test_page_is_whole_and_safe(faulty):
    text = (faulty / "report.html").read_text()
    page, said = Page(text), "".join(Page(text).words)
    assert page.open == []
    assert page.problems == []
    assert not {"script", "link", "iframe", "object", "form", "a"} & set(page.tags)
    assert page.links  # every figure
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "@import" not in text
    assert "url(" not in text
    assert "<b>" not in text
    for words in ("diverged: train/loss was nan at step 412", f"missing: {HOSTILE}", f"name: x # {HOSTILE}"):
        assert words in said
    assert said.count(HOSTILE) >= 5  # labels, commit, outlier, reason, sweep.yaml
    assert "line 41" in said
    assert "--bootstrap 100 --seed 3" in said


def test_warnings_stand_at_the_top(faulty):
    text, result = (faulty / "report.html").read_text(), json.loads((faulty / "report.json").read_text())
    top = "".join(Page(text[: text.index("Loss against compute")]).words)
    assert set(result["analysis"]["warnings"]) <= set(result["warnings"])
    assert "2 of 54 rows are refused" in top
    assert all(warning in top for warning in result["warnings"])


def test_headline_is_the_analysis(faulty):
    result = json.loads((faulty / "report.json").read_text())["analysis"]
    table = read_table(faulty / "results.jsonl", {k: v for k, v in AS_COLLECTED.items() if k != "run"})
    table = table.ordered()
    again = fit(HOFFMANN, table.columns, table.columns["loss"], budget=10 * table.columns["C"].max())
    assert {name: one["value"] for name, one in result["fit"]["quantities"].items()} == again.quantities
    expected = {result["budget"], result["budget"] / max(row["flops"] for row in rows())}
    for name in ("N", "D", "D/N", "loss"):
        one = result["fit"]["quantities"][f"{name} at budget"]
        expected |= {one["value"], *one["interval80"]}
    said = set(Page((faulty / "report.html").read_text()).values)
    assert sorted(said) == pytest.approx(sorted(expected), rel=1e-12)


@pytest.mark.long
def test_the_same_table_gives_the_same_bytes(faulty, tmp_path):
    before = {path.relative_to(faulty): path.read_bytes() for path in faulty.rglob("*") if path.is_file()}
    assert main(["report", str(faulty), "--bootstrap", "100", "--seed", "3", "--out", str(tmp_path)]) == 0
    after = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == {name: content for name, content in before.items() if name in after}
    assert len(after) == len(before) - 2  # the table and the sweep


def test_figures_are_pictures(faulty):
    from matplotlib.image import imread

    files = sorted((faulty / "figures").glob("*.png"))
    residuals = ["residuals_c", "residuals_d", "residuals_n"]
    names = ["d_opt", "extrapolation", "extrapolation_error", "floor_profile", "isoflop", "loss_compute", "n_opt"]
    assert [file.stem for file in files] == sorted(names + residuals)
    for file in files:
        picture = imread(file)
        assert picture.shape[0] > 100
        assert picture[..., :3].std() > 0.01  # something is drawn


def test_sections_say_why_they_are_not_there(tmp_path):
    two = report(write(tmp_path / "two", rows(budgets=BUDGETS[::4])), draws=0)
    assert two["absent"]["power law"] == "fewer than 3 budgets have an interior minimum"
    assert two["absent"]["extrapolation"].startswith("2 budgets")
    assert two["isoflop"]["line"] == []
    plain = [{k: row[k] for k in ("parameters", "tokens", "loss")} for row in rows() if row["seed"] == 0]
    alone = report(write(tmp_path / "alone", plain), draws=0)
    assert alone["absent"].keys() == {"isoflop", "extrapolation", "seeds"}
    assert any("no bootstrap" in warning for warning in alone["warnings"])


def test_the_largest_budget_is_held_out(tmp_path):
    found = report(write(tmp_path / "five", rows()), draws=0)
    held = found["analysis"]["holdout"]
    assert found["held_out_group"] == ["8e+12"]
    assert (held["fitted_runs"], len(held["runs"])) == (48, 6)
    seeds = found["seeds"]
    assert (len(seeds["sizes"]), seeds["degrees_of_freedom"]) == (12, 24)
    assert seeds["spread"] == pytest.approx(0.003, rel=0.4)
    assert seeds["residuals_over_spread"] == pytest.approx(1, abs=0.5)


@pytest.mark.long
def test_the_bands_hold_the_truth(tmp_path):
    """At the budget and along the curve; by chance each 80% band misses the truth once in five."""
    inside, wide = [], []
    for seed in range(3):
        found = report(write(tmp_path / str(seed), rows(seed)), holdout_above=5e12)
        budget, points = found["headline"]["budget"], found["analysis"]["curve"]
        for point in points:
            n = best_n(point["C"])
            truth = {"N": n, "D": point["C"] / 6 / n}
            truth["loss"] = float(predict(HOFFMANN, TRUTH, truth))
            for name, value in truth.items():
                low, narrow_low, narrow_high, high = sorted([*point[name]["interval80"], *point[name]["interval95"]])
                inside.append(narrow_low <= value <= narrow_high)
                wide.append(low <= value <= high)
        at = next(point for point in points if point["C"] == pytest.approx(budget))
        for name in ("N", "D", "loss"):
            assert at[name]["value"] == pytest.approx(found["headline"][name]["value"])
            assert at[name]["interval80"] == pytest.approx(found["headline"][name]["interval80"], rel=0.01)
    assert np.mean(inside) >= 0.6
    assert np.mean(wide) >= 0.8


@pytest.mark.parametrize(
    ("made", "arguments", "message"),
    [
        (None, (), "there is no"),
        ([], (), "holds no rows"),
        (rows()[:24:5], (), "hoffmann has 5 parameters and needs 6 runs or more; got 5"),
        (rows(), ("--budget", "0"), "--budget 0 must be above 0"),
        (rows(), ("--bootstrap", "10"), "10 bootstrap draws cannot tell"),
        (rows(), ("--holdout-above", "1e20"), "leaves 54 runs to fit and 0 to predict"),
        (rows(), ("--law", "step_time"), "needs --flops, --devices, --bytes"),
        (rows(), ("--n", "size"), "has no column size"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, made, arguments, message, capsys):
    folder = tmp_path / "experiment"
    write(folder, made) if made is not None else folder.mkdir()
    assert main(["report", str(folder), "--bootstrap", "0", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (folder / "report.html").exists()


def test_wandb_gets_one_artifact_and_two_tables(faulty, tmp_path):
    from wandb.proto.wandb_internal_pb2 import Record

    from scaling.commands.report import FIGURES, NUMBERS, PAGE, publish
    from scaling.sweep.wandb_files import records

    figures, made = sorted((faulty / FIGURES).glob("*.png")), json.loads((faulty / NUMBERS).read_text())
    copies = {path: (tmp_path / path.relative_to(faulty)) for path in (faulty / PAGE, faulty / NUMBERS)}
    for path, copy in copies.items():
        copy.write_bytes(path.read_bytes())
    publish(made, figures, tmp_path, faulty / "results.jsonl", "offline", "isomesh")
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    found, deadline = [], time.monotonic() + 30
    while not any(record.HasField("exit") for record in found) and time.monotonic() < deadline:
        time.sleep(0.05)  # W&B's own process writes the end of the file after `finish` has returned
        try:
            found = [Record.FromString(data) for data in records(file)]
        except ValueError:  # half written
            continue
    logged, tables = {}, set()
    for record in found:
        if record.HasField("artifact"):
            logged[record.artifact.type] = {entry.path for entry in record.artifact.manifest.contents}
        tables |= {item.key or item.nested_key[0] for item in record.history.item}
    pictures = {f"{FIGURES}/{figure.name}" for figure in figures}
    assert logged["scaling-report"] == {PAGE, NUMBERS, "results.jsonl", "sweep.yaml", *pictures}
    assert {"runs", "coefficients"} <= tables


def test_without_matplotlib_it_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = write(tmp_path / "experiment", rows())
    assert main(["report", str(folder), "--bootstrap", "0"]) == 2
    assert "install the extra `dev`" in capsys.readouterr().err
