"""How a server ends: it takes nothing new, finishes what runs, and goes."""

import asyncio
import gc
import logging
import signal
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import uvicorn

from serving.errors import ApiError
from serving.patience import Patient

logger = logging.getLogger("isomesh.serving")

RETRY_SECONDS = 1.0  # another replica can be asked at once
KEEP_ALIVE_SECONDS = 60  # longer than balancers keep a connection, so that they and not we close it
SWEEP_SECONDS = 2.0  # that connections have, once no request runs


class Drains(Protocol):
    """The part of an engine that an end needs."""

    def drain(self) -> None:
        """Takes nothing new."""

    def stop(self, seconds: float) -> bool:
        """Aborts what still runs after so many seconds; True if nothing was."""


class Lifecycle:
    """Whether new work is taken, and how much is under way. For the event loop's thread."""

    def __init__(self, engine: Drains):
        self._engine = engine
        self.draining = False
        self.at_work = 0  # requests for the model whose answers are not complete

    def drain(self) -> None:
        """From now on new work is refused; what runs goes on."""
        if not self.draining:
            self.draining = True
            self._engine.drain()
            logger.info("draining: %d requests under way", self.at_work)

    def require_open(self) -> None:
        """Raises ApiError 503 while draining."""
        if self.draining:
            raise ApiError(503, "this server is going down", code="draining", retry_after=RETRY_SECONDS)

    async def idle(self, seconds: float) -> bool:
        """Waits until nothing is under way, at most so long; whether it is so."""
        end = time.monotonic() + seconds
        while self.at_work and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return not self.at_work

    async def end(self, grace: float) -> bool:
        """Drains, waits, and ends what still runs after `grace` seconds; True if nothing had to be ended."""
        self.drain()
        whole = await self.idle(grace)
        await asyncio.to_thread(self._engine.stop, 0.0)
        await self.idle(SWEEP_SECONDS)  # clients are told
        return whole


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address, not yet listening; port 0: any that is free. Raises OSError where it cannot be had."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # else asyncio leaves Nagle on: 40 ms
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise OSError(f"cannot listen at {host}:{port}: {error.strerror or error}") from None
    return listener


def bound_to(path: Path) -> socket.socket:
    """A unix socket at a path, not yet listening; who may enter its folder may use it. Raises OSError.

    A socket that is there is replaced, as one that a killed server has left; anything else stays.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket():
            path.unlink()
        elif path.exists():
            raise OSError("it is there, and no socket")
        listener.bind(str(path))
    except OSError as error:
        raise OSError(f"cannot listen at {path}: {error.strerror or error}") from None
    return listener


def configured(app, *, behind: bool = False, **tls) -> uvicorn.Config:
    """How uvicorn is to run an application.

    behind: a balancer, the only one to reach us, whose X-Forwarded-For is believed. tls: uvicorn's ssl_* settings.
    """
    return uvicorn.Config(
        app, http=Patient, ws="none", lifespan="off", log_config=None, log_level="warning",
        access_log=False, server_header=False, date_header=True, backlog=2048,
        proxy_headers=behind, forwarded_allow_ips="*" if behind else None,
        timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=int(SWEEP_SECONDS), **tls,
    )  # fmt: skip


class Server(uvicorn.Server):
    """Uvicorn, ended by SIGTERM or Ctrl-C in the order above: it listens, and refuses, until all answers are sent.

    `ready()` is called once connections are accepted. A second Ctrl-C ends at once.
    """

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle, grace: float, ready=lambda: None):
        super().__init__(config)
        self._lifecycle, self._grace, self._ready = lifecycle, grace, ready
        self._ending: asyncio.Task | None = None

    async def startup(self, sockets=None) -> None:
        """Listens."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        gc.collect()
        gc.freeze()  # what is there now stays: to look through it again and again would hold up requests
        self._ready()

    @contextmanager
    def capture_signals(self):
        """The handlers while it runs; those before are restored, and the signal is not raised again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig, frame) -> None:
        """Begins the end."""
        self._loop.call_soon_threadsafe(self.begin_end)

    def begin_end(self) -> None:
        """Begins the end; in the event loop's thread."""
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._end())

    async def _end(self) -> None:
        try:
            if not await self._lifecycle.end(self._grace):
                logger.warning("ended what still ran after %g s", self._grace)
        finally:
            self.should_exit = True
