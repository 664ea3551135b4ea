"""Counts what JAX compiles, by the events that it reports."""

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Programs that this process compiled since `begin`, whoever asked for them."""

    def __init__(self):
        self._seen = self._before = 0

    def listen(self) -> None:
        """Starts counting."""
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def begin(self) -> None:
        """From now on programs count."""
        self._before = self._seen

    @property
    def count(self) -> int:
        """Programs compiled since `begin`."""
        return self._seen - self._before

    def _hear(self, event: str, duration: float, **_) -> None:
        self._seen += event == COMPILED
