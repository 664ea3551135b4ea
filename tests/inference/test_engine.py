"""The engine: equal to `generate` whatever runs beside, nothing compiled after the start, and alive after faults."""

import threading
import time

import jax
import numpy as np
import pytest
from engines import NEW, REACH, Heard, ask, assert_as_generated, mix, opened, references, run_mix, started
from every import few_of

from inference.engine import Engine
from inference.engine_options import EngineOptions
from inference.requests import Busy, EncodeRequest, Request, Sampling

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3)


def settled(engine: Engine):
    """The state once nothing runs."""
    end = time.monotonic() + 30
    while (state := engine.state()).running or state.waiting:
        assert time.monotonic() < end
        time.sleep(0.01)
    return state


def test_mixes_equal_generate_and_nothing_compiles(engine):
    for seed in range(4):
        asked = mix(seed)
        assert_as_generated(opened("grouped"), asked, run_mix(engine, asked))
    state = settled(engine)
    assert state.compiles == 0
    assert state.preemptions > 0, "the mixes are too small for the cache"
    assert state.cached_prompt_tokens > 0
    assert state.blocks_used == 0
    assert state.finished["length"] > 20
    assert state.finished["aborted"] > 0


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_first_token_of_a_choice_is_told_once(engine, monkeypatch, ahead):
    """Also where the step after it has begun before it is read."""
    told = []
    monkeypatch.setattr(engine, "_lookahead", ahead)
    monkeypatch.setattr(engine.observer, "first_token", told.append)
    for id, most, n in (("short", 1, 1), ("long", 6, 1), ("two", 4, 2)):
        ask(engine, f"{id}-{ahead}", PROMPT, n=n, max_tokens=most)
    settled(engine)
    assert sorted(told) == sorted(f"{id}-{ahead}" for id in ("short", "long", "two", "two"))


def test_a_mesh_changes_nothing():
    mesh = (("tensor", 2),)
    engine, asked = started("grouped", mesh, max_running=3), mix(5)
    assert_as_generated(opened("grouped", mesh), asked, run_mix(engine, asked))
    assert engine.state().compiles == 0
    assert engine.stop(10)


def test_all_kinds_of_sampling_compile_nothing_and_a_seed_is_a_text(engine):
    before = ask(engine, "alone", PROMPT, max_tokens=12, temperature=1.0, seed=7, top_p=0.9, logprobs=3)
    others = [Heard() for _ in range(6)]
    kinds = [
        {"top_k": 5}, {"min_p": 0.1, "repetition_penalty": 1.3}, {"presence_penalty": 1.0, "frequency_penalty": 1.0},
        {"logit_bias": {5: 50.0}}, {"prompt_logprobs": 2}, {"stop": ("a",), "stop_ids": (7,)},
    ]  # fmt: skip
    for index, (kind, heard) in enumerate(zip(kinds, others, strict=True)):
        sampling = Sampling(max_tokens=20, temperature=0.8, **kind)
        engine.submit(Request(f"other-{index}", PROMPT[index:], sampling), heard)
    beside = ask(engine, "beside", PROMPT, max_tokens=12, temperature=1.0, seed=7, top_p=0.9, logprobs=3)
    assert before.tokens() == beside.tokens()
    assert all(heard.done.wait(60) for heard in others)
    assert set(others[3].tokens()) == {5}
    logprobs = [logprob for piece in before.pieces[0] for logprob in piece.logprobs]
    assert [logprob.token for logprob in logprobs] == before.tokens()
    assert all(len(logprob.top) == 3 and logprob.logprob <= logprob.top[0][1] for logprob in logprobs)
    assert engine.state().compiles == 0


def test_prompt_logprobs_are_those_of_the_whole_forward_pass(engine):
    prompt = tuple(range(1, 40))
    heard = ask(engine, "scored", prompt, max_tokens=0, prompt_logprobs=4)
    (piece,) = heard.pieces[0]
    there = opened("grouped")
    model = there.description.bind(there.params)
    logits_BTV = model.logits(model(np.asarray([prompt], np.int32))[0])
    expected_TV = np.asarray(jax.nn.log_softmax(logits_BTV[0]))
    assert (piece.finish, piece.tokens, piece.prompt_logprobs[0]) == ("length", (), None)
    assert len(piece.prompt_logprobs) == len(prompt)
    for t, found in enumerate(piece.prompt_logprobs[1:]):
        assert found.token == prompt[t + 1]
        assert found.logprob == pytest.approx(expected_TV[t, prompt[t + 1]], abs=1e-4)
        assert found.top[0] == (expected_TV[t].argmax(), pytest.approx(expected_TV[t].max(), abs=1e-4))


