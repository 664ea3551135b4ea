"""One replica under supervision: started, watched, killed when it hangs, started again when it is gone.

What it serves is its business; here it is a command that listens on a unix socket and answers /livez and /readyz.
"""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.exit_codes import MISTAKE
from serving.cluster import probe
from serving.cluster.child import Backoff, Child

logger = logging.getLogger("isomesh.cluster")

SILENCES = 3  # looks in a row without an answer, each `silent_seconds` / SILENCES long, after which it is killed
STALLED_SECONDS = 60.0  # that it may answer without being ready, once it was, unless it drains
START_SECONDS = 1800.0  # that a start may take: large models are read and compiled
TERM_SECONDS = 10.0  # beyond its own grace until it is killed
DRAINING = "draining"  # a word in what /readyz says then


@dataclass(frozen=True)
class Watching:
    """The limits by which replicas are judged."""

    look_seconds: float = 0.5  # between two looks at a replica
    silent_seconds: float = 3.0
    grace_seconds: float = 30.0  # that a replica gives what runs, when it is told to end
    stalled_seconds: float = STALLED_SECONDS
    start_seconds: float = START_SECONDS


class Replica:
    """A place in the cluster, filled by one process after another. `model` is what the next one serves."""

    def __init__(
        self,
        number: int,
        socket: Path,
        command: Callable[[str, Path], Sequence[str]],  # of a model and a socket
        model: str,
        watching: Watching,
        environment: Mapping[str, str] | None = None,
        backoff: Backoff | None = None,
    ):
        self.number, self.socket, self.model, self.serves = number, socket, model, model
        self._command, self._watching = command, watching
        self._environment = os.environ if environment is None else environment
        self._backoff = backoff or Backoff()
        self.child: Child | None = None
        self.state = "waiting"  # waiting, starting, ready, not ready, silent, ending
        self.starts = 0
        self.failures = 0  # ends in a row before it was ready
        self.code: int | None = None  # of the last process that ended
        self._was_ready = False  # this process
        self._asked = False  # for the end that comes next
        self._closing = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether it has said so at the last look."""
        return self.state == "ready"

    def described(self) -> dict:
        """What a person is told of it."""
        pid = self.child.pid if self.child and self.child.running else None
        facts = {"number": self.number, "state": self.state, "pid": pid, "model": self.serves}
        return {**facts, "starts": self.starts, "socket": str(self.socket)}

    async def run(self) -> None:
        """Keeps a process in place until `close`."""
        while not self._closing.is_set():
            began = time.monotonic()
            self.socket.unlink(missing_ok=True)
            self.serves, self.state, self._was_ready = self.model, "starting", False
            self.child = await Child.start(f"r{self.number}", self._command(self.model, self.socket), self._environment)
            self.starts += 1
            if self._closing.is_set():
                self.child.kill()
            looks = asyncio.create_task(self._look(self.child, began))
            self.code = await self.child.ended()
            looks.cancel()
            self.state = "waiting"
            self.failures = 0 if self._was_ready else self.failures + 1
            if not self._closing.is_set() and not self._asked:
                delay = self._backoff.after(time.monotonic() - began)
                logger.warning("replica %d %s; it starts again in %.1f s", self.number, told(self.code), delay)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), delay)
            self._asked = False

    async def _look(self, child: Child, began: float) -> None:
        """Looks at it as long as it lives, and kills it where it hangs."""
        limits, silences, unready = self._watching, 0, None
        while True:
            alive = await probe.get(self.socket, "/livez", limits.silent_seconds / SILENCES)
            now = time.monotonic()
            silences = silences + 1 if alive.silent and self._was_ready else 0
            if silences:
                self._become("silent")
                if silences >= SILENCES:
                    self._kill(child, f"has not answered for {limits.silent_seconds:g} s")
                continue
            answer = await probe.get(self.socket, "/readyz", limits.silent_seconds / SILENCES)
            if answer.status == 200:
                self._become("ready")
                unready, self._was_ready = None, True
            elif not self._was_ready:
                if now - began > limits.start_seconds:
                    self._kill(child, f"is not ready after {limits.start_seconds:g} s")
            else:
                self._become("not ready")
                unready = unready or now
                if now - unready > limits.stalled_seconds and DRAINING not in answer.body:
                    self._kill(child, f"has not been ready for {limits.stalled_seconds:g} s")
            await asyncio.sleep(limits.look_seconds)

    def _become(self, state: str) -> None:
        if state != self.state and self.state != "ending":
            logger.info("replica %d is %s", self.number, state)
            self.state = state

    def _kill(self, child: Child, why: str) -> None:
        logger.warning("replica %d %s: it is killed", self.number, why)
        child.kill()

    async def replace(self) -> None:
        """Ends the process, which finishes what it runs; `run` starts the next one at once."""
        self._asked = True
        await self.end()

    async def end(self) -> None:
        """SIGTERM, and SIGKILL where its grace is over."""
        child = self.child
        if child is None or not child.running:
            return
        self._become("ending")
        child.signal(signal.SIGTERM)
        child.signal(signal.SIGCONT)  # a stopped process ends only when it runs
        if await child.ended_within(self._watching.grace_seconds + TERM_SECONDS) is None:
            self._kill(child, f"has not ended {TERM_SECONDS:g} s after its grace")
            await child.ended()

    async def close(self) -> None:
        """The end of the replica, and with it of `run`."""
        self._closing.set()
        await self.end()

    async def until_ready(self, starts: int) -> bool:
        """Waits until a process started after so many starts is ready; False if it ends before."""
        while True:
            if self.starts > starts and self.ready:
                return True
            if self._closing.is_set() or (
                self.starts > starts and (self.state == "waiting" or self.starts > starts + 1)
            ):
                return False
            await asyncio.sleep(0.05)


def told(code: int) -> str:
    """An exit code in words."""
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}" + (": a mistake in its settings" if code == MISTAKE else "")


def shares(replicas: int, visible: str | None) -> list[dict[str, str]]:
    """The variables that give each replica its part of the GPUs that CUDA_VISIBLE_DEVICES lists.

    Raises ValueError where they cannot be shared out evenly.
    """
    devices = [name for name in (visible or "").split(",") if name]
    if not devices:
        return [{}] * replicas
    if len(devices) % replicas:
        message = f"CUDA_VISIBLE_DEVICES lists {len(devices)} devices for {replicas} replicas"
        raise ValueError(f"{message}: {len(devices)} / {replicas} is not whole; list a multiple of {replicas}")
    size = len(devices) // replicas
    return [{"CUDA_VISIBLE_DEVICES": ",".join(devices[size * n : size * (n + 1)])} for n in range(replicas)]
