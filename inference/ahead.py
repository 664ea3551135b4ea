"""The programs of a run's samples, compiled while it trains: else they would be what its end waits for."""

import threading
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from inference.config import SampleConfig
from inference.generate import compiled_for
from model.transformer import Description
from runtime.leave import BACKGROUND

TRAINS_ITSELF = ("cpu",)  # platforms whose devices are the cores that compile, too


class Ahead:
    """What `continuations` will run, compiled in a thread meanwhile."""

    def __init__(self, mesh: Mesh, description: Description, params: dict, tokenizer, sample: SampleConfig, dtype):
        """`params` are shapes with shardings. Nothing is begun where the thread would take the cores that train (on
        CPUs), where nothing will be generated, or not from parameters that lie so (of the stages of a pipeline).
        """
        self._programs, self._thread = {}, None
        self._of = description, params, tokenizer, sample, dtype
        apart = mesh.devices.flat[0].platform not in TRAINS_ITSELF and mesh.shape["pipe"] == 1
        if apart and sample.tokens and description.config.generates:
            self._thread = threading.Thread(target=self._compile, args=(mesh,), name=BACKGROUND, daemon=True)
            self._thread.start()

    def _compile(self, mesh: Mesh) -> None:
        try:
            with jax.set_mesh(mesh):  # a thread has a context of its own
                self._programs = compiled_for(*self._of)
        except Exception:  # whatever it is, generation meets it again, and tells it
            self._programs = {}

    def programs(self) -> Mapping:
        """The programs; waits for what is left of compiling them, which is less than all of it."""
        if self._thread is not None:
            self._thread.join()
        return self._programs
