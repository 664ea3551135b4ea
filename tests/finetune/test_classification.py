"""Classification: the same on every mesh, metrics as scikit-learn has them, and a run from weights to a page."""

import asyncio
import contextlib
import functools
import json
import random
import re
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
import yaml
from every import few_of
from sklearn import metrics as reference
from tuning import ENCODER, SMALL, assert_same, trace

from compress.__main__ import main as compress
from compress.options import parse as compress_options
from config.compose import load
from evaluation.__main__ import main as evaluation
from evaluation.options import parse
from evaluation.results import read_result
from finetune.metrics import confusion_of, labels_report, matthews, multilabel_report, pearson
from finetune.opening import open_subject
from finetune.table import is_heldout, read_rows
from inference.opening import adaptation_of, new_head
from parallel.mesh import make_mesh
from runtime.arguments import Parser
from serving.app import create_app
from serving.batch import Owner, call
from serving.opening import add_model, open_service
from training.parity import ONE_DEVICE

DONE = 0
GOOD, BAD = ("fine", "great", "lovely"), ("dull", "awful", "weak")
KINDS = {
    "one": [],
    "several": ["task.options.kind=several", "task.options.separator=|"],
    "regression": ["task.options.kind=regression"],
    "pair": ["task.columns.pair=other"],
}


def label_of(kind: str, draw: random.Random, words: list[str]) -> str:
    good = sum(word in GOOD for word in words)
    if kind == "several":
        return "|".join(name for name, there in (("good", good), ("bad", len(words) - good)) if there)
    return str(good) if kind == "regression" else ("good" if good * 2 > len(words) else "bad")


@functools.cache
def table(kind: str) -> Path:
    """Eighty short texts with labels that follow from their words."""
    draw, path = random.Random(0), Path(tempfile.mkdtemp()) / f"{kind}.csv"
    lines = ["text,other,label"]
    for number in range(80):
        words = draw.choices(GOOD + BAD, k=3)
        lines.append(f"{' '.join(words)} {number},{draw.choice(GOOD)},{label_of(kind, draw, words)}")
    path.write_text("\n".join(lines) + "\n")
    return path


def arguments(kind: str, model=ENCODER) -> list[str]:
    return ["task=classification", f"task.path={table(kind)}", "task.heldout=0.2", *model, *KINDS[kind]]


DECODER = (*SMALL, "model.bias=none")
CASES = [
    ("one", "encoder", {"data": 2, "fsdp": 2, "tensor": 2}),
    ("one", "encoder", {"pipe": 2, "data": 2}),
    ("pair", "encoder", {"fsdp": 2, "context": 2}),
    ("regression", "decoder", {"context": 2, "data": 2}),
]


@functools.cache
def one_device(kind: str, model: str):
    return trace(arguments(kind, ENCODER if model == "encoder" else DECODER))


@pytest.mark.parametrize(("kind", "model", "mesh"), few_of(CASES, [CASES[1], CASES[3]]), ids=str)
def test_the_mesh_changes_nothing(kind, model, mesh):
    assert_same(trace(arguments(kind, ENCODER if model == "encoder" else DECODER), **mesh), one_device(kind, model))


def test_metrics_are_those_of_scikit_learn():
    draw, labels = np.random.default_rng(0), ("a", "b", "c", "d")
    truth, said = draw.integers(0, 3, 200), draw.integers(0, 4, 200)
    confusion = confusion_of(truth, said, 4)
    np.testing.assert_array_equal(confusion, reference.confusion_matrix(truth, said, labels=range(4)))
    found, by_label = labels_report(confusion, labels)
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(truth, said))
    assert found["f1_macro"] == pytest.approx(reference.f1_score(truth, said, average="macro", zero_division=0))
    assert matthews(confusion) == pytest.approx(reference.matthews_corrcoef(truth, said))
    theirs = reference.precision_recall_fscore_support(truth, said, labels=range(4), zero_division=0)
    for place, kind in enumerate(("precision", "recall", "f1", "support")):
        np.testing.assert_allclose([by_label[label][kind] for label in labels], theirs[place])
    truth, said = draw.random((50, 4)) < 0.3, draw.random((50, 4)) < 0.4
    found, _ = multilabel_report(truth, said, labels)
    for average in ("micro", "macro"):
        theirs = reference.f1_score(truth, said, average=average, zero_division=0)
        assert found[f"f1_{average}"] == pytest.approx(theirs)
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(truth, said))
    x, y = draw.random(30), draw.random(30)
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])


def test_parts_of_a_batch_do_not_matter():
    """Accumulation cuts the batch, and the padding of a last held-out batch counts nothing."""
    cut = trace([*arguments("one"), "train.grad_accumulation=4"])
    assert_same(cut, one_device("one", "encoder"))
    whole = trace([*arguments("one"), "train.eval_batches=1000"], steps=1)
    again = trace([*arguments("one"), "train.grad_accumulation=2"], steps=1)
    assert whole.metrics == pytest.approx(again.metrics)


# -------------------------------------------------------------------------------------------------------- a whole run


