"""Traces for OpenTelemetry: a span of an HTTP request, and in it those of the queue, the prefill and the decoding.

They are made when a request is over, from the times that were noted, and sent over OTLP/HTTP by a thread of their own:
a collector that is slow or gone costs a request nothing. Attributes are those of the conventions for HTTP and for
generative AI (opentelemetry.io/docs/specs/semconv/gen-ai); there is no text of a prompt or an answer, and no key.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serving.timings import Timing
from serving.watch import Record

logger = logging.getLogger("isomesh.serving")

PATH = "/v1/traces"  # of OTLP/HTTP
SEND_SECONDS = 5.0  # that a collector has to take a batch
CLOSE_SECONDS = 1.0  # that an end waits for what has not been sent
QUIET_SECONDS = 60.0  # between two warnings about a collector
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}


class Traces:
    """Sends traces to a collector; without an endpoint to the one that OTEL_EXPORTER_OTLP_ENDPOINT names.

    service: resource attributes of OpenTelemetry. Raises ValueError for what is no address.
    """

    def __init__(self, endpoint: str | None, service: Mapping[str, str]):
        _quiet()
        if endpoint is not None:
            parts = urlsplit(endpoint)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"--traces {_shown(endpoint)} is no address: it is like http://127.0.0.1:4318")
            endpoint = endpoint if parts.path.strip("/") else f"{endpoint.rstrip('/')}{PATH}"
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=SEND_SECONDS)
        self._provider = TracerProvider(resource=Resource.create(dict(service)), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("isomesh.serving")
        self._wire = TraceContextTextMapPropagator()

    def request(self, record: Record, timings: Sequence[Timing]) -> None:
        """An HTTP request is over; `timings` are those of its parts in the engine."""
        # monotonic seconds -> nanoseconds since 1970
        offset = time.time_ns() - round(time.monotonic() * 1e9)
        at = lambda seconds: round(seconds * 1e9) + offset
        parent = self._wire.extract({"traceparent": record.traceparent or ""})
        name, end = f"{record.method} {record.route}".rstrip(), record.began + record.seconds
        span = self._tracer.start_span(
            name, parent, SpanKind.SERVER, _attributes(record, timings), start_time=at(record.began)
        )
        if span.is_recording():
            if record.status >= 500:
                span.set_status(Status(StatusCode.ERROR))
            within = set_span_in_context(span)
            for number, one in enumerate(timings):
                for phase, began, ended in _phases(one, end):
                    about = {"isomesh.prompt": number} if len(timings) > 1 else {}
                    child = self._tracer.start_span(phase, within, attributes=about, start_time=at(began))
                    child.end(at(max(began, ended)))
        span.end(at(end))

    def close(self) -> None:
        """Sends what is left, for a moment; a collector that does not answer is not waited for."""
        ending = threading.Thread(target=self._provider.shutdown, name="traces end", daemon=True)
        ending.start()
        ending.join(CLOSE_SECONDS)


def _attributes(record: Record, timings: Sequence[Timing]) -> dict:
    found = {
        "http.request.method": record.method,
        "http.response.status_code": record.status,
        "isomesh.request_id": record.id,
    }
    if record.route:
        found["http.route"] = record.route
    if record.status >= 500:
        found["error.type"] = record.fault or str(record.status)
    if not record.model:
        return found
    found |= {"gen_ai.provider.name": "isomesh", "gen_ai.operation.name": OPERATIONS.get(record.route, record.route)}
    found |= {"gen_ai.request.model": record.model, "gen_ai.response.model": record.model}
    found |= {"gen_ai.usage.input_tokens": record.prompt_tokens, "gen_ai.usage.output_tokens": record.new_tokens}
    found["gen_ai.usage.cache_read.input_tokens"] = record.cached_tokens
    found["gen_ai.request.stream"] = record.stream
    if record.finishes:
        found["gen_ai.response.finish_reasons"] = record.finishes
    if firsts := [one.first for one in timings if one.first is not None]:
        found["gen_ai.response.time_to_first_chunk"] = min(firsts) - record.began
    return found


def _phases(one: Timing, end: float) -> list[tuple[str, float, float]]:
    """What a request went through, with beginnings and ends; a phase that was cut short ends with the request."""
    ended = end if one.ended is None else one.ended
    marks = [("queue", one.queued), ("prefill", one.began), ("decode", one.first)]
    known = [(name, began) for name, began in marks if began is not None]
    ends = [began for _, began in known[1:]] + [ended]
    return [(name, began, stopped) for (name, began), stopped in zip(known, ends, strict=True)]


def _shown(address: str) -> str:
    """An address without the password that may stand in it."""
    return address.rpartition("@")[2][:200]


class _Seldom(logging.Handler):
    """Says in one line a minute what OpenTelemetry would say of every batch and span that is lost."""

    def __init__(self):
        super().__init__()
        self._said = -QUIET_SECONDS

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING and time.monotonic() - self._said >= QUIET_SECONDS:
            self._said = time.monotonic()
            logger.warning("traces are lost: the collector does not take them")


def _quiet() -> None:
    theirs = logging.getLogger("opentelemetry")
    theirs.handlers, theirs.propagate = [_Seldom()], False
