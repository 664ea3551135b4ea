"""What Prometheus is told of a server: names, values, and nothing that it must not know."""

import asyncio
import urllib.request

import httpx
import pytest
from doubles import EngineDouble, OpenGate
from prometheus_client.parser import text_string_to_metric_families

from runtime.exit_codes import MISTAKE
from serving.__main__ import main
from serving.app import create_app
from serving.seen import Seen
from serving.service import Service
from serving.timings import Timings

# what the model-server protocol of the Gateway API's inference extension reads, and vLLM's dashboards draw
PROTOCOL = {
    "vllm:num_requests_waiting": "gauge",
    "vllm:num_requests_running": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:cache_config_info": "gauge",
}
DRAWN = {
    "vllm:gpu_cache_usage_perc": "gauge",
    "vllm:num_preemptions": "counter",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:request_success": "counter",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:time_per_output_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_prefill_time_seconds": "histogram",
    "vllm:request_decode_time_seconds": "histogram",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram",
}
SECRET = "a-prompt-nobody-may-see"


@pytest.fixture(scope="module")
def seen():
    """A watch whose metrics are also read at a port of their own, over a server that has answered a few requests."""
    engine, gate, seen = EngineDouble(seconds=0.002), OpenGate(), Seen("127.0.0.1", 0, None)
    assert seen.text() == ""  # while a model is being read
    service = Service(engine, "double", "d0" * 32)
    app = create_app(service, gate, [seen.over(service)])
    engine.start()

    async def asked():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            headers = {"authorization": f"Bearer sk-{SECRET}", "x-request-id": SECRET, "x-tenant": SECRET}
            ask = lambda **body: client.post("/v1/completions", json={"model": "double", **body}, headers=headers)
            await asyncio.gather(*(ask(prompt=SECRET, max_tokens=8) for _ in range(3)))
            await ask(prompt=[SECRET, SECRET], max_tokens=4, n=2)
            await ask(prompt=SECRET, max_tokens=5, stream=True)
            await ask(prompt=SECRET, max_tokens=-1)
            for number in range(30):
                await client.get(f"/{SECRET}/{number}", headers=headers)
                await client.request(f"{SECRET}{number}".upper(), "/v1/models", headers=headers)
            seen.answer = await client.get("/metrics")

    asyncio.run(asked())
    seen.gate, seen.engine = gate, engine
    yield seen
    engine.stop()
    seen.close()


def families(text: str) -> dict:
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(text: str, name: str, **labels: str) -> float:
    samples = (s for family in families(text).values() for s in family.samples)
    (found,) = (s.value for s in samples if s.name == name and labels.items() <= s.labels.items())
    return found


def test_names_types_and_labels_are_those_that_others_read(seen):
    found = families(seen.text())
    for name, kind in (PROTOCOL | DRAWN).items():
        assert found[name].type == kind, name
        assert all(sample.labels["model_name"] == "double" for sample in found[name].samples)
    (cache,) = found["vllm:cache_config_info"].samples
    assert (cache.labels["block_size"], cache.labels["num_gpu_blocks"], cache.value) == ("16", "64", 1)
    assert {s.labels["finished_reason"] for s in found["vllm:request_success"].samples} == {
        *("stop", "length", "abort", "error")
    }


def test_counts_are_those_of_the_requests(seen):
    text = seen.text()
    assert value(text, "vllm:request_success_total", finished_reason="length") == 3 + 4 + 1
    assert value(text, "vllm:generation_tokens_total") == 3 * 8 + 4 * 4 + 5
    assert value(text, "vllm:time_to_first_token_seconds_count") == 3 + 2 + 1  # a request to the engine each
    assert value(text, "vllm:e2e_request_latency_seconds_count") == 6
    assert value(text, "vllm:request_generation_tokens_sum") == 3 * 8 + 4 * 4 + 5
    assert value(text, "vllm:request_prompt_tokens_count") == 5  # HTTP requests
    ok = {"method": "POST", "handler": "/v1/completions"}
    assert value(text, "http_requests_total", status="200", **ok) == 5
    assert value(text, "http_requests_total", status="400", **ok) == 1
    assert value(text, "http_request_duration_seconds_count", **ok) == 6
    for name in ("vllm:time_per_output_token_seconds", "vllm:inter_token_latency_seconds"):
        gaps = value(text, f"{name}_count")
        assert gaps == 3 * 7 + 4 * 3 + 4  # every token but the first of a text
        assert value(text, f"{name}_sum") / gaps < 0.1


