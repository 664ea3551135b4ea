"""Text from text: what counts is the target, what is written is judged, on every mesh."""

import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from tuning import SMALL, assert_same, trace

from config import compose
from finetune.examples import Table
from finetune.judge import Answers
from finetune.metrics import bleu, chrf, rouge
from finetune.opening import open_task
from finetune.table import LeftOut, Row
from model.transformer import describe
from parallel.mesh import make_mesh
from training.parity import ONE_DEVICE

WRITES = ("task.options.write=4", "task.options.judged=4", "task.options.by=[rouge]")


@functools.cache
def table() -> Path:
    path = Path(tempfile.mkdtemp()) / "pairs.csv"
    path.write_text("source,target\n" + "".join(f"{'ab' * (i % 4)}{i},{i} {i}\n" for i in range(60)))
    return path


def arguments(*more: str) -> list[str]:
    return ["task=seq2seq", f"task.path={table()}", "task.heldout=0.2", *SMALL, *more]


one_device = functools.cache(lambda: trace(arguments(*WRITES)))


@pytest.mark.parametrize("mesh", [{"fsdp": 2, "tensor": 2}], ids=str)
def test_the_mesh_changes_nothing(mesh):
    assert_same(trace(arguments(*WRITES), **mesh), one_device())
    assert set(one_device().metrics) == {"loss", "accuracy", "perplexity", "rouge1", "rouge2", "rougeL"}


def test_the_target_and_its_end_count_and_nothing_else():
    task = open_task(compose.load(arguments("task.options.prompt='go: {source} ='")))
    ((example,),) = task.encode([Row("a:1", {"source": "abc", "target": "xyz"})], LeftOut())
    counted = example.arrays["targets_T"][example.arrays["mask_T"] > 0]
    assert counted.tolist() == [*b"xyz", 0]
    assert bytes(example.about.tolist()) == b"go: abc ="
    assert bytes(example.arrays["tokens_T"].tolist()) == b"go: abc =xyz"


def test_what_is_written_is_judged_beside_the_target():
    task = open_task(compose.load(arguments("task.options.write=9", "task.options.judged=2")))
    rows = [Row(f"a:{i}", {"source": "s", "target": "the cat sat on the mat"}) for i in range(3)]
    examples = [example for made in task.encode(rows, LeftOut()) for example in made]
    write = lambda prompts, tokens: [list(b"the cat sat on the mat")] * len(prompts)
    judgement = task.judge_texts(rows, examples, write)
    assert judgement.metrics == pytest.approx({"rouge1": 1, "rouge2": 1, "rougeL": 1, "bleu": 100, "chrf": 100})
    assert len(judgement.judged) == 2
    assert open_task(compose.load(arguments())).judge_texts(rows, examples, None) is None


def test_no_text_is_written_beyond_learned_positions():
    """Each prompt has the room that is left behind it, and one without room is answered with nothing."""
    config = compose.load(arguments("train.seq_len=24", "model.positions=learned", "model.max_positions=24"))
    task = open_task(config)
    rows = [Row("a:1", {"source": "s", "target": "t"})]
    table = Table(rows, [example for made in task.encode(rows, LeftOut()) for example in made], LeftOut())
    with jax.set_mesh(make_mesh(ONE_DEVICE, jax.devices()[:1])):
        description = describe(config.model)
        params = jax.jit(description.init)(jax.random.key(0))
        answers = Answers(task, description, config.train, table)
        prompts = [[1] * size for size in (9, 24, 3, 9)]
        written = answers._written(params, prompts, 30)
        assert [len(prompt) + len(text) for prompt, text in zip(prompts, written, strict=True)] == [24, 24, 24, 24]
        assert written[0] == written[3] == answers._written(params, prompts[:1], 15)[0]


def test_measures_are_those_of_their_papers():
    assert rouge(["the cat"], ["the dog"]) == pytest.approx({"rouge1": 0.5, "rouge2": 0, "rougeL": 0.5})
    assert bleu(["a b c d e"], ["a b c d e"])["bleu"] == pytest.approx(100)
    assert bleu(["a b c d"], ["a b c d e"])["bleu"] == pytest.approx(100 * np.exp(1 - 5 / 4))  # brevity
    # chrF: of 1 to 2 characters ab and ac share 1 of 2 and 0 of 1: precision and recall are 1/4 on average
    assert chrf(["ab"], ["ac"])["chrf"] == pytest.approx(25)
    assert chrf(["ab"], ["ab"])["chrf"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("model.causal=false",), "needs a decoder"),
        (("task.options.prompt=hello",), "has no {source}"),
        (("task.options.by=[meteor]",), "rouge, bleu"),
    ],
)
def test_settings_that_do_not_fit_are_refused(more, said):
    with pytest.raises(ValueError, match=said):
        open_task(compose.load(arguments(*more)))
