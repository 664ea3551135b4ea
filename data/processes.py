"""Work spread over processes, whose results come in the order of the work."""

import contextlib
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor
from typing import Any

_work: Callable[[Any], Any] | None = None


def in_order(items: Iterable[Any], workers: int, make: Callable[..., Callable], *arguments: Any) -> Iterator[tuple]:
    """Each item with its result, in order: `make(*arguments)` gives the function, once in every process.

    The items stay here, so that results should not repeat them. With one worker all is done in this process. A few
    items for each worker are under way at once. Raises what the function raises, and ValueError where a worker was
    killed.
    """
    if workers == 1:
        work = make(*arguments)
        yield from ((item, work(item)) for item in items)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    # a process that leaves at once, as on Ctrl-C, has its semaphores removed by a helper, which need not tell it
    sys.warnoptions.append("ignore:resource_tracker")
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(make, arguments)
    )
    waiting = deque()
    try:
        for item in items:
            with ignoring_interrupts():  # inherited by a worker that starts now: Ctrl-C is answered here
                waiting.append((item, pool.submit(_do, item)))
            if len(waiting) > 2 * workers:
                item, future = waiting.popleft()
                yield item, future.result()
        for item, future in waiting:
            yield item, future.result()
    except BrokenExecutor:
        raise ValueError("a worker was killed, perhaps for want of memory: set --workers lower") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def ignoring_interrupts() -> Iterator[None]:
    """Inside, this thread and the processes that it starts do not hear Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- in a worker -------------------------------------------------------------------------------------------------


def _begin(make: Callable[..., Callable], arguments: tuple) -> None:
    global _work
    os.environ["RAYON_NUM_THREADS"] = "1"  # one core each
    threading.Thread(target=end_with_parent, daemon=True).start()
    _work = make(*arguments)


def _do(item: Any) -> Any:
    return _work(item)


def end_with_parent() -> None:
    """Ends this process when the one that started it does, however it does; runs in a thread of its own."""
    import multiprocessing
    from multiprocessing.connection import wait

    wait([multiprocessing.parent_process().sentinel])
    os._exit(0)
