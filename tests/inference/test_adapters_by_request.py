"""Several adapters beside one model: each request has the text of its own adapter merged and generated alone."""

import time
from collections.abc import Sequence

import numpy as np
import pytest
from adapted import adapted
from engines import REACH, Heard, ask, opened, references
from hypothesis import given
from hypothesis import strategies as st

from inference.adapter_books import Adapter, AdapterBooks
from inference.cache import Blocks
from inference.engine import Engine
from inference.engine_options import EngineOptions
from inference.requests import Request, Sampling
from inference.scheduler import Sequence as Tokens

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 3, 1, 4, 1)
KINDS = ("lora", "attention", "dora")
ROOM = {"max_running": 4, "block": 4, "chunk": 16, "cache_tokens": 4 * REACH}


def mixed(engine: Engine, prompts: Sequence[tuple[int, ...]], names: Sequence[str]) -> dict[tuple[str, int], list[int]]:
    """The greedy tokens of each prompt with each adapter, all asked for at once."""
    heard = {(name, index): Heard() for index in range(len(prompts)) for name in names}
    sampling = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)
    for (name, index), listener in heard.items():
        engine.submit(Request(f"{name} {index} {time.monotonic()}", prompts[index], sampling, adapter=name), listener)
    assert all(listener.done.wait(300) for listener in heard.values())
    return {key: listener.tokens() for key, listener in heard.items()}


def assert_as_merged(told: dict, prompts: Sequence[tuple[int, ...]], mesh=()) -> None:
    """Every text is that of the merged model, and no two adapters say the same."""
    for name in {name for name, _ in told}:
        model = adapted(name, mesh=mesh)[1] if name else opened("grouped", mesh)
        for index, text in enumerate(references(model, prompts)):
            assert len(text) > 4
            assert told[name, index][: len(text)] == text, (name, index)
    assert len({tuple(tokens) for (_, index), tokens in told.items() if index == 0}) == len({name for name, _ in told})


@pytest.fixture(scope="module")
def beside():
    """An engine with two adapters, a place for a third, and proposals."""
    options = EngineOptions(**ROOM, speculation="ngram", drafted=3, max_adapters=3, max_adapter_rank=4)
    engine = Engine(opened("grouped"), options, adapters=tuple(adapted(kind)[2] for kind in KINDS[:2]))
    engine.start()
    yield engine
    assert engine.stop(20)


def test_a_mixed_batch_is_each_adapter_alone_and_an_adapter_comes_and_goes(beside):
    prompts = [PROMPT, PROMPT[:5], (*PROMPT, *range(40, 60))]
    with pytest.raises(ValueError, match="the adapter 'dora' is not here"):
        mixed(beside, prompts, ["dora"])
    assert_as_merged(mixed(beside, prompts, ["", *KINDS[:2]]), prompts)
    beside.load_adapter(adapted("dora")[2])
    told = mixed(beside, prompts, ["", *KINDS])
    assert_as_merged(told, prompts)
    assert mixed(beside, prompts, ["", *KINDS]) == told  # now with every prompt in the cache
    with pytest.raises(ValueError, match="all 3 places of adapters are taken: lora, attention, dora"):
        beside.load_adapter(adapted("adalora")[2])
    beside.adapters.unload("lora")
    beside.load_adapter(adapted("adalora")[2])
    assert_as_merged(mixed(beside, prompts, ["adalora", "dora"]), prompts)
    state = beside.state()
    assert state.compiles == 0
    assert state.accepted_tokens > 0
    assert state.cached_prompt_tokens > 0
    assert set(state.adapters) == {"attention", "dora", "adalora"}
    assert state.adapters["dora"].ended == 9


def test_without_an_adapter_nothing_is_changed(beside, engine):
    """Log-probabilities are those of an engine that knows no adapters."""
    told = [ask(one, "plain", PROMPT, max_tokens=16, logprobs=2) for one in (beside, engine)]
    ours, theirs = ([p.logprob for piece in heard.pieces[0] for p in piece.logprobs] for heard in told)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)


