"""Masked tokens: which they are depends on the seed and the step alone, and the mesh changes nothing."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import runs
from tuning import ENCODER, assert_same, trace

from config import compose
from finetune.opening import open_task


@functools.cache
def text() -> Path:
    return runs.corpus(Path(tempfile.mkdtemp()) / "text")


def arguments(*more: str) -> list[str]:
    data = ["data=text", f"data.path={text()}/*.txt", f"data.cache={text().parent / 'cache'}", "data.heldout=0.2"]
    return ["task=masked_lm", *data, *ENCODER, "model.token_types=0", "train.eval_batches=2", *more]


@pytest.mark.long
@pytest.mark.parametrize("mesh", [{"fsdp": 2, "context": 2}], ids=str)
def test_the_mesh_changes_nothing(mesh):
    assert_same(trace(arguments("data.segments=true"), **mesh), one_device())


one_device = functools.cache(lambda: trace(arguments("data.segments=true")))


def batch_of(tokens: np.ndarray) -> dict[str, np.ndarray]:
    return {"tokens_BT": tokens, "targets_BT": np.roll(tokens, -1, 1), "mask_BT": np.ones(tokens.shape, np.float32)}


def test_shares_and_what_is_told():
    task = open_task(compose.load(arguments("task.options.share=0.2")))
    tokens = np.random.default_rng(0).integers(97, 120, (64, 500)).astype(np.int32)
    tokens[:, ::50] = 0  # ends of documents
    made = task.change(batch_of(tokens), 3, np.arange(64))
    chosen, shown = made["mask_BT"] > 0, made["tokens_BT"]
    np.testing.assert_array_equal(made["targets_BT"], tokens)
    np.testing.assert_array_equal(shown[~chosen], tokens[~chosen])
    assert not chosen[:, ::50].any()
    assert chosen.mean() == pytest.approx(0.2 * 0.98, abs=0.01)
    assert (shown[chosen] == 255).mean() == pytest.approx(0.8, abs=0.02)
    assert (shown[chosen] == tokens[chosen]).mean() == pytest.approx(0.1, abs=0.02)


def test_masks_are_pure_functions_of_seed_step_and_row():
    task, other = (open_task(compose.load(arguments(f"seed={seed}"))) for seed in (0, 1))
    tokens = np.full((8, 100), 97, np.int32)
    mask = lambda of, step, rows: of.change(batch_of(tokens[rows]), step, rows)["mask_BT"]
    whole = mask(task, 5, np.arange(8))
    np.testing.assert_array_equal(mask(task, 5, np.arange(4, 8)), whole[4:])  # of a process with these rows
    assert (mask(task, 6, np.arange(8)) != whole).any()
    assert (mask(other, 5, np.arange(8)) != whole).any()
    assert (mask(task, -1, np.arange(8)) != whole).any()


def test_rows_that_fill_up_a_batch_count_nothing():
    task = open_task(compose.load(arguments()))
    batch = batch_of(np.full((4, 100), 97, np.int32))
    batch["mask_BT"][2:] = 0
    assert task.change(batch, -1, np.arange(4))["mask_BT"].sum(1).tolist()[2:] == [0, 0]


def test_a_decoder_is_refused_and_so_are_rows():
    with pytest.raises(ValueError, match="needs an encoder"):
        open_task(compose.load(arguments("model.causal=true")))
    with pytest.raises(ValueError, match="reads the text of data="):
        trace(arguments("task.path=rows.csv"))
