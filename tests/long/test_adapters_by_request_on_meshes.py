"""Adapters chosen by request on meshes, on quantised bases, with experts, and with a smaller model that proposes."""

from dataclasses import replace

import pytest
from adapted import adapted
from engines import REACH, Heard, opened, references
from every import few_of

from inference.engine import Engine
from inference.engine_options import EngineOptions
from inference.requests import Request, Sampling

PROMPTS = [(3, 1, 4, 1, 5, 9, 2, 6), tuple(range(30, 57)), (7,)]
MESHES = [(("tensor", 2),), (("fsdp", 2), ("tensor", 2)), (("data", 2), ("fsdp", 2))]


def assert_as_merged(engine: Engine, kinds: list[str], model: str, mesh=()) -> None:
    heard, sampling = {}, Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)
    for kind in kinds:
        for index, prompt in enumerate(PROMPTS):
            heard[kind, index] = Heard()
            engine.submit(Request(f"{kind} {index}", prompt, sampling, adapter=kind), heard[kind, index])
    assert all(one.done.wait(600) for one in heard.values())
    for kind in kinds:
        for index, text in enumerate(references(adapted(kind, model, mesh)[1], PROMPTS)):
            assert len(text) > 4
            assert heard[kind, index].tokens()[: len(text)] == text, (kind, index)
    assert engine.state().compiles == 0


@pytest.mark.parametrize("mesh", few_of([(one,) for one in MESHES], [(MESHES[1],)]), ids=str)
@pytest.mark.parametrize("model", ["grouped", "learned-biases"])
def test_every_mesh_and_biases(model, mesh):
    kinds = ["lora", "attention", "dora", "adalora"]
    adapters = tuple(adapted(kind, model, mesh)[2] for kind in kinds)
    options = EngineOptions(max_running=4, block=4, chunk=16, cache_tokens=4 * REACH)
    engine = Engine(opened(model, mesh), options, adapters=adapters)
    engine.start()
    assert_as_merged(engine, kinds, model, mesh)
    assert engine.stop(20)


@pytest.mark.parametrize("mesh", [(), (("tensor", 2),)], ids=str)
def test_a_quantised_base(mesh):
    kinds = ["qlora", "qdora"]
    options = EngineOptions(max_running=3, block=4, chunk=16, cache_tokens=4 * REACH)
    adapters = tuple(adapted(kind, mesh=mesh)[2] for kind in kinds)
    engine = Engine(adapted("qlora", mesh=mesh)[0], options, adapters=adapters)
    engine.start()
    assert_as_merged(engine, kinds, "grouped", mesh)
    assert engine.stop(20)


def test_a_smaller_model_proposes_for_every_adapter():
    kinds = ["lora", "dora"]
    options = EngineOptions(
        max_running=4, block=4, chunk=16, cache_tokens=4 * REACH, speculation="draft", drafted=3, max_length=REACH
    )
    adapters = tuple(adapted(kind)[2] for kind in kinds)
    engine = Engine(opened("grouped"), options, draft=opened("grouped"), adapters=adapters)
    engine.start()
    assert_as_merged(engine, kinds, "grouped")
    assert engine.state().drafted_tokens > 0
    assert engine.stop(20)


def test_many_places_are_as_few():
    """With more places than rows each row's own matrices are gathered: the text is the same."""
    options = EngineOptions(
        max_running=2, block=4, chunk=16, cache_tokens=4 * REACH, max_adapters=9, max_adapter_rank=5
    )
    engine = Engine(opened("grouped"), options, adapters=(adapted("lora")[2], adapted("dora")[2]))
    engine.start()
    assert_as_merged(engine, ["lora", "dora"], "grouped")
    for number in range(7):
        engine.load_adapter(replace(adapted("attention")[2], name=f"attention-{number}"))
    assert engine.state().compiles == 0
    assert engine.stop(20)
