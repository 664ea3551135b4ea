"""Files and batches as the `openai` package sees them, and as somebody who means no good does."""

import asyncio
import contextlib
import io
import json
import time

import httpx
import openai
import pytest
from doubles import EngineDouble, OpenGate, keeping, listening, until
from engines import opened
from guarded import guarded

from inference.engine import Engine
from inference.engine_options import EngineOptions
from serving.batches import store as kept
from serving.batches.multipart import plain_name


def line(name, url="/v1/completions", **body):
    asked = {"prompt": f"prompt of {name}", "max_tokens": 3} | body
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": asked})


@contextlib.contextmanager
def server(folder, engine=None, gate=None):
    """A server that keeps files, and clients of it by tenant."""
    engine = engine or EngineDouble()
    app = keeping(folder, engine, gate or OpenGate())
    with listening(app) as address, contextlib.ExitStack() as clients:

        def client(tenant="anna"):
            made = openai.OpenAI(
                base_url=f"{address}/v1", api_key="any", max_retries=0, default_headers={"x-tenant": tenant}
            )
            return clients.enter_context(made)

        yield client, app


def uploaded(client, *lines, name="in.jsonl"):
    content = "\n".join(lines).encode()
    return client.files.create(file=(name, content), purpose="batch")


def begun(client, file, endpoint="/v1/completions", **more):
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more)


def over(client, batch, seconds=60.0):
    until(lambda: client.batches.retrieve(batch.id).status in ("completed", "failed", "expired", "cancelled"), seconds)
    return client.batches.retrieve(batch.id)


def lines_of(client, id):
    return [json.loads(text) for text in client.files.content(id).text.splitlines()] if id else []


def test_a_batch_of_a_model_through_the_openai_package(tmp_path):
    """Each answer is that of the same live request; a request that cannot be is among the errors."""
    cut = EngineOptions(max_running=4, block=4, chunk=16, cache_tokens=160, pooling="none")
    engine = Engine(opened("grouped"), cut)
    with server(tmp_path, engine) as (client, _):
        client = client()
        asked = {name: {"prompt": name * 5, "temperature": 0} for name in ("a", "b", "c")}
        file = uploaded(client, *(line(name, **body) for name, body in asked.items()), line("bad", max_token=3))
        assert (file.purpose, file.filename, file.status) == ("batch", "in.jsonl", "processed")
        batch = over(client, begun(client, file, metadata={"of": "a test"}))
        assert (batch.status, batch.metadata, batch.input_file_id) == ("completed", {"of": "a test"}, file.id)
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (4, 3, 1)
        told = {one["custom_id"]: one["response"]["body"] for one in lines_of(client, batch.output_file_id)}
        for name, body in asked.items():
            live = client.completions.create(model=None, max_tokens=3, **body)
            assert told[name]["choices"][0]["text"] == live.choices[0].text
            assert told[name]["usage"]["completion_tokens"] == live.usage.completion_tokens
        (bad,) = lines_of(client, batch.error_file_id)
        assert (bad["custom_id"], bad["response"]["status_code"]) == ("bad", 400)
        ids = {one.id for one in client.files.list()}
        assert ids == {file.id, batch.output_file_id, batch.error_file_id}
        assert [one.id for one in client.files.list(purpose="batch")] == [file.id]
        assert [one.id for one in client.batches.list(limit=1)] == [batch.id]
        assert client.files.delete(file.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file.id)
    assert engine.state().compiles == 0


def test_lists_are_given_out_by_pages(tmp_path):
    with server(tmp_path) as (client, _):
        client = client()
        made = [uploaded(client, line("x"), name=f"{number}.jsonl").id for number in range(5)]
        assert sorted(file.id for file in client.files.list(limit=2)) == sorted(made)  # the package turns the pages
        first = client.files.list(limit=2, order="asc")
        assert (len(first.data), first.has_more) == (2, True)
        for wrong in ({"limit": 0}, {"after": "file-x"}, {"extra_query": {"page": 2}}):
            with pytest.raises(openai.BadRequestError):
                client.files.list(**wrong)


