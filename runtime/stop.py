"""How a run ends early: signals that ask for a stop at a step that all processes share."""

import os
import signal
import threading

import jax
from jax._src.distributed import global_state  # the preemption service has no public door but `initialize`
from jax.experimental import multihost_utils


class StopSignal:
    """Turns Ctrl-C and SIGTERM into an answer of `requested(step)`, the same on all processes at the same step.

    with StopSignal() as stop:
        for step in ...:
            if stop.requested(step): save and leave the loop

    One process: Python handlers set a flag; a second Ctrl-C raises KeyboardInterrupt at once. Several: JAX's preemption
    service catches SIGTERM and lets all agree on a step, so all must ask at every step, from the same first step. The
    handlers before are restored on leaving (before the loop `runtime.leave` answers). Outside the main thread, where
    Python allows no handlers, no handler is set.
    """

    def __init__(self):
        self.reason: str | None = None  # for the log, once a stop was requested
        self._several = jax.distributed.is_initialized()
        self._received: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            handlers = {signal.SIGINT: self._on_interrupt, signal.SIGTERM: self._on_terminate}
            self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        if self._several:  # last: its handler of SIGTERM takes the place of Python's
            jax.config.update("jax_enable_preemption_service", True)
            global_state.initialize_preemption_sync_manager()
        return self

    def __exit__(self, *exception) -> None:
        if self._several:
            global_state.preemption_sync_manager.shutdown()
            global_state.preemption_sync_manager = None
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
