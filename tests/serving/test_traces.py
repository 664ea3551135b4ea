"""Traces as a collector receives them, and that one that is gone costs nothing."""

import asyncio
import http.server
import logging
import socket
import statistics
import threading
import time

import httpx
import pytest
from doubles import EngineDouble, OpenGate, until
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from serving.app import create_app
from serving.seen import Seen
from serving.service import Service
from serving.timings import Timing
from serving.traces import Traces
from serving.watch import Record

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "a-prompt-nobody-may-see"


class Collector:
    """Receives OTLP over HTTP, as a real one does, and keeps the spans."""

    def __init__(self):
        self.spans, self.resources = [], []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                raw = self.rfile.read(int(self.headers["content-length"]))
                assert (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
                for group in ExportTraceServiceRequest.FromString(raw).resource_spans:
                    collector.resources.append({a.key: a.value.string_value for a in group.resource.attributes})
                    collector.spans += [span for scope in group.scope_spans for span in scope.spans]
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *arguments):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def of(self, trace: str) -> dict:
        return {span.name: span for span in self.spans if span.trace_id.hex() == trace}


def attributes(span) -> dict:
    def plain(value):
        kind = value.WhichOneof("value")
        return [plain(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)

    return {one.key: plain(one.value) for one in span.attributes}


async def ask(app, **headers):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
        body = {"model": "double", "prompt": SECRET, "max_tokens": 6}
        return await client.post("/v1/completions", json=body, headers=headers)


@pytest.fixture
def collector():
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture
def served_with(request):
    ends = []

    def make(seen: Seen):
        engine = EngineDouble(seconds=0.01)
        service = Service(engine, "double", "d0" * 32)
        app = create_app(service, OpenGate(), [seen.over(service)])
        engine.start()
        ends.extend([engine.stop, seen.close])
        return app

    yield make
    for end in ends:
        end()


def test_a_request_is_a_trace_that_goes_on_from_its_clients(collector, served_with):
    seen = Seen("127.0.0.1", None, collector.url)
    app = served_with(seen)
    before = time.time_ns()
    asyncio.run(ask(app, traceparent=f"00-{TRACE}-{SPAN}-01", authorization=f"Bearer sk-{SECRET}"))
    asyncio.run(ask(app, traceparent=f"00-{'1' * 32}-{SPAN}-00"))  # its client does not want this one
    asyncio.run(ask(app, traceparent="nonsense\x07"))  # begins a trace of its own
    after = time.time_ns()
    seen._traces.close()
    spans = collector.of(TRACE)
    assert spans.keys() == {"POST /v1/completions", "queue", "prefill", "decode"}
    whole = spans["POST /v1/completions"]
    assert (whole.parent_span_id.hex(), whole.kind) == (SPAN, 2)  # SERVER
    phases = [spans[name] for name in ("queue", "prefill", "decode")]
    assert {span.parent_span_id for span in phases} == {whole.span_id}
    times = [before, whole.start_time_unix_nano]
    for span in phases:
        times += [span.start_time_unix_nano, span.end_time_unix_nano]
    assert times == sorted(times)
    assert whole.end_time_unix_nano <= after
    assert phases[2].end_time_unix_nano <= whole.end_time_unix_nano + 1_000_000
    assert phases[2].end_time_unix_nano - phases[2].start_time_unix_nano > 30_000_000  # five steps of 10 ms
    told = attributes(whole)
    assert told.pop("isomesh.request_id").startswith("req-")
    assert 0 < told.pop("gen_ai.response.time_to_first_chunk") < 5
    assert told == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "gen_ai.provider.name": "isomesh",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "double",
        "gen_ai.response.model": "double",
        "gen_ai.request.stream": False,
        "gen_ai.usage.input_tokens": len(SECRET),
        "gen_ai.usage.output_tokens": 6,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ["length"],
    }
    assert collector.of("1" * 32) == {}
    assert len({span.trace_id for span in collector.spans}) == 2
    assert SECRET not in str(collector.spans)
    assert collector.resources[0]["service.name"] == "isomesh"


def test_the_environment_names_a_collector_too(collector, served_with, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    seen = Seen("127.0.0.1", None, None)
    asyncio.run(ask(served_with(seen)))
    seen._traces.close()
    assert "prefill" in {span.name for span in collector.spans}


def test_refusals_and_faults_are_traces_without_phases(collector):
    traces = Traces(collector.url, {})
    refused = Record("req-1", "POST", "/v1/completions", "", None, route="/v1/completions", status=400)
    failed = Record("req-2", "POST", "/v1/completions", "", None, route="/v1/completions", status=500, fault="KeyError")
    for record in (refused, failed):
        traces.request(record, [])
    traces.close()
    by_status = {attributes(span)["http.response.status_code"]: span for span in collector.spans}
    assert by_status[400].status.code == 0  # the client's mistake is no error of the server
    assert by_status[500].status.code == 2
    assert attributes(by_status[500])["error.type"] == "KeyError"


def test_a_collector_that_is_gone_or_hangs_costs_nothing_and_is_told_once(caplog):
    with socket.socket() as hanging:  # takes connections and never answers
        hanging.bind(("127.0.0.1", 0))
        hanging.listen()
        dead = Traces(f"http://127.0.0.1:{hanging.getsockname()[1]}", {})
        gone = Traces("http://127.0.0.1:9", {})
        record = Record("req-1", "POST", "/v1/completions", "", None, route="/v1/completions", status=200, model="m")
        now = time.monotonic()
        timing = Timing(now, now, now, now)
        with caplog.at_level(logging.WARNING):
            for traces in (dead, gone):
                spent = []
                for _ in range(600):  # 2,400 spans: more than the queue holds
                    began = time.perf_counter()
                    traces.request(record, [timing])
                    spent.append(time.perf_counter() - began)
                assert statistics.median(spent) < 0.002
            until(lambda: caplog.records, 10)
            began = time.perf_counter()
            for traces in (dead, gone):
                traces.close()
            assert time.perf_counter() - began < 6
        assert {one.getMessage() for one in caplog.records} == {"traces are lost: the collector does not take them"}
        assert len(caplog.records) <= 2  # one a minute, by each
