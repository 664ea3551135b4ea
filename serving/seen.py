"""Puts a server under watch: its engine's observer, the records of its requests, GET /metrics, and traces."""

import asyncio
import os
import secrets

from fastapi import APIRouter, Depends
from starlette.responses import Response

from runtime.scrapes import CONTENT_TYPE, Scrapes
from serving.access.gate import Caller, needs
from serving.api.routes import READS, ends
from serving.metrics import Metrics
from serving.service import Service
from serving.timings import Timings
from serving.watch import Record

# of a collector of traces, as OpenTelemetry has it
COLLECTORS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


class Seen:
    """What is opened before a model is read, and is given a service when there is one."""

    def __init__(self, host: str, port: int | None, traces: str | None):
        """port: where whoever reaches it reads the metrics without a key; None: nowhere. traces: of a collector.

        Raises ValueError for an address that cannot be had, or is none.
        """
        self._metrics: Metrics | None = None
        self._traces, self._scrapes = None, None
        if traces or any(os.environ.get(name) for name in COLLECTORS):
            from serving.traces import Traces  # OpenTelemetry takes 0.3 s to import

            self._traces = Traces(traces, {"service.name": "isomesh", "service.instance.id": secrets.token_hex(8)})
        if port is not None:
            self._scrapes = Scrapes(host, port, self.text, "--metrics-host ", "--metrics-port ")

    @property
    def port(self) -> int | None:
        """Of the metrics alone."""
        return self._scrapes and self._scrapes.port

    def text(self) -> str:
        """The metrics; nothing while the model is being read."""
        return self._metrics.text() if self._metrics is not None else ""

    def over(self, service: Service) -> APIRouter:
        """Watches a service from now on; the route for its application."""
        metrics = self._metrics = Metrics(service, service.engine.options.block)
        timings = service.engine.observer = Timings(metrics.first, metrics.gap, metrics.step)

        def told(record: Record) -> None:
            parts = timings.take(record.id, record.parts)
            metrics.request(record, parts)
            if self._traces is not None:
                self._traces.request(record, parts)

        service.told.append(told)
        return self._route()

    def _route(self) -> APIRouter:
        router = APIRouter()

        @router.get("/metrics", response_class=Response, responses=ends(*READS))
        async def metrics(caller: Caller = Depends(needs("metrics"))) -> Response:  # noqa: B008
            """The metrics of this server, for Prometheus, which reads a key from a file."""
            return Response(await asyncio.to_thread(self.text), headers={"content-type": CONTENT_TYPE})

        return router

    def close(self) -> None:
        """Sends the last traces and gives the port back."""
        if self._traces is not None:
            self._traces.close()
        if self._scrapes is not None:
            self._scrapes.close()