def run_of(directory: Path, *more: str) -> list[str]:
    shared = [*arguments("one"), f"train.steps={runs.STEPS}", "train.log_every=1", "train.eval_every=8"]
    shared += ["runtime.platform=cpu", "runtime.compile_cache=null", "wandb.mode=disabled", "optimizer.lr=3e-3"]
    return [
        *shared,
        "checkpoint.every=12",
        "checkpoint.keep=9",
        "checkpoint.keep_best=0",
        f"run.dir={directory}",
        *more,
    ]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """A run on a mesh of four, to its end."""
    directory = tmp_path_factory.mktemp("tuned") / "run"
    assert runs.run(run_of(directory, "mesh.fsdp=2", "mesh.data=2"), devices=4) == DONE
    return directory


def accuracies(directory: Path) -> dict[int, float]:
    return {line["step"]: line["eval/accuracy"] for line in runs.lines(directory) if "eval/accuracy" in line}


def test_a_run_goes_on_bitwise_and_elsewhere_within_rounding(tuned, tmp_path):
    alone, half = tmp_path / "alone", tmp_path / "half"
    assert runs.run(run_of(alone), devices=1) == DONE
    shutil.copytree(alone, half)  # as if it had been killed after step 12
    shutil.rmtree(half / "checkpoints" / f"{runs.STEPS:08d}")
    assert runs.run(run_of(half), devices=1) == DONE
    assert runs.losses(half) == runs.losses(alone)
    runs.assert_same_arrays(runs.checkpoint(half, runs.STEPS), runs.checkpoint(alone, runs.STEPS))
    runs.assert_near(runs.losses(tuned), runs.losses(alone))
    assert accuracies(tuned) == pytest.approx(accuracies(alone))
    assert accuracies(tuned)[runs.STEPS] > 0.9  # it has learned


def test_the_best_checkpoint_is_by_the_metric_of_the_task(tuned):
    progress = runs.record(tuned, runs.STEPS)["progress"]
    assert progress["best"] == -max(accuracies(tuned).values())
    config = runs.saved_config(tuned)
    assert config["task"]["labels"] == ["bad", "good"]
    assert (config["model"]["head"], config["model"]["labels"]) == ("classes", 2)


def test_other_rows_are_another_run(tuned, tmp_path, capsys):
    path = tmp_path / "one.csv"
    path.write_text(table("one").read_text() + "one more,fine,good\n")
    assert (
        runs.run([*run_of(tuned, "mesh.fsdp=2", "mesh.data=2", "train.steps=30"), f"task.path={path}"], devices=4) == 2
    )
    assert "task.path" in capsys.readouterr().err


def test_evaluation_knows_the_task_and_writes_a_page(tuned, capsys):
    with contextlib.chdir(runs.ROOT):
        assert evaluation(parse([str(tuned), "wandb.mode=disabled", "runtime.cpu_devices=8", "mesh.data=2"])) == DONE
    result = read_result(tuned / "evaluation" / f"task-{runs.STEPS}.json").tasks["task"]
    assert result.metrics["accuracy"].value == pytest.approx(accuracies(tuned)[runs.STEPS])
    assert result.metrics["accuracy"].stderr is not None
    page = (tuned / "evaluation" / f"task-{runs.STEPS}.html").read_text()
    for part in ("Confusion", "By label", "f1_macro", "good"):
        assert part in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["int4", "int4-gptq"])
def test_made_small_it_is_told_what_that_costs_the_task(tuned, tmp_path, recipe, capsys):
    """The metrics before are those of the run, those after what python -m evaluation finds of the folder."""
    words = ["--recipe", recipe, "--group", "8", "--samples", "8", "--length", "32", "runtime.cpu_devices=8"]
    small = tmp_path / "small"
    with contextlib.chdir(runs.ROOT):
        assert compress(compress_options([str(tuned), str(small), *words, "mesh.data=2"])) == DONE
        assert evaluation(parse([str(small), "wandb.mode=disabled", "runtime.cpu_devices=8", "mesh.data=2"])) == DONE
    cost, told = json.loads((small / "cost.json").read_text()), capsys.readouterr().out
    assert cost["before"]["task"]["accuracy"] == pytest.approx(accuracies(tuned)[runs.STEPS])
    result = read_result(next((small / "evaluation").glob("task*.json"))).tasks["task"]
    for name in ("accuracy", "loss"):
        assert result.metrics[name].value == pytest.approx(cost["after"]["task"][name], rel=1e-5)
    assert cost["before"]["task"]["loss"] != cost["after"]["task"]["loss"]
    calibration = cost["provenance"]["calibration"]
    assert calibration == ({"source": "task", "path": str(table("one"))} if recipe == "int4-gptq" else None)
    assert f"| accuracy of {cost['rows']} rows of its task |" in told


