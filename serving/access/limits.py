"""Limits that hold over all replicas: requests and tokens in a sliding window, and requests at once.

Room is taken before a request runs, for the most it may use, and what it did not use is given back afterwards. All
its limits are looked at and taken in one transaction, so that no mix of processes gets more than there is.

Why not the strategies of the `limits` package over a storage of our own: each of its limits is a `hit` of its own, so
that a request which one limit lets in and the next refuses has used up the first; nothing can be given back; and its
sliding window interpolates, where this one never lets more through in any 60 seconds than it says.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from sqlalchemy import Connection, and_, bindparam, delete, func, insert, literal_column, or_, select, union_all, update

from serving.access.store import LEASES, REPLICAS, USED, Store

# window in seconds -> slices that are counted as a whole: a slice is forgotten when all of it is older than the window
MINUTE, DAY = 60, 24 * 60 * 60
SLICE = {MINUTE: 2, DAY: 30 * 60}
LEASE_SECONDS = 30.0  # after which the requests of a replica that says nothing are no longer counted as running
BEAT_SECONDS = 5.0


@dataclass(frozen=True)
class Limits:
    """What somebody may ask for; None: as much as they like."""

    requests_a_minute: int | None = None
    tokens_a_minute: int | None = None
    tokens_a_day: int | None = None
    concurrent: int | None = None  # requests at once
    context: int | None = None  # tokens of prompt and answers of one request

    def __post_init__(self):
        for name in LIMITS:
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and 0 <= value < 2**53):
                raise ValueError(f"{name}={value} must be a whole number, 0 or more")

    def changed(self, values: Mapping[str, int]) -> "Limits":
        """These limits, but for those given. Raises ValueError for a name that is none."""
        unknown = sorted(values.keys() - set(LIMITS))
        if unknown:
            raise ValueError(f"no limit {unknown[0]!r}: {', '.join(LIMITS)}")
        return Limits(**{**{name: getattr(self, name) for name in LIMITS}, **values})

    @property
    def counted(self) -> bool:
        """Whether the database must count for them."""
        return any(getattr(self, name) is not None for name in LIMITS if name != "context")

    @property
    def most_tokens(self) -> int | None:
        """Tokens that no request can exceed, whenever it comes."""
        return min((n for n in (self.tokens_a_minute, self.tokens_a_day) if n is not None), default=None)


LIMITS = tuple(field.name for field in fields(Limits))


class Slice(NamedTuple):
    """Where something was counted."""

    subject: str
    window: int
    slice: int


@dataclass(frozen=True)
class Taken:
    """Room taken for one request."""

    id: str
    slices: tuple[Slice, ...] = ()
    tokens: int = 0
    leased: bool = False  # whether it counts as running until it is settled


@dataclass(frozen=True)
class Refused:
    """No room: which limit, and in how many seconds there may be some."""

    limit: str
    most: int
    retry_after: float


_RUNNING = (
    select(func.count())
    .select_from(LEASES.join(REPLICAS, LEASES.c.replica == REPLICAS.c.id))
    .where(LEASES.c.subject == bindparam("of"), REPLICAS.c.until > bindparam("now"))
)
_HAS_ROOM = select(func.count()).select_from(LEASES).where(LEASES.c.id == bindparam("lease"))
# what a subject has used, slice by slice; and as window 0 what runs, and whether this request has room already
_STATE = select(USED.c.window, USED.c.slice, USED.c.requests, USED.c.tokens).where(
    USED.c.subject == bindparam("of"),
    or_(
        and_(USED.c.window == literal_column(str(MINUTE)), USED.c.slice >= bindparam("minute")),
        and_(USED.c.window == literal_column(str(DAY)), USED.c.slice >= bindparam("day")),
    ),
)
_STATE = union_all(
    _STATE, select(literal_column("0"), literal_column("0"), _RUNNING.scalar_subquery(), _HAS_ROOM.scalar_subquery())
)
_LEASE = insert(LEASES).values({name: bindparam(f"new_{name}") for name in ("id", "subject", "replica")})
_FREE = delete(LEASES).where(LEASES.c.id == bindparam("lease"))
_GIVE_BACK = (
    update(USED)
    .where(*(getattr(USED.c, name) == bindparam(f"at_{name}") for name in Slice._fields))
    .values(requests=USED.c.requests - bindparam("fewer"), tokens=USED.c.tokens - bindparam("unused"))
)


class Quotas:
    """Counts what subjects use, for one replica among others."""

    def __init__(self, store: Store, replica: str):
        self._store, self._replica = store, replica
        added = store.upsert(USED)
        more = {name: USED.c[name] + added.excluded[name] for name in ("requests", "tokens")}
        count = added.on_conflict_do_update(index_elements=list(Slice._fields), set_=more)
        statements = (count, _STATE, _LEASE, _FREE, _GIVE_BACK)
        self._count, self._state, self._lease, self._free, self._give_back = map(store.compiled, statements)

    def take(self, id: str, limits: Mapping[str, Limits], tokens: int, *, wait: bool = True) -> Taken | Refused:
        """Takes room for a request of so many tokens from each subject, or from none; `wait` as in Store.run.

        With the id of a request that has its room already (the answer to it was lost), nothing more is taken.
        """
        subjects = {subject: limit for subject, limit in sorted(limits.items()) if limit.counted}
        if not subjects:
            return Taken(id)
        return self._store.run(lambda cursor: self._take(cursor, id, subjects, tokens), write=True, wait=wait)

    def _take(self, cursor: Any, id: str, subjects: Mapping[str, Limits], tokens: int) -> Taken | Refused:
        self._store.exclusive(cursor, subjects)
        now = self._store.now(cursor)
        taken = Taken(id, tuple(_slices(subjects, now)), tokens, leased=True)
        for subject, limit in subjects.items():
            asked = {"of": subject, "minute": _first(MINUTE, now), "day": _first(DAY, now), "now": now, "lease": id}
            rows = cursor.execute(self._state, asked).fetchall()
            running, has_room = next(row[2:] for row in rows if row[0] == 0)
            if has_room:
                return taken
            refused = _refusal(limit, tokens, rows, running, now)
            if refused:
                return refused
        if taken.slices:
            rows = [{**place._asdict(), "requests": 1, "tokens": tokens} for place in taken.slices]
            cursor.executemany(self._count, rows)
        rows = [{"new_id": id, "new_subject": subject, "new_replica": self._replica} for subject in subjects]
        cursor.executemany(self._lease, rows)
        return taken

    def settle(self, taken: Taken, tokens: int, *, ran: bool = True, wait: bool = True) -> bool:
        """Ends a request that used so many tokens; one that did not run is not counted. A second time does nothing.

        `wait` as in Store.run. True where it returns at all.
        """

        def give_back(cursor: Any) -> None:
            unused = {"fewer": 0 if ran else 1, "unused": taken.tokens - tokens}
            rows = [{**{f"at_{n}": v for n, v in place._asdict().items()}, **unused} for place in taken.slices]
            if cursor.execute(self._free, {"lease": taken.id}).rowcount and rows and any(unused.values()):
                cursor.executemany(self._give_back, rows)

        self._store.run(give_back, write=True, wait=wait)
        return True

    def beat(self) -> None:
        """Says that this replica lives; forgets what is over."""

        def renew(connection: Connection) -> None:
            now = self._store.now(connection)
            row = {"id": self._replica, "until": now + LEASE_SECONDS}
            added = self._store.upsert(REPLICAS).values(row)
            connection.execute(added.on_conflict_do_update(index_elements=["id"], set_={"until": row["until"]}))
            dead = select(REPLICAS.c.id).where(REPLICAS.c.until < now - DAY)
            connection.execute(delete(LEASES).where(LEASES.c.replica.in_(dead)))
            connection.execute(delete(REPLICAS).where(REPLICAS.c.until < now - DAY))
            for window, length in SLICE.items():
                old = USED.c.slice < _first(window, now) - LEASE_SECONDS // length - 1
                connection.execute(delete(USED).where(USED.c.window == window, old))

        self._store.write(renew)

    def leave(self) -> None:
        """Ends this replica: nothing of it runs any more."""

        def forget(connection: Connection) -> None:
            connection.execute(delete(LEASES).where(LEASES.c.replica == self._replica))
            connection.execute(delete(REPLICAS).where(REPLICAS.c.id == self._replica))

        self._store.write(forget)


def _first(window: int, now: float) -> int:
    """The oldest slice of which a part lies in the window that ends now."""
    return int((now - window) // SLICE[window])


def _slices(subjects: Mapping[str, Limits], now: float):
    for subject, limit in subjects.items():
        if limit.requests_a_minute is not None or limit.tokens_a_minute is not None:
            yield Slice(subject, MINUTE, int(now // SLICE[MINUTE]))
        if limit.tokens_a_day is not None:
            yield Slice(subject, DAY, int(now // SLICE[DAY]))


def _refusal(limit: Limits, tokens: int, rows: list[tuple], running: int, now: float) -> Refused | None:
    """The limit that has no room for one more request of so many tokens."""
    for name, window, column, wanted in (
        ("requests_a_minute", MINUTE, 2, 1),
        ("tokens_a_minute", MINUTE, 3, tokens),
        ("tokens_a_day", DAY, 3, tokens),
    ):
        most = getattr(limit, name)
        counts = sorted((row[1], row[column]) for row in rows if row[0] == window)
        if most is not None and sum(count for _, count in counts) + wanted > most:
            return Refused(name, most, _room_after(counts, window, most - wanted, now))
    if limit.concurrent is not None and running >= limit.concurrent:
        return Refused("concurrent", limit.concurrent, 1.0)
    return None


def _room_after(counts: list[tuple[int, int]], window: int, most: int, now: float) -> float:
    """Seconds until so many slices are forgotten that at most `most` is counted."""
    total = sum(count for _, count in counts)
    for number, count in counts:
        total -= count
        if total <= most:
            return max(0.0, (number + 1) * SLICE[window] + window - now)
    return float(window)