def test_no_secret_is_told_and_unknown_paths_and_methods_are_one(seen):
    text = seen.text()
    assert SECRET not in text
    assert SECRET.upper() not in text
    assert "req-" not in text
    assert value(text, "http_requests_total", handler="none", status="404") == 30
    methods = {s.labels["method"] for s in families(text)["http_requests"].samples}
    assert methods == {"GET", "POST", "other"}
    allowed = {"model_name", "finished_reason", "block_size", "num_gpu_blocks", "kind", "le", "digest"}
    allowed |= {"method", "handler", "status"}
    assert {label for f in families(text).values() for s in f.samples for label in s.labels} <= allowed


def test_the_route_wants_its_permission_and_the_port_only_to_be_reached(seen):
    assert seen.answer.status_code == 200
    assert seen.answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "metrics" in seen.gate.allowed
    with urllib.request.urlopen(f"http://127.0.0.1:{seen.port}/metrics", timeout=10) as answer:
        assert families(answer.read().decode()).keys() == families(seen.answer.text).keys()


# ------------------------------------------------------------------------------------------------ times of the engine


class Clock:
    """Moves when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def timed():
    clock, firsts, gaps = Clock(), [], []
    told = lambda seconds, tokens: gaps.append((round(seconds, 6), tokens))
    return Timings(firsts.append, told, lambda *_: None, clock), clock, firsts, gaps


def test_gaps_are_the_times_between_tokens_of_a_text():
    timings, clock, firsts, gaps = timed()
    timings.queued("a-0")
    clock.now = 1.0
    timings.began("a-0", 3)
    clock.now = 2.0
    timings.first_token("a-0")
    timings.stepped("read", 1.0, 10)
    clock.now = 2.5
    timings.stepped("decode", 0.5, 1)  # half a second after its first
    timings.queued("b-0")
    timings.began("b-0", 0)
    clock.now = 4.0
    timings.first_token("b-0")
    timings.stepped("read", 1.5, 99)  # a holds still while b's prompt is read
    clock.now = 4.5
    timings.finished("a-0", "length")
    timings.stepped("decode", 0.5, 2)
    clock.now = 5.0
    timings.stepped("decode", 0.5, 1)
    assert firsts == [2.0, 1.5]
    assert gaps == [(0.5, 1), (2.0, 1), (0.5, 1), (0.5, 1)]
    (a,) = timings.take("a", 1)
    assert (a.queued, a.began, a.first, a.ended, a.cached_tokens) == (0.0, 1.0, 2.0, 4.5, 3)


def test_several_tokens_at_once_share_the_time_since_the_one_before():
    timings, clock, _, gaps = timed()
    timings.queued("a-0")
    timings.first_token("a-0")
    clock.now = 1.0
    timings.stepped("decode", 1.0, 4)  # three of them were proposed, and accepted
    assert gaps == [(0.25, 4)]


def test_whoever_goes_away_is_forgotten():
    timings, _clock, _, gaps = timed()
    for number in range(100):
        for part in range(2):
            timings.queued(f"{number}-{part}")
            timings.first_token(f"{number}-{part}")
        assert len(timings.take(str(number), 2)) == 2
        timings.finished(f"{number}-0", "aborted")  # the engine's word comes later, or never
    timings.queued("last-0")
    timings.stepped("decode", 1.0, 0)
    assert set(timings._open) == {"last-0"}
    gaps.clear()
    timings.stepped("decode", 1.0, 0)
    assert gaps == []
    assert timings.take("nobody", 0) == []


def test_what_is_over_before_the_engine_has_seen_it_is_forgotten():
    timings, _clock, _, _ = timed()
    for number in range(10):
        timings.queued(f"{number}-0")
        assert len(timings.take(str(number), 3)) == 1
        for part in (1, 2):  # they were in the inbox
            timings.queued(f"{number}-{part}")
            timings.finished(f"{number}-{part}", "aborted")
    timings.queued("last-0")
    assert (set(timings._open), timings._late) == ({"last-0"}, set())


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--metrics-host", "192.0.2.1", "--metrics-port", "0"], "--metrics-host 192.0.2.1 cannot be listened on"),
        (["--traces", "collector:4318"], "--traces collector:4318 is no address: it is like http://127.0.0.1:4318"),
        (["--traces", "ftp://u:secret@here"], "--traces here is no address"),
        (["--metrics-port", "70000"], "70000 is no port: they are 0 to 65535"),
    ],
)
def test_a_mistake_is_one_line_before_a_model_is_read(options, said, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    try:
        code = main([str(tmp_path), "--port", "0", "--state", str(tmp_path / "state"), *options])
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err
    assert code == MISTAKE
    assert said in error.splitlines()[-1]
    assert "secret" not in error
    assert "Traceback" not in error