def test_another_tenant_finds_nothing_and_changes_nothing(tmp_path):
    with server(tmp_path, EngineDouble(seconds=0.05)) as (client, _):
        anna, bob = client("anna"), client("bob")
        file = uploaded(anna, *(line(str(number), max_tokens=50) for number in range(20)))
        batch = begun(anna, file)
        for act in (
            lambda: bob.files.retrieve(file.id),
            lambda: bob.files.content(file.id),
            lambda: bob.files.delete(file.id),
            lambda: begun(bob, file),
            lambda: bob.batches.retrieve(batch.id),
            lambda: bob.batches.cancel(batch.id),
        ):
            with pytest.raises(openai.NotFoundError) as caught:
                act()
            assert "anna" not in str(caught.value.body)
        assert list(bob.files.list()) == list(bob.batches.list()) == []
        assert anna.batches.retrieve(batch.id).status in ("validating", "in_progress")
        with pytest.raises(openai.ConflictError, match="cancel it first"):
            anna.files.delete(file.id)
        assert anna.batches.cancel(batch.id).status == "cancelling"
        ended = over(anna, batch)
        assert ended.status == "cancelled"
        assert ended.request_counts.completed == len(lines_of(anna, ended.output_file_id)) < 20
        with pytest.raises(openai.ConflictError, match="cancelled already"):
            anna.batches.cancel(batch.id)


@pytest.mark.parametrize(
    ("lines", "code", "number"),
    [
        ([line("a"), "no JSON"], "invalid_line", 2),
        ([line("a"), line("a")], "invalid_line", 2),
        (["[1]"], "invalid_line", 1),
        ([line("a"), line("b", "/v1/embeddings")], "mismatched_endpoint", 2),
        ([line("a", "/drain")], "invalid_line", 1),
        ([line("a", stream=True)], "invalid_line", 1),
        (["", " "], "empty_file", None),
        ([line("a"), '{"custom_id": "' + "x" * (5 << 20) + '"}'], "invalid_line", 2),
        (["[" * 200_000], "invalid_line", 1),
    ],
    ids=["no JSON", "twice", "no object", "endpoint", "route", "stream", "empty", "gigantic", "deep"],
)
def test_a_file_that_is_none_of_requests_ends_its_batch_before_anything_runs(tmp_path, lines, code, number):
    gate = OpenGate()
    with server(tmp_path, gate=gate) as (client, _):
        client = client()
        batch = over(client, begun(client, uploaded(client, *lines)))
        assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
        assert (batch.errors.data[0].code, batch.errors.data[0].line) == (code, number)
        assert gate.admissions == []


