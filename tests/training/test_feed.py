"""The feed: whatever step is asked for, its own batch comes, and what goes wrong is told at that step."""

import random
import threading
import time
from unittest import mock

import jax
import numpy as np
import pytest
import runs

from config import compose
from data.loader import Loader
from parallel.mesh import AXES, make_mesh
from training.subject import pretraining

STEPS = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("feed")
    text = runs.corpus(folder / "text")
    config = compose.load(runs.overrides(text, folder / "run", f"train.steps={STEPS}"))
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"data": 2, "context": 2}, jax.devices()[:4])
    return config, mesh


def test_batches_come_in_any_order_and_are_made_one_step_ahead(made):
    feed, asked = pretraining(*made).feed, []
    batch = Loader.batch

    def watched(self, step, rows=None):
        asked.append((step, threading.current_thread() is threading.main_thread()))
        return batch(self, step, rows)

    steps = [0, 0, *range(4), *random.Random(0).choices(range(STEPS), k=8), *range(STEPS)]
    with mock.patch.object(Loader, "batch", watched):
        for step in steps:
            found = feed.batch(step)
            for name, array in batch(feed.stream, step).items():
                np.testing.assert_array_equal(found[name], array)
        before = len(asked)
        feed.batch(3)
        deadline = time.monotonic() + 10
        while (4, False) not in asked[before:] and time.monotonic() < deadline:
            time.sleep(0.001)
    assert (4, False) in asked[before:], "the next step's is made before it is asked for"
    made_steps = [step for step, _ in asked]
    assert max(made_steps) == STEPS - 1, "nothing is read beyond the end of the run"
    assert not any(in_loop for _, in_loop in asked)


def test_what_goes_wrong_is_told_at_its_step(made):
    feed, batch = pretraining(*made).feed, Loader.batch

    def broken(self, step, rows=None):
        if step == 3:
            raise OSError("the shelf fell down")
        return batch(self, step, rows)

    with mock.patch.object(Loader, "batch", broken):
        for step in range(3):
            feed.batch(step)
        for _ in range(2):
            with pytest.raises(OSError, match="the shelf fell down"):
                feed.batch(3)
        feed.batch(4)


def test_batches_far_ahead_are_looked_at_and_no_batch_waits_for_a_look(made, monkeypatch):
    config, *others = made
    monkeypatch.setattr("training.feed.BLOCK_TOKENS", 4 * config.train.batch_size * config.train.seq_len)
    feed, batch, looked, free = pretraining(config, *others).feed, Loader.batch, [], threading.Event()

    def watched(self, step, rows=None):
        if threading.current_thread().name.startswith("scout"):
            looked.append(step)
            free.wait(10)
            raise OSError("the store is away")
        return batch(self, step, rows)

    with mock.patch.object(Loader, "batch", watched):
        for step in range(3):
            np.testing.assert_array_equal(feed.batch(step)["tokens_BT"], batch(feed.stream, step)["tokens_BT"])
        free.set()
        deadline = time.monotonic() + 10
        while not feed._idle() and time.monotonic() < deadline:
            time.sleep(0.001)
        for step in range(3, STEPS):
            feed.batch(step)
            while not feed._idle() and time.monotonic() < deadline:
                time.sleep(0.001)
    assert looked == [4, *range(7, STEPS)]


def test_heldout_batches_have_the_name_of_their_source_and_are_the_same_each_time(made):
    feed = pretraining(*made).feed
    first, again = ([(name, np.asarray(b["tokens_BT"])) for name, b in feed.heldout()] for _ in range(2))
    assert {name for name, _ in first} == {"text"}
    for (_, a), (_, b) in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
