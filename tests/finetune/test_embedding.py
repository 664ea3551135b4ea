"""Contrastive vectors: the whole batch as negatives on whatever mesh, the loss as NumPy has it."""

import functools
import random
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from tuning import ENCODER, assert_same, trace

from config import compose
from finetune.judge import Answers
from finetune.opening import encoded, open_subject, open_task, read_sides
from finetune.table import Row
from finetune.task import Example
from inference.encoder import Encoder
from inference.opening import Opened
from inference.requests import EncodeRequest
from model.transformer import describe
from parallel.mesh import make_mesh
from training.job import make_job
from training.parity import ONE_DEVICE
from training.step import hidden


@functools.cache
def table() -> Path:
    """Words and their opposites' opposites."""
    draw, path = random.Random(0), Path(tempfile.mkdtemp()) / "pairs.csv"
    words = ["".join(draw.choices("abcdefgh", k=5)) for _ in range(60)]
    path.write_text(
        "\n".join(["text,positive,wrong", *(f"{word},{word[::-1]},{draw.choice(words)}" for word in words)])
    )
    return path


def arguments(*more: str) -> list[str]:
    return ["task=embedding", f"task.path={table()}", "task.heldout=0.2", *ENCODER, "train.batch_size=8", *more]


one_device = functools.cache(lambda *more: trace(arguments(*more)))
NEGATIVES = "task.columns.negative=wrong"


@pytest.mark.long
@pytest.mark.parametrize(("mesh", "more"), [({"data": 2, "context": 2, "tensor": 2}, (NEGATIVES,))], ids=str)
def test_the_mesh_changes_nothing(mesh, more):
    assert_same(trace(arguments(*more), **mesh), one_device(*more))


def test_the_loss_is_that_of_choosing_the_partner_among_all():
    config = compose.load(arguments(NEGATIVES))
    with jax.set_mesh(mesh := make_mesh(ONE_DEVICE, jax.devices()[:1])):
        subject = open_subject(config, mesh)
        job = make_job(subject.config, mesh, loss=subject.loss)
        batch, params = subject.feed.batch(0), job.init(0).params
        model, x_BTD, _ = hidden(job.description, config.train, params, batch)
        found = subject.loss(model, x_BTD, batch, config.train)
        x, segments = np.asarray(x_BTD, np.float64), np.asarray(batch["segments_BT"])
    part = lambda k: np.stack([v[s == k].mean(0) for v, s in zip(x, segments, strict=True)])
    text, partner, wrong = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in map(part, (1, 2, 3)))
    log_softmax = lambda scores: scores - np.log(np.exp(scores).sum(1, keepdims=True))
    forth = -np.diag(log_softmax(text @ np.concatenate([partner, wrong]).T / 0.05))
    back = -np.diag(log_softmax(partner @ text.T / 0.05))
    assert float(found.nll) == pytest.approx(float((forth + back).sum() / 2), rel=1e-5)


def test_vectors_are_served_as_they_are_trained(tmp_path):
    """The server's encoder gives each text by itself the vector that it has in training, beside its partner."""
    config = compose.load(arguments())
    with jax.set_mesh(mesh := make_mesh(ONE_DEVICE, jax.devices()[:1])):
        subject = open_subject(config, mesh)
        job = make_job(subject.config, mesh, loss=subject.loss)
        batch, params = subject.feed.batch(0), job.init(0).params
        model, x_BTD, _ = hidden(job.description, config.train, params, batch)
        trained_BKD = np.asarray(open_task(config).answers(model, x_BTD, batch, config.train)["vectors_BX"])
    about = subject.config, subject.tokenizer, mesh, job.description, params, np.dtype("float32")
    encoder = Encoder(Opened(tmp_path, *about, None, "digest"), 1, 16)
    encoder.compile()
    tokens_BT, segments_BT = np.asarray(batch["tokens_BT"]), np.asarray(batch["segments_BT"])
    for row in range(len(tokens_BT)):
        for part in (1, 2):
            tokens = tuple(tokens_BT[row, segments_BT[row] == part].tolist())
            (served,) = encoder.run([EncodeRequest("", tokens)])
            np.testing.assert_allclose(served, trained_BKD[row, part - 1], rtol=0, atol=2e-6)


def test_the_loss_of_held_out_rows_is_that_of_the_same_batches_on_any_mesh():
    """Of two sequences each, on a mesh that has four in a batch at least."""
    config = compose.load(arguments("train.batch_size=2"))
    task, description, found = open_task(config), describe(config.model), []
    table = encoded(task, read_sides(config.task, task)[1][:5], "held-out")
    for data in (1, 4):
        with jax.set_mesh(make_mesh(ONE_DEVICE | {"data": data}, jax.devices()[:data])):
            params = jax.jit(description.init)(jax.random.key(0))
            loss, judgement = Answers(task, description, config.train, table).judgement(params)
            found.append({"loss": loss} | judgement.metrics)
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_cut_batch_is_refused():
    with pytest.raises(ValueError, match="compares the sequences of a whole batch"):
        trace(arguments("train.grad_accumulation=2"))


def test_ranks_of_partners():
    """Two rows with one partner in the same words share it; a text whose partner is second has the rank 2."""
    task = open_task(compose.load(arguments()))
    rows = [Row(f"a:{i}", {"text": t, "positive": p}) for i, (t, p) in enumerate([("a", "A"), ("b", "B"), ("a2", "A")])]
    examples = [Example(i, {}) for i in range(3)]
    east, north = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    vectors = np.stack([np.stack([east, east]), np.stack([(2 * east + north) / 5**0.5, north]), np.stack([east, east])])
    judgement = task.judge(rows, examples, {"vectors_BX": vectors})
    assert judgement.metrics == pytest.approx({"mrr": (1 + 1 / 2 + 1) / 3, "recall_at_1": 2 / 3, "recall_at_5": 1})


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_vectors_that_are_all_the_same_find_nothing(value):
    task = open_task(compose.load(arguments()))
    rows = [Row(f"a:{i}", {"text": str(i), "positive": f"p{i}"}) for i in range(10)]
    vectors = np.full((10, 2, 4), value, np.float32)
    judgement = task.judge(rows, [Example(i, {}) for i in range(10)], {"vectors_BX": vectors})
    assert judgement.metrics == pytest.approx({"mrr": 1 / 10, "recall_at_1": 0, "recall_at_5": 0})
    assert all(one.answer != one.truth for one in judgement.judged)
