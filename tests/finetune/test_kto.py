"""Answers that are good or bad: the loss of the paper, a point of reference that no mesh changes."""

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every import few_of
from test_chat_task import folder
from tuning import SMALL, assert_same, trace

from config import compose
from finetune.opening import open_subject, open_task
from finetune.table import LeftOut, Row
from finetune.tasks.kto import Options, kto_losses, moved, next_other
from parallel.mesh import make_mesh
from training.job import make_job
from training.parity import ONE_DEVICE
from training.step import hidden


@functools.cache
def table() -> Path:
    path = Path(tempfile.mkdtemp()) / "answers.csv"
    rows = [f"ask {i // 2},{('yes ', 'no ')[i % 2] * (1 + i % 3)},{('true', 'False')[i % 2]}" for i in range(60)]
    path.write_text("\n".join(["prompt,completion,label", *rows]))
    return path


def arguments(*more: str) -> list[str]:
    return ["task=kto", f"task.path={table()}", "task.heldout=0.2", *SMALL, "train.seq_len=64", *more]


STEPS = 4  # the point of reference is 0 until the model has moved
FAST = "optimizer.lr=1e-2"
one_device = functools.cache(lambda: trace(arguments(FAST), steps=STEPS))


MESHES = [{"data": 2, "context": 2, "tensor": 2}, {"fsdp": 4, "context": 2}]


@pytest.mark.long
@pytest.mark.parametrize("mesh", few_of(MESHES, MESHES[1:]), ids=str)
def test_the_mesh_changes_nothing(mesh):
    assert_same(trace(arguments(FAST), steps=STEPS, **mesh), one_device())


def test_it_learns_and_begins_where_the_reference_is():
    """The first loss is half of the weights, and then good answers gain more than bad ones."""
    assert one_device().losses[0] == pytest.approx(0.5, rel=1e-6)
    assert one_device().losses[-1] < 0.5
    assert one_device().metrics["margin"] > 0
    assert one_device().metrics["kl"] >= 0


def by_hand(said, reference, foreign, foreign_reference, good, beta, weights):
    """Equations 7 and 8 of 2402.01306 in numpy, float64."""
    z0 = max(0.0, float(np.mean(foreign - foreign_reference)))
    reward = said - reference
    sigma = lambda x: 1 / (1 + np.exp(-x))
    value = np.where(good, weights[0] * sigma(beta * (reward - z0)), weights[1] * sigma(beta * (z0 - reward)))
    return np.where(good, *weights) - value


@pytest.mark.parametrize("shift", [0.8, -0.8], ids=["moved away", "clipped at 0"])
def test_losses_are_those_of_the_paper(shift):
    draw = np.random.default_rng(0)
    said, reference, foreign, foreign_reference = draw.normal(-20, 5, (4, 16))
    foreign = foreign_reference + draw.normal(shift, 0.1, 16)
    good, o = draw.random(16) < 0.6, Options(beta=0.3, desirable=1.2, undesirable=0.7)
    gained = np.stack([said - reference, foreign - foreign_reference], -1)
    expected = by_hand(said, reference, foreign, foreign_reference, good, 0.3, (1.2, 0.7))
    found = kto_losses(o, jnp.asarray(gained), jnp.asarray(good, jnp.float32), jnp.ones(16))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # a batch that is filled up with what does not count has the same point of reference
    filled, counts = np.concatenate([gained, gained[:4] + 9]), np.repeat([1.0, 0.0], [16, 4])
    assert float(moved(jnp.asarray(filled), jnp.asarray(counts))) == pytest.approx(max(0, shift), abs=0.1)
    more = kto_losses(o, jnp.asarray(filled), jnp.asarray(np.r_[good, good[:4]], jnp.float32), jnp.asarray(counts))
    np.testing.assert_allclose(more[:16], expected, rtol=1e-5)


def test_the_point_of_reference_has_no_gradient():
    gained, good = jnp.array([[0.5, 0.3], [-0.2, 0.9]]), jnp.array([1.0, 0.0])
    total = lambda gained: kto_losses(Options(), gained, good, jnp.ones(2)).sum()
    gradient = np.asarray(jax.grad(total)(gained))
    assert (gradient[:, 1] == 0).all()
    assert gradient[0, 0] < 0 < gradient[1, 0]  # what is good is to become likelier, what is bad less likely


