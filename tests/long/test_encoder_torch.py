"""Embeddings through the engine: those of transformers, whatever is beside them, and nothing compiles."""

import json
import threading

import jax
import numpy as np
import pytest
import torch
from tokenizers_of_all_kinds import word_piece
from transformers import BertConfig, BertModel

from inference.encoder import Pooling, pooling_of
from inference.engine import Engine
from inference.engine_options import EngineOptions
from inference.opening import find_model
from inference.requests import Busy, Encoded, EncodeRequest

VOCABULARY, REACH = 90, 64
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small BERT with the files of sentence-transformers."""
    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=REACH, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).eval().save_pretrained(path)
    word_piece().save(path / "tokenizer.json")
    write_pooling(path, "pooling_mode_mean_tokens", MODULES)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return BertModel.from_pretrained(folder).eval()


def write_pooling(path, way: str, modules) -> None:
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": 32, "pooling_mode_max_tokens": False, way: True}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def engine_of(folder, *words: str, **options) -> Engine:
    found = find_model(
        folder, [f"runtime.cpu_devices={len(jax.devices())}", *(words or ("mesh.data=8", "mesh.fsdp=1"))]
    )
    engine = Engine(found.open(), EngineOptions(max_running=4) if not options else EngineOptions(**options))
    engine.start()
    return engine


@pytest.fixture(scope="module")
def engine(folder):
    engine = engine_of(folder)
    yield engine
    assert engine.stop(5)


def vectors_of(engine, sequences, then=None) -> list[Encoded]:
    """Sent all at once."""
    heard, done = {}, threading.Semaphore(0)

    def listener(index):
        def hear(answer):
            heard[index] = answer
            done.release()

        return hear

    for index, tokens in enumerate(sequences):
        engine.submit(EncodeRequest(f"{id(sequences)}-{index}", tuple(tokens)), listener(index))
    if then is not None:
        then()
    for _ in sequences:
        assert done.acquire(timeout=60)
    return [heard[index] for index in range(len(sequences))]


def sequences(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, int(rng.integers(1, REACH + 1))).tolist() for _ in range(count)]


def theirs(model, tokens) -> np.ndarray:
    with torch.no_grad():
        x = model(torch.tensor([tokens])).last_hidden_state[0].mean(0)
    return torch.nn.functional.normalize(x, dim=0).numpy()


def test_embeddings_are_those_of_transformers_and_nothing_compiles(engine, model):
    asked = [*sequences(30), [5], list(range(3, 3 + REACH))]
    for tokens, answer in zip(asked, vectors_of(engine, asked), strict=True):
        assert answer.error is None
        np.testing.assert_allclose(answer.vector, theirs(model, tokens), rtol=0, atol=1e-5)
    state = engine.state()
    assert (state.compiles, state.waiting, state.ready) == (0, 0, True)
    assert state.finished["stop"] >= len(asked)


def test_a_vector_depends_on_its_own_tokens_alone(engine):
    asked = sequences(12, seed=3)
    together = vectors_of(engine, asked)
    for tokens, answer in zip(asked, together, strict=True):
        np.testing.assert_allclose(vectors_of(engine, [tokens])[0].vector, answer.vector, rtol=0, atol=2e-6)


def test_a_mesh_gives_the_same(folder, model):
    engine = engine_of(folder, "mesh.tensor=2", "mesh.fsdp=4", max_running=4)
    for tokens, answer in zip(asked := sequences(6, seed=4), vectors_of(engine, asked), strict=True):
        np.testing.assert_allclose(answer.vector, theirs(model, tokens), rtol=0, atol=1e-5)
    assert engine.state().compiles == 0
    assert engine.stop(5)


def test_what_has_no_vector_is_told(engine):
    for tokens, told in (
        ([], "0 tokens"),
        ([3] * (REACH + 1), "1 to 64"),
        ([VOCABULARY], "outside"),
        ([-1], "outside"),
    ):
        with pytest.raises(ValueError, match=told):
            engine.submit(EncodeRequest("x", tuple(tokens)), print)
    assert vectors_of(engine, [[4]])[0].error is None


def test_an_abort_and_a_stop_answer_what_waits(folder):
    engine = engine_of(folder, max_running=1, max_waiting=40)
    heard, done = [], threading.Event()
    hold = lambda answer: done.wait(60)  # the engine's thread waits here
    engine.submit(EncodeRequest("first", (5,)), hold)
    for index in range(10):
        engine.submit(EncodeRequest(f"later{index}", (5,) * 20), heard.append)
    engine.abort("later9")
    done.set()
    assert engine.stop(30)
    assert len(heard) == 10
    assert sum(answer.error == "aborted" for answer in heard) == 1
    assert sum(len(answer.vector) == 32 for answer in heard) == 9
    with pytest.raises(Busy):
        engine.submit(EncodeRequest("late", (5,)), heard.append)


@pytest.mark.parametrize(
    ("way", "modules", "expected"),
    [
        ("pooling_mode_mean_tokens", MODULES[:2], Pooling("mean", unit=False)),
        ("pooling_mode_cls_token", MODULES, Pooling("first", unit=True)),
        ("pooling_mode_lasttoken", MODULES, Pooling("last", unit=True)),
        ("pooling_mode_max_tokens", MODULES, Pooling("max", unit=True)),
        ("pooling_mode_weightedmean_tokens", MODULES, "weightedmean"),
        (
            "pooling_mode_mean_tokens",
            [*MODULES, {"path": "3_Dense", "type": "sentence_transformers.models.Dense"}],
            "Dense",
        ),
        ("pooling_mode_mean_tokens", MODULES[:1], "no module Pooling"),
    ],
)
def test_the_pooling_is_what_the_folder_says(tmp_path, way, modules, expected):
    assert pooling_of(tmp_path) == Pooling("mean", unit=True)
    write_pooling(tmp_path, way, modules)
    if isinstance(expected, Pooling):
        assert pooling_of(tmp_path) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            pooling_of(tmp_path)


def test_a_head_of_classes_is_refused(folder, tmp_path):
    for file in folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["BertForSequenceClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modules.json").unlink()
    with pytest.raises(ValueError, match="no such head of classes"):
        Engine(find_model(tmp_path, [f"runtime.cpu_devices={len(jax.devices())}", "mesh.data=8", "mesh.fsdp=1"]).open())
