"""Counts what JAX compiles, by the events that it reports."""

import threading

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Programs that one thread compiled since `begin`."""

    def __init__(self):
        self._seen = self._before = 0
        self._thread: int | None = None

    def listen(self) -> None:
        """Starts counting what the calling thread compiles."""
        self._thread = threading.get_ident()
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def begin(self) -> None:
        """From now on programs count."""
        self._before = self._seen

    @property
    def count(self) -> int:
        """Programs compiled since `begin`."""
        return self._seen - self._before

    def _hear(self, event: str, duration: float, **_) -> None:
        self._seen += event == COMPILED and threading.get_ident() == self._thread
