"""Which adapter lies in which place beside the model, and who still uses it. No JAX here.

A place is filled, then requests may name its adapter. An adapter that is taken out has no new requests from that
moment; its place is free once the last of those that it had has ended.
"""

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from inference.requests import AdapterState

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/-]{0,127}")  # no commas: metrics name several in one label
LOADING_SECONDS = 120.0  # until a place is filled, between two steps

Values = Mapping[str, Mapping[str, np.ndarray]]  # of matrices by their '/'-joined paths in a layer, layers stacked


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter of a model, on the host: what is added to each matrix is a (L, *in, rank) times b (L, rank, *out)."""

    name: str
    path: Path
    digest: str  # tells its numbers from others'
    rank: int
    values: Values  # a and b, with `magnitude` (L, *out) where outputs are scaled to a trained length (DoRA)
    created: int = 0  # seconds since 1970

    @property
    def stretched(self) -> bool:
        """Whether outputs are scaled to a trained length."""
        return any("magnitude" in own for own in self.values.values())

    @property
    def salt(self) -> bytes:
        """What the names of its cache blocks begin with: no other adapter, and no other version of it, shares them."""
        return hashlib.blake2b(self.digest.encode(), digest_size=16).digest()


@dataclass(eq=False)
class Place:
    """Beside the model's matrices, from 1 on."""

    number: int
    adapter: Adapter
    open: bool = False  # requests may name it
    closing: bool = False  # no more; it is free when those that run have ended
    used: int = 0  # by so many choices that have not ended


@dataclass
class AdapterBooks:
    """The places of an engine. Any thread may ask."""

    count: int = 0
    rank: int = 0  # of the largest adapter that fits
    names: frozenset[str] = frozenset()  # of the matrices that may have one
    stretched: bool = False  # whether adapters with `magnitude` fit
    _places: dict[int, Place] = field(default_factory=dict)
    _ended: Counter = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def over(cls, places) -> "AdapterBooks":
        """Of these places (finetune.adapters.switched.Places), or of none."""
        if places is None:
            return cls()
        names = frozenset("/".join(path[1:]) for path in places.paths)
        return cls(places.count, places.rank, names, places.stretched)

    def open(self) -> list[Adapter]:
        """Those that requests may name, in the order in which they came."""
        return [place.adapter for place in list(self._places.values()) if place.open]

    def hold(self, name: str, sequences: Iterable) -> None:
        """Gives sequences the place of an adapter ("": none), until each is released. Raises ValueError."""
        if not name:
            return
        with self._lock:
            place = next((p for p in self._places.values() if p.open and p.adapter.name == name), None)
            if place is None:
                raise ValueError(f"the adapter {name[:100]!r} is not here")
            for sequence in sequences:
                sequence.place, sequence.salt = place.number, place.adapter.salt
                place.used += 1

    def release(self, number: int) -> None:
        """A choice that had this place has ended."""
        if not number:
            return
        with self._lock:
            place = self._places[number]
            place.used -= 1
            self._ended[place.adapter.name] += 1
            self._drop_unused(place)

    def take(self, adapter: Adapter) -> Place:
        """A free place for an adapter, which `fill` opens. Raises ValueError where it does not fit or is there."""
        if not NAME.fullmatch(adapter.name):
            raise ValueError(f"{adapter.name[:100]!r} is no name: letters, digits and . _ : @ / -, at most 128")
        if adapter.rank > self.rank:
            raise ValueError(f"{adapter.name} has rank {adapter.rank}, and there is room for {self.rank}")
        if strange := sorted(adapter.values.keys() - self.names):
            raise ValueError(f"{adapter.name} has an adapter of {strange[0]}; there is room for {_told(self.names)}")
        if adapter.stretched and not self.stretched:
            raise ValueError(f"{adapter.name} is a DoRA, and there is no room for lengths: start with one")
        with self._lock:
            if any(p.adapter.name == adapter.name and not p.closing for p in self._places.values()):
                raise ValueError(f"there is an adapter {adapter.name!r} already: unload it first")
            free = [number for number in range(1, self.count + 1) if number not in self._places]
            if not free:
                taken = ", ".join(f"{p.adapter.name}{' (ends)' if p.closing else ''}" for p in self._places.values())
                raise ValueError(f"all {self.count} places of adapters are taken: {taken}")
            place = self._places[free[0]] = Place(free[0], adapter)
            return place

    def fill(self, place: Place, fill: Callable[[int, Values], None]) -> None:
        """Fills a place with `fill`, in the thread that owns the devices; if that fails, the place is free again."""
        try:
            fill(place.number, place.adapter.values)
        except BaseException:
            with self._lock:
                del self._places[place.number]
            raise
        place.open = True

    def load(self, adapter: Adapter, tell: Callable[[Callable[[], None]], None], fill) -> None:
        """The same from another thread, which waits; `tell` leaves word for the one that owns the devices. Raises."""
        place, done = self.take(adapter), Future()

        def word() -> None:
            try:
                done.set_result(self.fill(place, fill))
            except Exception as error:
                done.set_exception(error)

        tell(word)
        try:
            done.result(LOADING_SECONDS)
        except TimeoutError:
            raise ValueError(
                f"{adapter.name} is not in its place after {LOADING_SECONDS:g} s; it may still come"
            ) from None

    def unload(self, name: str) -> Adapter:
        """Takes no more requests for an adapter. Raises ValueError where there is none of this name."""
        with self._lock:
            place = next((p for p in self._places.values() if p.open and p.adapter.name == name), None)
            if place is None:
                there = _told(adapter.name for adapter in self.open())
                raise ValueError(f"the adapter {name[:100]!r} is not here; there are: {there}")
            place.open, place.closing = False, True
            self._ended.pop(name, None)
            self._drop_unused(place)
            return place.adapter

    def states(self, waiting: Sequence, running: Sequence) -> dict[str, AdapterState]:
        """What each adapter does, of sequences that wait and run."""
        if not self._places:
            return {}
        waits, runs = (Counter(sequence.place for sequence in some) for some in (waiting, running))
        return {
            p.adapter.name: AdapterState(waits[p.number], runs[p.number], self._ended[p.adapter.name])
            for p in list(self._places.values())
            if p.open
        }

    def _drop_unused(self, place: Place) -> None:
        if not place.open and not place.used:
            del self._places[place.number]


def _told(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
