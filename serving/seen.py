"""Puts a server under watch: its engine's observer, the records of its requests, and GET /metrics."""

import asyncio
from collections.abc import Callable

from fastapi import APIRouter, Depends
from starlette.responses import Response

from runtime.scrapes import CONTENT_TYPE
from serving.access.gate import Caller, needs
from serving.api.routes import READS, ends
from serving.metrics import Metrics
from serving.service import Service
from serving.timings import Timings
from serving.traces import Traces
from serving.watch import Record


def watched(service: Service, block: int = 0, traces: Traces | None = None) -> Metrics:
    """The metrics of a service from now on, and its traces if asked for; block: tokens of a block of its cache."""
    metrics = Metrics(service, block)
    timings = Timings(metrics.first, metrics.gap, metrics.step)
    service.engine.observer = timings

    def told(record: Record) -> None:
        parts = timings.take(record.id)
        metrics.request(record, parts)
        if traces is not None:
            traces.request(record, parts)

    service.told.append(told)
    return metrics


def router(text: Callable[[], str]) -> APIRouter:
    """GET /metrics, for whoever may: Prometheus reads a key from a file."""
    router = APIRouter()

    @router.get("/metrics", responses=ends(*READS))
    async def metrics(caller: Caller = Depends(needs("metrics"))) -> Response:  # noqa: B008
        """The metrics of this server, for Prometheus."""
        return Response(await asyncio.to_thread(text), media_type=CONTENT_TYPE)

    return router
