"""Replicas behind a balancer: both started, kept running, rolled over to other weights, and ended together."""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence

from runtime.exit_codes import DONE, FAULT, MISTAKE
from serving.cluster.balancer import Balancer
from serving.cluster.child import Backoff, Child
from serving.cluster.replica import Replica, told

logger = logging.getLogger("isomesh.cluster")

FIRST_FAILURES = 3  # ends of a replica, when none has ever been ready, after which the cluster gives up
LAST_BYTES_SECONDS = 1.0  # that haproxy has for the ends of answers
LOOK_SECONDS = 0.1

Say = Callable[[str], None]


class Supervisor:
    """A cluster while it runs. `ready` is called when the first replica is ready, with nothing."""

    def __init__(self, balancer: Balancer, replicas: Sequence[Replica], ready: Callable[[], None] = lambda: None):
        self.balancer, self.replicas = balancer, tuple(replicas)
        self._ready = ready
        self._stop = asyncio.Event()
        self._haproxy: Child | None = None
        self._out: set[int] = set()  # replicas that the balancer was told to leave out
        self._rolling = asyncio.Lock()

    async def run(self) -> int:
        """Runs until SIGTERM, Ctrl-C or `stop`; the exit code. SIGHUP rolls over to what the model's path holds now."""
        loop, rolls = asyncio.get_running_loop(), set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        loop.add_signal_handler(signal.SIGHUP, lambda: rolls.add(asyncio.create_task(self._roll_by_signal())))
        places = [asyncio.create_task(replica.run()) for replica in self.replicas]
        keeping = [*places, asyncio.create_task(self._keep_haproxy())]
        stopped = asyncio.create_task(self._stop.wait())
        try:
            code = await self._until_ready(stopped, keeping)
            if code is None:
                await asyncio.wait([stopped, *keeping], return_when=asyncio.FIRST_COMPLETED)
                code = DONE
            return code if self._stop.is_set() else code or _fault(keeping)
        finally:
            for roll in rolls:
                roll.cancel()
            await self._end(keeping)

    def stop(self) -> None:
        """Begins the end."""
        self._stop.set()

    def _signalled(self) -> None:
        if self._stop.is_set():  # a second time: at once
            self._kill()
        self.stop()

    def _kill(self) -> None:
        for child in [*(replica.child for replica in self.replicas), self._haproxy]:
            if child is not None:
                child.kill()

    async def _until_ready(self, stopped: asyncio.Task, keeping: Sequence[asyncio.Task]) -> int | None:
        """Waits for the first replica to be ready; an exit code where that is not to be."""
        while not any(replica.ready for replica in self.replicas):
            if stopped.done() or any(task.done() for task in keeping):
                return DONE if stopped.done() else None
            for replica in self.replicas:
                if replica.failures and replica.code == MISTAKE:
                    logger.error("replica %d %s, told above", replica.number, told(MISTAKE))
                    return MISTAKE
                if replica.failures >= FIRST_FAILURES:
                    logger.error("replica %d %s, for the %dth time", replica.number, told(replica.code), FIRST_FAILURES)
                    return FAULT
            await asyncio.sleep(LOOK_SECONDS)
        self._ready()
        return None

    async def _keep_haproxy(self) -> None:
        backoff = Backoff()
        while True:
            began = time.monotonic()
            self.balancer.admin.unlink(missing_ok=True)
            self._haproxy = await Child.start("haproxy", self.balancer.command(), os.environ)
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                for number in self._out:
                    await self._told(self.balancer.take_out, number)
            code = await self._haproxy.ended()
            delay = backoff.after(time.monotonic() - began)
            logger.warning("haproxy %s; it starts again in %.1f s", told(code), delay)
            await asyncio.sleep(delay)

    async def _told(self, tell, number: int) -> None:
        """Tells haproxy, which may just be starting."""
        for _ in range(50):
            with contextlib.suppress(OSError):
                return await tell(number)
            await asyncio.sleep(LOOK_SECONDS)
        raise OSError(f"haproxy does not answer at {self.balancer.admin}")

    async def roll(self, model: str | None = None, say: Say = lambda line: None) -> None:
        """Replaces the replicas, one at a time, by such that serve `model` (None: each what it serves).

        A request that a replica has is finished by it, within its grace. The next replica's turn comes when the new
        one is ready. Where a new one does not become ready, the old model comes back in its place, the others stay as
        they are, and ValueError says so.
        """
        if len(self.replicas) < 2:
            raise ValueError("one replica cannot be replaced without a gap: start with --replicas 2 or more")
        if self._rolling.locked():
            raise ValueError("the replicas are being replaced already")
        async with self._rolling:
            for replica in self.replicas:
                if not any(other.ready for other in self.replicas if other is not replica):
                    raise ValueError(f"replica {replica.number} stays: no other one is ready to take its requests")
                await self._replace(replica, model or replica.model, say)

    async def _replace(self, replica: Replica, model: str, say: Say) -> None:
        before, began = replica.serves, time.monotonic()
        say(f"replica {replica.number}: finishes what it runs")
        with self._left_out(replica.number):
            await self._told(self.balancer.take_out, replica.number)
            try:
                if not await self._with_model(replica, model):
                    code = replica.code
                    say(f"replica {replica.number}: back to {before}")
                    replica.model = before
                    await replica.until_ready(replica.starts)
                    raise ValueError(f"the new replica {replica.number} {told(code)} before it was ready: {model}")
            finally:
                await self._told(self.balancer.take_in, replica.number)
        say(f"replica {replica.number}: ready with {model} after {time.monotonic() - began:.1f} s")

    async def _with_model(self, replica: Replica, model: str) -> bool:
        starts, replica.model = replica.starts, model
        await replica.replace()
        return await replica.until_ready(starts)

    @contextlib.contextmanager
    def _left_out(self, number: int) -> Iterator[None]:
        """A haproxy that is started meanwhile is told, too."""
        self._out.add(number)
        try:
            yield
        finally:
            self._out.discard(number)

    async def _roll_by_signal(self) -> None:
        try:
            await self.roll(say=lambda line: logger.info("%s", line))
        except (ValueError, OSError) as error:
            logger.error("%s", error)

    async def _end(self, keeping: Sequence[asyncio.Task]) -> None:
        """Replicas refuse what is new and finish what they have; then the balancer goes."""
        *places, haproxy = keeping
        await asyncio.gather(*(replica.close() for replica in self.replicas))
        await asyncio.gather(*places, return_exceptions=True)
        haproxy.cancel()
        await asyncio.gather(haproxy, return_exceptions=True)
        if self._haproxy is not None and self._haproxy.running:
            self._haproxy.signal(signal.SIGUSR1)  # no new connections
            if await self._haproxy.ended_within(LAST_BYTES_SECONDS) is None:
                self._haproxy.kill()
                await self._haproxy.ended()
        for socket in (*self.balancer.sockets, self.balancer.admin):
            socket.unlink(missing_ok=True)


def _fault(keeping: Sequence[asyncio.Task]) -> int:
    """What ended a task that should have run on: its exception is raised."""
    for task in keeping:
        if task.done():
            task.result()
    return FAULT