def test_what_cannot_be_uploaded_or_begun_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("serving.api.files.MOST_FILE_BYTES", 1000)
    monkeypatch.setattr(kept, "MOST_FILES", 3)
    monkeypatch.setattr(kept, "MOST_BYTES", 1500)
    with server(tmp_path) as (client, app):
        anna = client()
        with pytest.raises(openai.APIStatusError) as caught:
            uploaded(anna, "x" * 1001)
        assert caught.value.status_code == 413
        with pytest.raises(openai.BadRequestError, match="purpose='fine-tune' is not supported: batch is"):
            anna.files.create(file=("a", b"x"), purpose="fine-tune")
        with pytest.raises(openai.BadRequestError, match="empty"):
            anna.files.create(file=("a", b""), purpose="batch")
        file = uploaded(anna, "x" * 900)
        with pytest.raises(openai.APIStatusError, match="your files would have 1800 bytes, at most 1500 may be"):
            uploaded(anna, "x" * 900)
        uploaded(client("bob"), "x" * 900)  # each has a share of their own
        for _ in range(2):
            uploaded(anna, "x")
        with pytest.raises(openai.BadRequestError, match="3 files are kept for you, at most 3"):
            uploaded(anna, "x")
        with pytest.raises(openai.BadRequestError, match=r"'/drain' is none of /v1/chat/completions"):
            begun(anna, file, "/drain")
        for strange in ("../" * 3 + "access.db", "file-" + "0" * 24, "file-" + "%2e%2e%2f" * 3, "x" * 50):
            with pytest.raises(openai.NotFoundError):
                anna.batches.create(input_file_id=strange, endpoint="/v1/completions", completion_window="24h")
            with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
                anna.get(f"/files/{strange}/content", cast_to=object)
        assert not list((tmp_path / "incoming").iterdir())  # nothing of what was refused is left


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("multipart/form-data; boundary=b", b"", 400),
        ("multipart/form-data", b"--b\r\n\r\n", 400),
        ("multipart/form-data; boundary=b", b"--b", 400),
        ("multipart/form-data; boundary=b", b"--b\r\n\r\nno headers and no end", 400),
        ("multipart/form-data; boundary=b", b"--b\r\nX: " + b"y" * 9000 + b"\r\n\r\nx\r\n--b--", 400),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n1\r\n' * 40, 400),
        ("multipart/form-data; boundary=" + "b" * 71, b"x", 400),
        ("application/json", b"{}", 415),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n1\r\n--b--',
            400,
        ),
    ],
)
def test_forms_that_are_none(tmp_path, kind, body, status):
    async def ask():
        app = keeping(tmp_path, EngineDouble())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            answer = await client.post("/v1/files", content=body, headers={"content-type": kind})
        app.state.service.engine.stop()
        return answer

    answer = asyncio.run(ask())
    assert (answer.status_code, set(answer.json()["error"])) == (status, {"message", "type", "param", "code"})
    assert not list((tmp_path / "incoming").iterdir())


def test_a_name_is_never_a_path(tmp_path):
    for name in ("../../etc/passwd", "..\\..\\passwd", "/etc/passwd", "a/../passwd", "passwd\x00\n"):
        assert plain_name(name) == "passwd"
    assert plain_name("..") == plain_name("") == plain_name("/") == "unnamed"
    with server(tmp_path) as (client, _):
        client = client()
        assert uploaded(client, line("x"), name="../../../x.jsonl").filename == "x.jsonl"
        content = io.BytesIO(b'{"a": "--boundary\r\n--"}\r\n\r\n')
        file = client.files.create(file=("a", content), purpose="batch")
        assert client.files.content(file.id).content == content.getvalue()  # to the byte
    assert {len(path.name) for path in tmp_path.iterdir() if path.name != "incoming"} == {32}  # digests of tenants


def test_it_goes_on_after_a_restart_and_answers_no_line_twice(tmp_path):
    count, gate = 60, OpenGate()
    with server(tmp_path, EngineDouble(seconds=0.02), gate) as (client, _):
        anna = client()
        batch = begun(anna, uploaded(anna, *(line(str(number), max_tokens=2) for number in range(count))))
        mark = next(tmp_path.glob("*/batches/*.open"))
        assert until(lambda: mark.with_suffix(".lines").exists() and mark.with_suffix(".lines").stat().st_size > 3000)
    before = len(mark.with_suffix(".lines").read_text().splitlines())
    assert 0 < before < count, "it was to be stopped in the midst"
    with mark.with_suffix(".lines").open("a") as file:
        file.write('{"line": 99, "custom_id": "half')  # as of a server that was killed while it wrote
    again = OpenGate()
    with server(tmp_path, gate=again) as (client, _):
        anna = client()  # a server that starts wakes its runner; here the next batch does
        other = begun(anna, uploaded(anna, line("other")))
        ended = over(anna, batch)
        assert over(anna, other).status == "completed"
        assert (ended.status, ended.request_counts.completed) == ("completed", count)
        told = lines_of(anna, ended.output_file_id)
        assert sorted(int(one["custom_id"]) for one in told) == list(range(count))
        assert len([one for one in again.admissions if one.settled]) == count - before + 1
    assert not list(tmp_path.glob("*/batches/*.open"))
    assert {path.suffix for path in tmp_path.glob("*/batches/*")} == {".json"}


