"""Adapters as clients meet them: the field `model`, the list of models, who may use which, loading, metrics."""

from pathlib import Path

import numpy as np
import pytest
from guarded import guarded
from prometheus_client.parser import text_string_to_metric_families

from inference.adapter_books import Adapter, AdapterBooks
from serving.__main__ import main
from serving.metrics import Metrics

POLICY = """
p, writer, completions, poems
p, writer, models, poems
p, writer, adapters, *
"""


def adapter(name: str) -> Adapter:
    return Adapter(name, Path(name), f"digest of {name}", 2, {"ffn/up": {"a": np.zeros((1, 4, 2), np.float32)}}, 7)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server with the adapters `poems` and `laws`, and a place for a third."""
    with guarded(tmp_path_factory.mktemp("served"), policy=POLICY) as server:
        books = server.engine.adapters = AdapterBooks(3, 2, frozenset({"ffn/up"}))
        for name in ("poems", "laws"):
            books.fill(books.take(adapter(name)), lambda number, values: None)
        yield server
        server.engine.stop()


def test_the_field_model_chooses_and_answers_name_what_answered(server):
    key = server.key()
    for model, adapter in ((None, ""), ("double", ""), ("poems", "poems"), ("laws", "laws")):
        told = server.complete(key, **({} if model is None else {"model": model})).json
        assert told["model"] == (model or "double")
        assert server.engine.submitted[-1].adapter == adapter
    prints = {server.complete(key, model=model).json["system_fingerprint"] for model in ("double", "poems", "laws")}
    assert len(prints) == 3
    body = {"model": "poems", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    told = server.ask(key, "POST", "/v1/chat/completions", body).json
    assert (told["model"], server.engine.submitted[-1].adapter) == ("poems", "poems")
    refused = server.complete(key, model="poem")
    assert refused.status == 404
    assert refused.message == "the model 'poem' is not here; there is 'double'; /v1/models has its adapters"


def test_the_list_has_adapters_with_their_parent(server):
    key = server.key()
    found = {model["id"]: model for model in server.ask(key, "GET", "/v1/models").json["data"]}
    assert {name: model["parent"] for name, model in found.items()} == {
        "double": None,
        "poems": "double",
        "laws": "double",
    }
    assert len({model["root"] for model in found.values()}) == 3
    assert server.ask(key, "GET", "/v1/models/laws").json == found["laws"]


def test_roles_and_keys_are_for_adapters_by_name(server):
    writer, laws = server.key("writer"), server.key(models=("laws",))
    assert server.complete(writer, model="poems").status == 200
    for model in ("double", "laws"):
        assert server.complete(writer, model=model).status == 403
    assert server.complete(writer).status == 403
    assert [server.complete(laws, model=model).status for model in ("laws", "poems", "double")] == [200, 403, 403]
    assert [model["id"] for model in server.ask(laws, "GET", "/v1/models").json["data"]] == ["laws"]
    assert server.ask(laws, "GET", "/v1/models/poems").status == 404
    used = [record["model"] for record in server.records() if record["action"] == "completions"]
    assert used[-3:] == ["laws", "poems", "double"]


def test_vectors_are_of_the_base_alone(server, monkeypatch):
    monkeypatch.setattr(server.engine, "embeds", True)
    embed = lambda key, model: server.ask(key, "POST", "/v1/embeddings", {"model": model, "input": "hello"})
    key, submitted = server.key(models=("poems",)), len(server.engine.submitted)
    assert (embed(key, "double").status, embed(key, "poems").status) == (403, 400)
    assert embed(server.key(), "poems").message == "the adapter 'poems' only writes text: 'double' answers here"
    assert len(server.engine.submitted) == submitted
    assert embed(server.key(), "double").status == 200


def test_adapters_come_and_go_by_who_may(server, monkeypatch):
    service, admin, user = server.app.state.service, server.key("admin"), server.key()
    body = {"lora_name": "songs", "lora_path": "runs/songs"}
    load = lambda key, **more: server.ask(key, "POST", "/v1/load_lora_adapter", body | more)
    unload = lambda key, name: server.ask(key, "POST", "/v1/unload_lora_adapter", {"lora_name": name})
    assert load(user).status == unload(user, "poems").status == 403
    assert "--max-adapters" in load(admin).message

    def read(name: str, folder: Path) -> None:
        if folder != Path("runs/songs"):
            raise ValueError(f"{folder} is no run directory")
        books = server.engine.adapters
        books.fill(books.take(adapter(name)), lambda number, values: None)

    monkeypatch.setattr(service, "load", read)
    told = load(admin)
    assert (told.status, told.json["id"], told.json["parent"]) == (200, "songs", "double")
    assert server.complete(user, model="songs").status == 200
    assert load(admin).message == "there is an adapter 'songs' already: unload it first"
    assert load(admin, lora_path="elsewhere").message == "elsewhere is no run directory"
    assert load(admin, lora_name="more").message == "all 3 places of adapters are taken: poems, laws, songs"
    assert load(admin, lora_name="double").message == "double is the model itself"
    assert unload(admin, "songs").json["id"] == "songs"
    assert unload(admin, "songs").status == server.complete(user, model="songs").status == 404
    assert [r["decision"] for r in server.records() if r["action"] == "adapters"][:2] == ["deny", "deny"]
    done = [(r["action"], r["model"]) for r in server.records() if r["action"].startswith("adapters ")]
    assert done == [("adapters load", "songs"), ("adapters unload", "songs")]


def test_metrics_have_a_label_for_each_place_at_most(server):
    text = Metrics(server.app.state.service, 16).text()
    found = {family.name: family for family in text_string_to_metric_families(text)}
    (lora,) = found["vllm:lora_requests_info"].samples
    assert lora.labels == {"max_lora": "3", "waiting_lora_adapters": "", "running_lora_adapters": ""}
    assert "isomesh_adapter_choices" in found


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--adapter", "poems"], "'poems' is not NAME=FOLDER"),
        (["--adapter", "a,b=."], "'a,b=.' is not NAME=FOLDER"),
        (["--adapter", "poems=nowhere"], "nowhere is no folder: a run's directory, or one with adapter_config.json"),
        (["--max-adapters", "0"], "0 must be 1 or more"),
    ],
)
def test_a_mistake_is_told_before_anything_is_read(options, told, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), *options])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err