def test_choices_of_a_request_share_its_prompt(engine):
    before = engine.state().prompt_tokens
    heard = ask(engine, "four", range(1, 21), n=4, max_tokens=6, temperature=1.0, seed=3)
    assert len({tuple(heard.tokens(index)) for index in range(4)}) > 1
    assert [heard.pieces[index][0].cached_tokens for index in range(1, 4)] == [16] * 3
    assert engine.state().prompt_tokens - before == 20


@pytest.mark.parametrize("how", few_of(["mean", "last", "first", "max"], ["mean", "last"]))
def test_vectors_of_a_decoder_are_those_of_the_whole_forward_pass(how):
    """Texts of one part and of several, beside one that is written, through a cache with room for one of them."""
    there = opened("grouped")
    engine = started("grouped", max_running=2, cache_tokens=REACH, pooling=how)
    texts = [tuple(np.random.default_rng(i).integers(0, 256, n).tolist()) for i, n in enumerate([1, 80, 16, 17, 33])]
    written = Heard()
    engine.submit(Request("beside", PROMPT, Sampling(max_tokens=24, temperature=0, ignore_eos=True)), written)
    vectors, done = {}, threading.Semaphore(0)
    for number, text in enumerate(texts):

        def hear(answer, number=number):
            vectors[number] = answer.vector
            done.release()

        engine.submit(EncodeRequest(f"text-{number}", text), hear)
    for _ in texts:
        assert done.acquire(timeout=120)
    assert written.done.wait(60)
    assert written.tokens() == references(there, [PROMPT])[0]
    model = there.description.bind(there.params)
    for number, text in enumerate(texts):
        x_TD = np.asarray(model(np.asarray([text], np.int32))[0][0])
        pooled = {"mean": x_TD.mean(0), "last": x_TD[-1], "first": x_TD[0], "max": x_TD.max(0)}[how]
        np.testing.assert_allclose(vectors[number], pooled / np.linalg.norm(pooled), rtol=0, atol=2e-6)
    state = settled(engine)
    assert (state.compiles, state.blocks_used) == (0, 0)
    assert engine.stop(10)


def test_low_priority_gives_way_and_its_text_does_not_change(engine):
    """Four texts of low priority hold all slots; one that comes later begins at once and ends before any of them."""
    ended, live = [], Heard()

    def came(piece):
        if piece.finish is not None:
            ended.append("low")
        elif len(low[0].tokens()) == 3 and not asked:
            asked.append(True)
            engine.submit(Request("live", PROMPT, Sampling(max_tokens=6, temperature=0, ignore_eos=True)), live)

    asked, prompts = [], [(*PROMPT, number) for number in range(4)]
    live._then = lambda piece: ended.append("live") if piece.finish is not None else None
    low = [Heard(then=came) for _ in prompts]
    before = engine.state().preemptions
    for number, prompt in enumerate(prompts):
        sampling = Sampling(max_tokens=NEW, temperature=0, ignore_eos=True)
        engine.submit(Request(f"low-{number}", prompt, sampling, low=True), low[number])
    assert all(heard.done.wait(60) for heard in (*low, live))
    assert ended[0] == "live"
    assert engine.state().preemptions > before
    texts = references(opened("grouped"), [PROMPT, *prompts])
    for heard, text in zip((live, *low), texts, strict=True):
        assert heard.tokens()[: len(text)] == text[: len(heard.tokens())]
        assert heard.finish() == "length"


def test_ends(engine):
    (text,) = references(opened("grouped"), [PROMPT])
    stopped = ask(engine, "token", PROMPT, max_tokens=24, stop_ids=(text[5],))
    assert (stopped.finish(), stopped.tokens()) == ("stop", text[: text.index(text[5])])
    assert stopped.pieces[0][-1].stopped_by == text[5]
    assert ask(engine, "none", PROMPT, max_tokens=0).tokens() == []
    assert len(ask(engine, "reach", [5] * (REACH - 4), max_tokens=24).tokens()) == 4


