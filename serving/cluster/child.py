"""A process under supervision: it leads a group of its own, ends with its supervisor, and its lines bear its name."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence

from runtime.launch import die_with_parent

CHUNK = 65536
FIRST_SECONDS, MOST_SECONDS = 0.5, 30.0  # between an end and the next start
LONG_LIFE_SECONDS = 60.0  # after which an end counts as the first


class Child:
    """One process, from its start to its end."""

    def __init__(self, name: str, process: asyncio.subprocess.Process):
        self.name, self._process = name, process
        self.pid = process.pid
        self._reading = asyncio.create_task(self._pass_on())

    @classmethod
    async def start(cls, name: str, command: Sequence[str], environment: Mapping[str, str]) -> "Child":
        """Starts it. Raises OSError where that is not possible. To be called in the main thread, whose end counts."""
        process = await asyncio.create_subprocess_exec(
            *command,
            env=dict(environment),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent(os.getpid()),
        )
        return cls(name, process)

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.returncode is None

    async def ended(self) -> int:
        """Waits for its end; its exit code, -n after signal n."""
        code = await self._process.wait()
        self._signal_group(signal.SIGKILL)  # what it may have started itself
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._reading), 1.0)
        return code

    async def ended_within(self, seconds: float) -> int | None:
        """The same, or None if it still runs after so long."""
        with contextlib.suppress(asyncio.TimeoutError):
            return await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(self.ended())), seconds)
        return None

    def signal(self, number: int) -> None:
        """Sends it a signal, if it has not ended."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def kill(self) -> None:
        """Ends it and all of its group at once, stopped ones too."""
        if self.running:
            self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    async def _pass_on(self) -> None:
        """Its lines go to stderr with its name in front; a line may be of any length."""
        rest = b""
        while chunk := await self._process.stdout.read(CHUNK):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > CHUNK:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._say(line)
        if rest:
            self._say(rest)

    def _say(self, line: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):  # a closed terminal must not stop the supervisor
            print(f"[{self.name}] {line.decode(errors='replace')}", file=sys.stderr, flush=True)


class Backoff:
    """Seconds to wait before a start: doubled with each end that follows soon upon the start before."""

    def __init__(self, first: float = FIRST_SECONDS, most: float = MOST_SECONDS, long_life: float = LONG_LIFE_SECONDS):
        self._first, self._most, self._long_life = first, most, long_life
        self._failures = 0

    def after(self, lived: float) -> float:
        """The wait after a process that lived for so many seconds."""
        self._failures = 0 if lived >= self._long_life else self._failures + 1
        return min(self._most, self._first * 2 ** max(0, min(self._failures, 30) - 1))