def test_blocks_are_shared_by_requests_of_one_adapter_alone(beside):
    """The second request with a prompt finds it in the cache if its adapter is that of the first."""
    prompt, found = tuple(range(100, 130)), []
    for name in ("", "attention", "", "attention", "dora"):
        heard = Heard()
        request = Request(f"{len(found)} of {name}", prompt, Sampling(max_tokens=2, ignore_eos=True), adapter=name)
        beside.submit(request, heard)
        assert heard.done.wait(60)
        found.append(heard.pieces[0][0].cached_tokens)
    assert found == [0, 0, 28, 28, 0]


@pytest.mark.long
def test_a_mesh_changes_nothing():
    mesh, prompts = (("tensor", 2),), [PROMPT, PROMPT[:7]]
    engine = Engine(opened("grouped", mesh), EngineOptions(**ROOM), adapters=(adapted("lora", mesh=mesh)[2],))
    engine.start()
    assert_as_merged(mixed(engine, prompts, ["", "lora"]), prompts, mesh)
    assert engine.state().compiles == 0
    assert engine.stop(10)


# ------------------------------------------------------------------------------------------------------------ the books


def adapter(name: str, rank: int = 2) -> Adapter:
    return Adapter(name, None, f"digest of {name}", rank, {"ffn/up": {}})


@given(st.lists(st.tuples(st.sampled_from("lube"), st.integers(0, 3)), max_size=40))
def test_a_place_is_given_anew_only_when_nobody_uses_it(acts):
    """Any order of loading, unloading, beginning and ending: no request ever sees its place change hands."""
    books, held, names = AdapterBooks(2, 4, frozenset({"ffn/up"})), [], "abcd"
    owner = {}
    for act, which in acts:
        name = names[which]
        try:
            if act == "l":
                place = books.take(adapter(name))
                assert place.number not in {sequence.place for sequence, _ in held}
                books.fill(place, lambda number, values, name=name: owner.update({number: name}))
            elif act == "u":
                books.unload(name)
                assert name not in [one.name for one in books.open()]
            elif act == "b":
                sequence = Tokens([1], 2)
                books.hold(name, [sequence])
                held.append((sequence, name))
            elif held:
                books.release(held.pop(which % len(held))[0].place)
        except ValueError:
            assert act in "lub"
        assert all(owner[sequence.place] == name for sequence, name in held)
        assert len(books.open()) <= 2


def test_what_does_not_fit_is_one_clear_line():
    books = AdapterBooks(1, 4, frozenset({"ffn/up"}))
    with pytest.raises(ValueError, match="a has rank 5, and there is room for 4"):
        books.take(adapter("a", 5))
    with pytest.raises(ValueError, match="'a,b' is no name"):
        books.take(adapter("a,b"))
    with pytest.raises(ValueError, match="max_adapters=2: say max_adapter_rank, too"):
        Engine(opened("grouped"), EngineOptions(**ROOM, max_adapters=2))
    two = tuple(adapted(kind)[2] for kind in KINDS[:2])
    with pytest.raises(ValueError, match="2 adapters are more than max_adapters=1"):
        Engine(opened("grouped"), EngineOptions(**ROOM, max_adapters=1), adapters=two)
    failing = books.take(adapter("a"))
    with pytest.raises(ValueError, match="there is an adapter 'a' already"):
        books.take(adapter("a"))
    with pytest.raises(RuntimeError):
        books.fill(failing, lambda number, values: (_ for _ in ()).throw(RuntimeError("no memory")))
    assert not books.open()
    books.fill(books.take(adapter("a")), lambda number, values: None)


@given(tokens=st.lists(st.integers(0, 3), min_size=8, max_size=24))
def test_no_block_has_the_same_name_under_two_salts(tokens):
    blocks = Blocks(8, 4)
    plain, salted, other = (blocks.names(tokens, salt=salt) for salt in (b"", adapter("a").salt, adapter("b").salt))
    assert not {*plain} & {*salted}
    assert not {*other} & {*salted}
    assert blocks.names(tokens, salted[:1], adapter("a").salt) == salted