def test_what_cannot_be_answered_is_told_at_once(engine):
    submit = lambda request: engine.submit(request, Heard())
    with pytest.raises(ValueError, match="empty"):
        submit(Request("a", ()))
    with pytest.raises(ValueError, match="80 tokens leaves no room in the 80"):
        submit(Request("a", (1,) * REACH))
    with pytest.raises(ValueError, match="token 256 of a prompt is outside"):
        submit(Request("a", (256,)))
    with pytest.raises(ValueError, match="n=5 must be 1 to 4"):
        submit(Request("a", (1,), n=5))
    with pytest.raises(ValueError, match="does not encode"):
        Engine(opened("grouped"), EngineOptions(pooling="none")).submit(EncodeRequest("a", (1,)), Heard())
    with pytest.raises(ValueError, match=r"cache_tokens=40 hold no sequence of 80 tokens"):
        Engine(opened("grouped"), EngineOptions(cache_tokens=40))


def test_a_listener_that_raises_loses_its_request_only(engine):
    def broken(piece):
        raise RuntimeError("the client is gone")

    engine.submit(Request("broken", PROMPT, Sampling(max_tokens=24, temperature=0, ignore_eos=True)), broken)
    (text,) = references(opened("grouped"), [PROMPT])
    assert ask(engine, "beside-broken", PROMPT, max_tokens=24).tokens() == text
    assert settled(engine).ready


def test_a_step_that_fails_ends_its_requests_and_no_others(engine, monkeypatch):
    failing, run = threading.Event(), engine._programs.run

    def sometimes(rows, masks, **how):
        if failing.is_set() and any(row.sequence.tokens[0] == 99 for row in rows):
            failing.clear()
            raise RuntimeError("the device is lost")
        return run(rows, masks, **how)

    monkeypatch.setattr(engine._programs, "run", sometimes)
    (text,) = references(opened("grouped"), [PROMPT])
    other = Heard()
    engine.submit(Request("other", PROMPT, Sampling(max_tokens=24, temperature=0, ignore_eos=True)), other)
    failing.set()
    failed = ask(engine, "failing", [99] * 60, max_tokens=4)
    assert failed.finish() == "error"
    assert "a step of the model failed: RuntimeError" in failed.pieces[0][-1].error
    assert other.done.wait(60)
    assert (other.finish(), other.tokens()) == ("length", text) or other.finish() == "error"
    assert ask(engine, "after", PROMPT, max_tokens=24).tokens() == text
    assert engine.state().ready
    assert engine.state().compiles == 0, "the cache that is made anew after a fault was compiled before"
    assert settled(engine).blocks_used == 0


def test_a_client_that_leaves_frees_its_slot_within_a_step(engine):
    steps = []

    def then(piece):
        if len(heard.tokens()) == 3:
            engine.abort("leaves")
            steps.append(engine.state().steps)

    heard = Heard(then=then)
    engine.submit(Request("leaves", PROMPT, Sampling(max_tokens=60, temperature=0, ignore_eos=True)), heard)
    assert heard.done.wait(60)
    assert (heard.finish(), len(heard.tokens())) == ("aborted", 3)
    # the step that was being read then, and on one device the one that had begun
    assert settled(engine).steps - steps[0] <= 1 + engine._lookahead


def test_a_full_queue_and_a_draining_engine_are_busy():
    engine = started("grouped", max_running=1, max_waiting=2, cache_tokens=REACH)
    long = Sampling(max_tokens=60, temperature=0, ignore_eos=True)
    heard = [Heard() for _ in range(3)]
    running = threading.Event()
    first = Heard(then=lambda piece: running.set())
    engine.submit(Request("first", (1,), long), first)
    assert running.wait(60)
    engine.submit(Request("0", (1,), long), heard[0])
    engine.submit(Request("1", (1,), long), heard[1])
    with pytest.raises(Busy) as busy:
        engine.submit(Request("2", (1,), long), heard[2])
    assert 1 <= busy.value.retry_after <= 60
    engine.abort("1")
    with pytest.raises(ValueError, match="is there already"):
        engine.submit(Request("0", (1,), long), heard[2])
    engine.drain()
    with pytest.raises(Busy):
        engine.submit(Request("3", (1,), long), heard[2])
    assert engine.state().draining
    assert engine.stop(60)
    assert [first.finish(), heard[0].finish(), heard[1].finish()] == ["length", "length", "aborted"]
    assert not engine.state().ready


def test_stop_aborts_what_does_not_end_in_time():
    engine, heard = started("grouped", max_running=1, cache_tokens=REACH), Heard()
    engine.submit(Request("long", (1,), Sampling(max_tokens=REACH - 2, temperature=0, ignore_eos=True)), heard)
    assert not engine.stop(0)
    assert heard.done.is_set()
    assert heard.finish() == "aborted"
