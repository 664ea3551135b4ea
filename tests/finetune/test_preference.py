"""Preferences: the losses of their papers, a reference that is made once, and the same on every mesh."""

import functools
import math
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
from finetune.reference import FILE
from finetune.table import LeftOut, Row
from finetune.tasks.preference import LOSSES, Options, pair_losses
from parallel.mesh import make_mesh
from training.job import make_job
from training.parity import ONE_DEVICE


@functools.cache
def table() -> Path:
    path = Path(tempfile.mkdtemp()) / "pairs.csv"
    rows = [f"ask {i},{'yes ' * (1 + i % 3)},{'no ' * (1 + i % 2)}" for i in range(50)]
    path.write_text("\n".join(["prompt,chosen,rejected", *rows]))
    return path


def arguments(*more: str) -> list[str]:
    return ["task=preference", f"task.path={table()}", "task.heldout=0.2", *SMALL, "train.seq_len=64", *more]


one_device = functools.cache(lambda: trace(arguments("optimizer.lr=1e-3")))


MESHES = [{"data": 2, "context": 2, "tensor": 2}, {"pipe": 2}]


@pytest.mark.long
@pytest.mark.parametrize("mesh", few_of(MESHES, MESHES[:1]), ids=str)
def test_the_mesh_changes_nothing(mesh):
    assert_same(trace(arguments("optimizer.lr=1e-3"), **mesh), one_device())


def test_it_begins_where_the_reference_is():
    """The first step's loss of DPO is log 2, and afterwards the chosen answers are ahead."""
    assert one_device().losses[0] == pytest.approx(math.log(2), rel=1e-6)
    assert one_device().losses[1] < one_device().losses[0]
    assert one_device().metrics["margin"] > 0


def test_losses_are_those_of_their_papers():
    chosen, rejected, gained = -0.4, -0.9, 0.7
    said, ahead = jnp.array([[chosen, rejected]]), jnp.array([gained])
    loss = lambda **how: float(pair_losses(Options(**how), said, ahead)[0])
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    assert loss(beta=0.5) == pytest.approx(-math.log(sigmoid(0.35)))
    smooth = -0.9 * math.log(sigmoid(0.35)) - 0.1 * math.log(sigmoid(-0.35))
    assert loss(beta=0.5, smoothing=0.1) == pytest.approx(smooth)
    assert loss(loss="hinge", beta=0.5) == pytest.approx(1 - 0.35)
    assert loss(loss="ipo", beta=0.5) == pytest.approx((0.7 - 1) ** 2)
    assert loss(loss="simpo", beta=2.0, margin=1.0) == pytest.approx(-math.log(sigmoid(2 * 0.7 - 1)))
    odds = lambda log_p: math.exp(log_p) / (1 - math.exp(log_p))
    ratio = math.log(odds(chosen) / odds(rejected))
    ahead = jnp.array([chosen - rejected])
    found = float(pair_losses(Options(loss="orpo", beta=0.3), said, ahead)[0])
    assert found == pytest.approx(-chosen - 0.3 * math.log(sigmoid(ratio)), rel=1e-5)
    assert len(LOSSES) == 5


def test_the_reference_is_made_once_and_found_again(tmp_path):
    config = compose.load(arguments())
    with jax.set_mesh(mesh := make_mesh(ONE_DEVICE, jax.devices()[:1])):
        subject = open_subject(config, mesh)
        job = make_job(subject.config, mesh, loss=subject.loss)
        params = job.init(0).params
        subject.begin(job, lambda: params, tmp_path)
        batch = subject.feed.batch(0)
        said = np.asarray(open_answers(subject, job, params))
        again = open_subject(config, mesh)
        again.begin(job, lambda: pytest.fail("it is there already"), tmp_path)
        for name, array in again.feed.batch(0).items():
            np.testing.assert_array_equal(array, batch[name], err_msg=name)
        np.testing.assert_allclose(batch["reference_BX"], said, rtol=1e-5)
        other = compose.load(arguments("task.options.loss=ipo"))  # in the folder of a run that took no step
        with pytest.raises(RuntimeError, match="asked for"):
            open_subject(other, mesh).begin(job, refuse, tmp_path)
        (tmp_path / FILE).unlink()
        with pytest.raises(RuntimeError, match="asked for"):
            open_subject(config, mesh).begin(job, refuse, tmp_path)


def refuse():
    raise RuntimeError("asked for")


def open_answers(subject, job, params):
    """The log-probabilities of the first batch, sequence by sequence: each answer alone behind its prompt."""
    from training.step import hidden

    task, batch = subject.loss.__self__, subject.feed.batch(0)
    model, x_BTD, _ = hidden(job.description, job.train, params, batch)
    return task.answers(model, x_BTD, batch, job.train)["said_BX"]


def test_answers_do_not_see_each_other_and_the_prompt_does_not_count():
    task = open_task(compose.load(arguments()))
    row = Row("a:1", {"prompt": "why? ", "chosen": "so", "rejected": "no idea"})
    ((example,),) = task.encode([row], LeftOut())
    arrays = example.arrays
    for segment, text in ((1, b"so"), (2, b"no idea")):
        mine = arrays["segments_T"] == segment
        assert arrays["targets_T"][mine & (arrays["said_T"] > 0)].tolist() == [*text, 0]
        assert bytes(arrays["tokens_T"][mine].tolist()) == b"why? " + text
        assert arrays["places_T"][mine].tolist() == list(range(mine.sum()))
    assert arrays["mask_T"].sum() == 1


def test_rows_of_messages_say_the_same_however_they_are_spelled():
    """The prompt as a text or messages, in a column of its own or at the beginning of whole dialogues, or both."""
    user, says = {"role": "user", "content": "why?"}, lambda text: {"role": "assistant", "content": text}
    task = open_task(compose.load([*arguments("train.seq_len=128"), "tokenizer=file", f"tokenizer.path={folder()}"]))
    rows = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt, chosen, rejected in (
            ("why?", [says("so")], [says("no")]),
            ([user], [says("so")], [says("no")]),
            ([user], "so", "no"),
            (None, [user, says("so")], [user, says("no")]),
            ("why?", [user, says("so")], [user, says("no")]),
            ([user], [user, says("so")], [user, says("no")]),
        )
    ]
    left_out = LeftOut()
    made = task.encode([Row(f"a:{number}", row) for number, row in enumerate(rows)], left_out)
    assert left_out.told() == ""
    for (example,) in made:
        for name, array in example.arrays.items():
            np.testing.assert_array_equal(array, made[0][0].arrays[name], err_msg=name)
    other = Row("a:1", {"prompt": "who?", "chosen": [user, says("so")], "rejected": [user, says("no")]})
    foreign = Row("a:2", {"chosen": [{"from": "gpt", "content": "so"}], "rejected": [{"from": "gpt", "content": "no"}]})
    assert task.encode([other, foreign], left_out) == [[], []]
    assert "in which the user does not say the prompt" in left_out.told()
    assert "a message without a role" in left_out.told()


def test_what_cannot_be_used_is_told():
    task, left_out = open_task(compose.load(arguments())), LeftOut()
    rows = [Row("a:1", {"chosen": "a", "rejected": "a"}), Row("a:2", {"chosen": "a", "rejected": " "})]
    assert task.encode(rows, left_out) == [[], []]
    assert "whose answers do not differ" in left_out.told()
    assert "no rejected answer" in left_out.told()
