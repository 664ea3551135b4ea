"""Proposals change the number of steps and nothing else: text with them is text without, greedy and sampled."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from engines import REACH, Heard, ask, assert_as_generated, mix, opened, run_mix, started
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_of_all_kinds import byte_level

from inference.engine import Engine
from inference.engine_options import EngineOptions
from inference.grammar import written
from inference.requests import Request, Sampling
from inference.speculation import NgramProposer, accepted

REPEATING = [1, 2, 3, 4, 5, 6] * 4


@pytest.fixture(scope="module")
def engines(engine):
    """One with proposals, one without."""
    speculating = started("grouped", speculation="ngram", drafted=3)
    yield speculating, engine
    assert speculating.stop(20)


@given(tokens=st.lists(st.integers(0, 3), max_size=40), most=st.integers(1, 6), cuts=st.lists(st.integers(0, 40)))
def test_a_proposal_is_what_followed_last_time(tokens, most, cuts):
    proposer = NgramProposer()
    for end in sorted({min(cut, len(tokens)) for cut in cuts} | {len(tokens)}):
        now = tokens[:end]
        draft = proposer.propose(now, most)
        before = [i for i in range(3, end) if now[i - 3 : i] == now[-3:]]
        if not before:
            assert draft == []
            continue
        assert len(draft) == most
        whole = now + draft
        assert draft == whole[before[-1] :][:most]


def test_accepted_tokens_end_behind_the_first_wrong_proposal():
    assert accepted([1, 2, 3], [1, 2, 3, 4]) == [1, 2, 3, 4]
    assert accepted([1, 9, 3], [1, 2, 3, 4]) == [1, 2]
    assert accepted([9, 2], [1, 2, 3]) == [1]


def test_greedy_text_of_any_mix_is_that_of_generate(engines):
    for seed in (1, 2, 3):
        asked = mix(seed)
        assert_as_generated(opened("grouped"), asked, run_mix(engines[0], asked))
    assert engines[0].state().compiles == 0


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.9, "seed": 5},
        {"temperature": 0.3, "top_p": 0.8, "seed": 6},
        {"temperature": 0.8, "repetition_penalty": 1.2, "seed": 7},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"logit_bias": {65: 3.0}, "temperature": 0.5, "seed": 1},
        {"grammar": written("regex", "(ab|ba)*")},
        {"stop_ids": (65, 66, 67)},
        {"logprobs": 2},
    ],
    ids=str,
)
def test_every_kind_of_sampling_keeps_its_text(engines, sampling):
    with_them, without = (ask(engine, f"{sampling}", REPEATING, n=2, max_tokens=24, **sampling) for engine in engines)
    for index in range(2):
        assert with_them.tokens(index) == without.tokens(index)
        assert with_them.text(index) == without.text(index)
        assert with_them.finish(index) == without.finish(index)
        ours, theirs = ([p for piece in h.pieces[index] for p in piece.logprobs] for h in (with_them, without))
        np.testing.assert_allclose([p.logprob for p in ours], [p.logprob for p in theirs], rtol=0, atol=1e-4)


def test_rows_with_and_without_proposals_share_steps(engines):
    """Texts that repeat themselves, beside one with a penalty and one with a grammar, which are not speculated."""
    kinds = {
        "repeats": {"logit_bias": {65: 100.0}},
        "seeded": {"temperature": 0.4, "seed": 3, "logprobs": 1},
        "penalty": {"temperature": 0.7, "seed": 4, "frequency_penalty": 0.7, "logprobs": 1},
        "grammar": {"grammar": written("regex", "(ab|ba)*")},
    }
    texts = []
    for engine in engines:
        heard = {}
        for name, how in kinds.items():
            sampling = Sampling(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": 24} | how)
            heard[name] = Heard()
            engine.submit(Request(f"shared {name}", tuple(REPEATING), sampling), heard[name])
        for one in heard.values():
            assert one.done.wait(60)
        texts.append({name: (one.tokens(), one.text(), one.finish()) for name, one in heard.items()})
    assert texts[0] == texts[1]


def other_weights():
    """Another model with the same programs."""
    model = opened("grouped")
    return replace(model, params=jax.tree.map(lambda x: -x if x.ndim > 1 else x, model.params))


@pytest.mark.parametrize(("draft", "right"), [(lambda: opened("grouped"), 0.9), (other_weights, 0.0)])
def test_a_smaller_model_proposes_and_the_text_stays(engines, draft, right):
    """The model itself is nearly always right; another one is nearly always wrong. Neither changes a text."""
    options = EngineOptions(
        max_running=4, block=4, chunk=16, cache_tokens=2 * REACH, speculation="draft", drafted=3, max_length=REACH
    )
    engine = Engine(opened("grouped"), options, draft=draft())
    engine.start()
    asked = mix(4)
    assert_as_generated(opened("grouped"), asked, run_mix(engine, asked))
    for index, how in enumerate(
        ({}, {"temperature": 0.8, "seed": 2}, {"temperature": 0.5, "presence_penalty": 1.0, "seed": 3})
    ):
        ours, theirs = (ask(one, f"{right} {index}", REPEATING, max_tokens=20, **how) for one in (engine, engines[1]))
        assert ours.tokens() == theirs.tokens()
    before = engine.state()
    alone = ask(engine, f"{right} alone", REPEATING, max_tokens=24)
    after = engine.state()
    drafted = after.drafted_tokens - before.drafted_tokens
    assert drafted > 0
    assert (after.accepted_tokens - before.accepted_tokens) / drafted >= right
    assert after.steps - before.steps < 24 or not right
    assert after.compiles == 0
    _fails_once(engine, alone.tokens())
    assert engine.stop(20)


def _fails_once(engine: Engine, text: list[int]) -> None:
    """A smaller model that fails, and whose arrays are gone with it, changes no text either, and proposes again."""
    programs, failures = engine._proposals._programs, []
    run = programs.run

    def failing(rows, masks):
        if len(failures) == 2:
            return run(rows, masks)
        failures.append(len(rows))
        jax.tree.map(lambda x: x.delete(), programs.kept)
        raise RuntimeError("the device is lost")

    programs.run = failing
    assert ask(engine, "fails", REPEATING, max_tokens=24).tokens() == text
    before = engine.state()
    assert before.ready
    assert ask(engine, "works again", REPEATING, max_tokens=24).tokens() == text
    assert engine.state().drafted_tokens > before.drafted_tokens
    assert len(failures) == 2


def test_a_smaller_model_that_does_not_fit_is_told():
    wrong = EngineOptions(max_length=REACH, speculation="draft")
    with pytest.raises(ValueError, match="go together"):
        Engine(opened("grouped"), wrong)
    with pytest.raises(ValueError, match="go together"):
        Engine(opened("grouped"), EngineOptions(max_length=REACH), draft=opened("grouped"))
    other = replace(opened("grouped"), tokenizer=byte_level())
    with pytest.raises(ValueError, match="another tokenizer"):
        Engine(opened("grouped"), wrong, draft=other)


def test_repetitions_take_fewer_steps(engines):
    """A bias makes the text repeat one token, which look-up proposes."""
    counts = []
    for engine in engines:
        before = engine.state()
        heard = ask(engine, "again", REPEATING, max_tokens=24, logit_bias={65: 100.0})
        assert heard.tokens() == [65] * 24
        after = engine.state()
        counts.append((after.steps - before.steps, after.drafted_tokens - before.drafted_tokens, after.accepted_tokens))
    (fast, drafted, taken), (slow, nothing, _) = counts
    assert fast <= slow - 12
    assert drafted >= 15
    assert taken >= 15
    assert nothing == 0
