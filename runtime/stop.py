"""How a run ends early: signals that ask for a stop at a step that all processes share, and an exit without waiting."""

import contextlib
import logging
import os
import signal
import sys
import threading
from typing import NoReturn

import jax
from jax.experimental import multihost_utils


def exit_now(code: int) -> NoReturn:
    """Ends the process at once. For when its peers are gone: a normal exit waits for them at a barrier for 100 s."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class StopSignal:
    """Turns Ctrl-C and SIGTERM into an answer of `requested(step)`, the same on all processes at the same step.

    with StopSignal() as stop:
        for step in ...:
            if stop.requested(step): save and leave the loop

    One process: Python handlers set a flag; a second Ctrl-C raises KeyboardInterrupt at once; the handlers before are
    restored on leaving. Several: JAX's preemption service catches SIGTERM (that handler is left alone) and lets all
    agree on a step, so all must ask at every step, from the same first step. Outside the main thread, where Python
    allows no handlers, no handler is set.
    """

    def __init__(self):
        self.reason: str | None = None  # for the log, once a stop was requested
        self._several = jax.distributed.is_initialized()
        self._received: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            handlers = {signal.SIGINT: self._on_interrupt}
            if not self._several:
                handlers[signal.SIGTERM] = self._on_terminate
            self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """True from the step on at which all processes stop. Call it once a step, on every process."""
        if self.reason is None:
            if not self._several:
                self.reason = self._received
            elif multihost_utils.reached_preemption_sync_point(step):
                self.reason = self._received or "SIGTERM to one of the processes"
        return self.reason is not None

    def _on_interrupt(self, number, frame) -> None:
        if self._received == "Ctrl-C":
            raise KeyboardInterrupt
        self._received = "Ctrl-C"
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)  # the preemption service knows SIGTERM only

    def _on_terminate(self, number, frame) -> None:
        self._received = self._received or "SIGTERM"