def test_foreign_answers_are_those_of_other_prompts():
    assert next_other(["a", "a", "b", "c", "c"]) == [2, 2, 3, 0, 0]
    assert next_other(["a", "a", "a"]) == [1, 2, 0]
    task = open_task(compose.load(arguments()))
    said = (("x", "1"), ("x", "2"), ("y", "3"))
    rows = [Row(f"a:{i}", {"prompt": p, "completion": c, "label": i % 2}) for i, (p, c) in enumerate(said)]
    made = task.encode(rows, LeftOut())
    for number, (own, foreign) in enumerate((("x1", "x3"), ("x2", "x3"), ("y3", "y1"))):
        arrays = made[number][0].arrays
        for segment, text in ((1, own), (2, foreign)):
            mine = arrays["segments_T"] == segment
            assert bytes(arrays["tokens_T"][mine].tolist()).decode() == text
            assert arrays["said_T"][mine].tolist() == [1, 1]  # of "3" and the end, behind the prompt's letter
        assert arrays["good_X"].tolist() == [number % 2]


def test_the_foreign_answer_of_a_dialogue_is_the_last_message_of_another():
    """Of whole dialogues as of prompts in a column of their own."""
    task = open_task(compose.load([*arguments("train.seq_len=128"), "tokenizer=file", f"tokenizer.path={folder()}"]))
    user, says = ((lambda text, role=role: {"role": role, "content": text}) for role in ("user", "assistant"))
    whole = [{"completion": [user(p), says(c)]} for p, c in ("13", "24")]
    apart = [{"prompt": p, "completion": [says(c)]} for p, c in ("13", "24")]
    for rows in (whole, apart):
        made = task.encode([Row("a:1", row | {"label": True}) for row in rows], LeftOut())
        for (example,), digits in zip(made, ("1314", "2423"), strict=True):
            said = [chr(i) for i in example.arrays["tokens_T"].tolist()]
            assert "".join(filter(str.isdigit, said)) == digits


@pytest.mark.long
def test_the_step_asks_the_model_for_each_answer_alone():
    """The loss of a batch is that of log-probabilities of prompts and answers that are read one by one."""
    with jax.set_mesh(mesh := make_mesh(ONE_DEVICE, jax.devices()[:1])):
        subject = open_subject(compose.load(arguments("train.batch_size=4")), mesh)
        job = make_job(subject.config, mesh, loss=subject.loss)
        first, later = job.init(0).params, job.init(1).params
        with tempfile.TemporaryDirectory() as folder:
            subject.begin(job, lambda: first, Path(folder))
        batch, task = subject.feed.batch(0), subject.loss.__self__

        def alone(params):
            """(sequences, 2) log-probabilities, every answer in a sequence of its own."""
            said = []
            for k in (1, 2):
                for row in range(len(batch["tokens_BT"])):
                    mine = np.asarray(batch["segments_BT"][row]) == k
                    tokens, targets = (np.asarray(batch[name][row])[mine] for name in ("tokens_BT", "targets_BT"))
                    counts = np.asarray(batch["said_BT"][row])[mine] > 0
                    model, x_BTD, _ = hidden(
                        job.description, job.train, params, {"tokens_BT": jnp.asarray(tokens[None])}
                    )
                    logits = np.asarray(model.logits(x_BTD)[0], np.float64)
                    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                    said.append(log_p[np.arange(len(targets)), targets][counts].sum())
            return np.reshape(said, (2, -1))

        model, x_BTD, _ = hidden(job.description, job.train, later, batch)
        found = float(task.loss(model, x_BTD, batch, job.train).nll)
        (said, foreign), (reference, foreign_reference) = alone(later), alone(first)
        good = np.asarray(batch["good_BX"])[:, 0] > 0
        expected = by_hand(said, reference, foreign, foreign_reference, good, 0.1, (1.0, 1.0)).sum()
        assert found == pytest.approx(expected, rel=1e-4)


def test_what_cannot_be_used_is_told():
    task, left_out = open_task(compose.load(arguments())), LeftOut()
    rows = [
        Row("a:1", {"completion": "a", "label": "maybe"}),
        Row("a:2", {"completion": " ", "label": "true"}),
        Row("a:3", {"completion": "b", "label": "true"}),
    ]
    assert task.encode(rows, left_out) == [[], [], []]
    for said in ("with a label that is none of true, 1, false, 0", "no completion", "without another row"):
        assert said in left_out.told()


def test_a_batch_is_not_cut():
    config = compose.load(arguments("train.grad_accumulation=2"))
    with jax.set_mesh(mesh := make_mesh(ONE_DEVICE, jax.devices()[:1])), pytest.raises(ValueError, match="whole batch"):
        open_subject(config, mesh)