def test_what_a_run_has_learned_is_served(tuned):
    """/v1/classify answers the held-out rows with the accuracy that the run measured; probabilities sum to 1."""
    parser = Parser()
    add_model(parser)
    service = open_service(
        parser.parse_args([str(tuned), "runtime.cpu_devices=8", "mesh.data=2", "--max-running", "4"])
    )
    rows = read_rows(str(table("one")), {"text": "text", "label": "label"}, (), "task.path")
    rows = [row for row in rows if is_heldout(row, 0.2)]
    try:
        body = json.dumps({"input": [row.text("text") for row in rows]}).encode()
        status, _, told = asyncio.run(call(create_app(service, Owner()), "/v1/classify", body))
        assert status == 200, told
        assert service.engine.state().compiles == 0
    finally:
        service.engine.stop(0)
    data = json.loads(told)["data"]
    assert all(sum(one["probs"]) == pytest.approx(1) and one["num_classes"] == 2 for one in data)
    assert all(max(one["probabilities"], key=one["probabilities"].get) == one["label"] for one in data)
    right = [one["label"] == row.text("label") for one, row in zip(data, rows, strict=True)]
    assert sum(right) / len(right) == pytest.approx(accuracies(tuned)[runs.STEPS])


def test_a_head_is_new_where_the_weights_have_another(tuned, tmp_path):
    """From a run with two labels to one with other labels: the body is that run's, the head is drawn anew."""
    begun = tmp_path / "begun"
    own = [argument for argument in run_of(begun) if not argument.startswith("model.")]
    several = [
        f"task.path={table('several')}",
        *KINDS["several"],
        "train.steps=1",
        "optimizer.lr=0",
        "checkpoint.every=1",
    ]
    assert runs.run([*own, f"model.from={tuned}", "task.labels=[bad,good,neither]", *several], devices=1) == DONE
    ours, theirs = runs.checkpoint(begun, 1), runs.checkpoint(tuned, runs.STEPS)
    for name, array in theirs.items():
        if name.startswith("params/") and "head_" not in name:
            np.testing.assert_array_equal(ours[name], array, err_msg=name)
    assert ours["params/head_labels/weight"].shape == (32, 3)
    assert np.any(ours["params/head_labels/weight"])


def test_a_new_head_is_trained_and_kept_where_all_else_is_frozen(tuned, tmp_path, capsys):
    """Of a run with adapter=freeze it is in the checkpoints, so that the run goes on and is judged."""
    run = tmp_path / "run"
    own = [argument for argument in run_of(run) if not argument.startswith("model.")]
    own += [f"model.from={tuned}", "adapter=freeze", "task.labels=[bad,good,neither]", "train.eval_every=0"]
    for steps in (1, 2):
        assert runs.run([*own, f"train.steps={steps}"], devices=1) == DONE
    assert "new in this model: head_labels" in capsys.readouterr().out
    before, after = (runs.checkpoint(run, step) for step in (1, 2))
    assert {name for name in after if name.startswith("params/")} == {
        "params/final_norm/scale",
        "params/head_labels/bias",
        "params/head_labels/weight",
    }
    assert np.any(before["params/head_labels/weight"] != after["params/head_labels/weight"])
    with contextlib.chdir(runs.ROOT):
        assert evaluation(parse([str(run), "wandb.mode=disabled", "runtime.cpu_devices=8", "mesh.data=2"])) == DONE


@pytest.mark.parametrize("adapter", ["freeze", "lora", "bottleneck"])
def test_a_new_head_for_masked_tokens_is_trained(tuned, adapter):
    config = load(words := ["task=masked_lm", f"model.from={tuned}", f"adapter={adapter}", "train.seq_len=32"])
    assert set(new_head(config)) == {"head_dense", "head_norm", "head_bias"}
    trained = adaptation_of(config).trainable
    assert all(trained(name) for name in ("head_dense/weight", "head_norm/scale", "head_bias"))
    assert not trained("layers/ffn/up/weight")
    if adapter == "lora":
        config = load([*words, "adapter.base=bfloat16", "model.tied_embeddings=false"])
        with pytest.raises(ValueError, match=r"adapter.base=bfloat16: the output table is new and trained in float32"):
            adaptation_of(config)


def test_labels_keep_their_places_in_a_head_by_their_names(tuned, tmp_path):
    """Of the same labels a head is taken over, in its order; of others it is new, though there are as many."""
    others = tmp_path / "others.csv"
    others.write_text(table("one").read_text().replace(",good\n", ",amazing\n").replace(",bad\n", ",terrible\n"))
    turned, settings = tmp_path / "turned", runs.saved_config(tuned)
    turned.mkdir()
    settings["task"]["labels"], settings["checkpoint"]["dir"] = ["good", "bad"], str(tuned / "checkpoints")
    (turned / "config.yaml").write_text(yaml.safe_dump(settings))

    def begun(base: Path, *more: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The labels of a run from these weights, and what is new in it."""
        own = [word for word in arguments("one") if not word.startswith("model.")]
        config = load([*own, f"model.from={base}", *more])
        mesh = make_mesh(ONE_DEVICE, jax.devices()[:1])
        with jax.set_mesh(mesh):
            config = open_subject(config, mesh).config
        return config.task.labels, new_head(config)

    assert begun(tuned) == (("bad", "good"), ())
    assert begun(turned) == (("good", "bad"), ())
    assert begun(tuned, "task.labels=[good,bad]") == (("good", "bad"), ("head_labels",))
    assert begun(tuned, f"task.path={others}") == (("amazing", "terrible"), ("head_labels",))