def test_whose_key_is_gone_has_no_further_line(tmp_path):
    gate = OpenGate()
    with server(tmp_path, EngineDouble(seconds=0.05), gate) as (client, _):
        anna = client()
        batch = begun(anna, uploaded(anna, *(line(str(number), max_tokens=20) for number in range(40))))
        assert until(lambda: len(gate.admissions) > 1)
        gate.gone.add("anna")
        ended = over(anna, batch)
        assert (ended.status, ended.errors.data[0].code) == ("failed", "batch_ended")
        assert "does not work any more" in ended.errors.data[0].message


def test_a_batch_that_has_no_time_left_says_so_of_each_line(tmp_path, monkeypatch):
    with server(tmp_path, EngineDouble(seconds=0.05)) as (client, _):
        anna = client()
        batch = begun(anna, uploaded(anna, *(line(str(number), max_tokens=20) for number in range(40))))
        path = next(tmp_path.glob("*/batches/*.json"))
        assert until(lambda: json.loads(path.read_text())["status"] == "in_progress")
        with monkeypatch.context() as patched:
            patched.setattr("serving.batches.runner.time.time", lambda at=time.time: at() + 25 * 3600)
            ended = over(anna, batch)
        assert ended.status == "expired"
        told = [*lines_of(anna, ended.output_file_id), *lines_of(anna, ended.error_file_id)]
        assert sorted(int(one["custom_id"]) for one in told) == list(range(40))


def asked(server, key, *lines, endpoint="/v1/completions"):
    """A batch of somebody with a key, begun; a function that says how far it is."""
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key=key, max_retries=0) as client:
        id = begun(client, uploaded(client, *lines), endpoint).id
    return lambda: server.ask(key, "GET", f"/v1/batches/{id}").json


@pytest.mark.long
def test_lines_are_charged_and_refused_as_live_requests_of_their_owner(tmp_path):
    """Tokens of both count together; a role without a route has no batch of it, nor of a key that was revoked."""
    with guarded(
        tmp_path, policy="p, embedder, batches, *\np, embedder, files, *\np, embedder, embeddings, *\n"
    ) as server:
        key = server.key(name="anna", limits={"tokens_a_day": 500})
        state = asked(server, key, *(line(str(number), prompt="x" * 50, max_tokens=50) for number in range(4)))
        assert until(lambda: state()["status"] == "completed", 20)
        used = sum(record.get("prompt_tokens", 0) + record.get("new_tokens", 0) for record in settled(server))
        live = server.complete(key, prompt="x" * 50, max_tokens=50)
        left = 500 - used
        assert live.status == (200 if left >= 100 else 429)
        other = asked(server, key, *(line(str(number), prompt="x" * 50, max_tokens=50) for number in range(9)))
        assert until(lambda: refused(server), 20), "no line was beyond the limit"
        assert other()["status"] == "in_progress"  # it waits for room
        total = sum(record.get("prompt_tokens", 0) + record.get("new_tokens", 0) for record in settled(server))
        assert total <= 500
        server.opened.keys.revoke(key[:13])
        mark = next((tmp_path / "batches").glob("*/batches/*.open"))
        assert until(lambda: not mark.exists(), 60), "it went on without a key"
        assert "does not work any more" in mark.with_suffix(".json").read_text()
        with pytest.raises(openai.PermissionDeniedError):
            asked(server, server.key("embedder"), line("a"))
        for role in ("reader", "operator"):
            answer = server.ask(server.key(role), "GET", "/v1/files")
            assert answer.status == 403


def settled(server):
    """What the audit says of lines and requests that were answered."""
    return [record for record in server.records() if record.get("status") == 200 and record["action"] == "completions"]


def refused(server):
    return [record for record in server.records() if record.get("status") == 429]
