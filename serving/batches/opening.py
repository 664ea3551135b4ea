"""Files and batches of a server: their store, and who runs them."""

from dataclasses import dataclass
from pathlib import Path

from serving.access.gate import Gate
from serving.app import create_app
from serving.batches.runner import LineGate, Runner
from serving.batches.store import Store
from serving.service import Service

FOLDER = "batches"  # in the state folder


@dataclass(frozen=True)
class Batches:
    """What the routes of files and batches use."""

    store: Store
    runner: Runner


def add_batches(folder: Path, service: Service, gate: Gate) -> Batches:
    """Gives a service files and batches, kept in a folder. `runner.wake()` goes on with those that were left."""
    store = Store(folder)
    service.batches = Batches(store, Runner(store, service, create_app(service, LineGate(gate))))
    return service.batches
