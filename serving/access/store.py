"""The database of keys and limits: SQLite in the state folder, or Postgres where several machines share it.

Tables are made at the start. `read` and `write` run a function of a connection in the caller's thread; a `write` is
one transaction that no other one interleaves with (SQLite), or that takes locks by name (Postgres, `exclusive`).

What every request asks is compiled once to text (`compiled`) and run by the driver itself (`run`): SQLAlchemy takes
about 100 microseconds for a statement, which is five times what SQLite does.
"""

import contextlib
import hashlib
import hmac
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    bindparam,
    create_engine,
    event,
    func,
    insert,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.sql import Executable

from serving.access import secrets

FILE = "access.db"
SCHEMA = "1"
WAIT_SECONDS = 5  # for a lock or a connection


class Unreachable(Exception):
    """The database is gone, full or locked; what was asked may be asked again."""


tables = MetaData()
FACTS = Table("facts", tables, Column("name", String, primary_key=True), Column("value", String, nullable=False))
KEYS = Table(
    "keys",
    tables,
    Column("id", String, primary_key=True),  # im-..., the public part of the key
    Column("digest", String, nullable=False),  # keyed hash of the whole key
    Column("holder", String, nullable=False),  # the first key of a chain of rotations: limits count by it
    Column("name", String, nullable=False),
    Column("role", String, nullable=False),
    Column("tenant", String, nullable=False),
    Column("models", JSON, nullable=False),
    Column("limits", JSON, nullable=False),
    Column("made", Float, nullable=False),
    Column("made_by", String, nullable=False),
    Column("expires", Float),
    Column("revoked", Float),
)
BARRED = Table(  # tokens of these subjects that were made up to `since` are revoked
    "barred", tables, Column("subject", String, primary_key=True), Column("since", Float, nullable=False)
)
USED = Table(  # what a subject took in one slice of time
    "used",
    tables,
    Column("subject", String, primary_key=True),
    Column("window", Integer, primary_key=True),  # seconds
    Column("slice", BigInteger, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
)
LEASES = Table(  # requests that run
    "leases",
    tables,
    Column("id", String, primary_key=True),
    Column("subject", String, primary_key=True),
    Column("replica", String, nullable=False),
)
Index("leases_by_subject", LEASES.c.subject)
Index("leases_by_replica", LEASES.c.replica)
REPLICAS = Table(  # a replica that says nothing until then is dead, and its requests with it
    "replicas", tables, Column("id", String, primary_key=True), Column("until", Float, nullable=False)
)
HEADS = Table(  # the last record of each chain of the audit
    "heads",
    tables,
    Column("chain", String, primary_key=True),
    Column("sequence", BigInteger, nullable=False),
    Column("hash", String, nullable=False),
)

T = TypeVar("T")


class Store:
    """An open database. Its methods may be called in any thread."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time):
        self.engine, self._clock = engine, clock
        self.postgres = engine.dialect.name == "postgresql"
        single = {"isolation_level": "AUTOCOMMIT"} if self.postgres else {"single": True}
        self._single = engine.execution_options(**single)
        self._broken = (engine.dialect.loaded_dbapi.OperationalError, engine.dialect.loaded_dbapi.InterfaceError)
        self._lock, self._now = self.compiled(_LOCK), self.compiled(_NOW)

    def read(self, what: Callable[[Connection], T]) -> T:
        """Runs single statements, each for itself. Raises Unreachable, as all that use the database."""
        with _faults(), self._single.connect() as connection:
            return what(connection)

    def write(self, what: Callable[[Connection], T]) -> T:
        """Runs one transaction. It is on the disk when this returns, on SQLite but for a power failure."""
        with _faults(), self.engine.begin() as connection:
            return what(connection)

    def compiled(self, statement: Executable) -> str:
        """The text of a statement for `run`, whose parameters have names."""
        return str(statement.compile(dialect=self.engine.dialect))

    def run(self, what: Callable[[Any], T], *, write: bool = False, wait: bool = True) -> T:
        """Runs a function of the driver's own cursor: a transaction if it is to write, else single statements.

        Without `wait` it raises Unreachable at once where SQLite has another writer.
        """
        with _faults():
            connection = self.engine.raw_connection()
            try:
                cursor = connection.cursor()
                if write and not self.postgres:
                    _begin_writing(cursor, wait)
                found = what(cursor)
                connection.commit()
                return found
            except self._broken:
                connection.invalidate()
                if self.postgres:
                    self.engine.dispose()  # the other connections are as dead as this one
                raise
            finally:
                connection.close()

    def write_durably(self, what: Callable[[Connection], T]) -> T:
        """A transaction that survives a power failure: keys that were revoked stay so."""
        if self.postgres:
            return self.write(what)
        with _faults(), self.engine.connect() as connection:
            raw = connection.connection.driver_connection
            raw.execute("PRAGMA synchronous=FULL")
            try:
                with connection.begin():
                    return what(connection)
            finally:
                raw.execute("PRAGMA synchronous=NORMAL")

    def exclusive(self, connection: Any, names: Iterable[str]) -> None:
        """Holds locks until the end of this transaction: always in one order, so that two cannot wait for each other.

        SQLite has one writer at a time anyway.
        """
        if self.postgres:
            for number in sorted({_number(name) for name in names}):
                connection.execute(self._statement(connection, _LOCK, self._lock), {"number": number})

    def now(self, connection: Any) -> float:
        """Seconds since 1970 by the clock that all replicas share: Postgres's own, or that of the one machine."""
        if not self.postgres:
            return self._clock()
        return float(connection.execute(self._statement(connection, _NOW, self._now)).fetchone()[0])

    @staticmethod
    def _statement(connection: Any, statement: Executable, text: str) -> Executable | str:
        return statement if isinstance(connection, Connection) else text

    def upsert(self, table: Table):
        """INSERT with ON CONFLICT, which both databases have."""
        return postgresql.insert(table) if self.postgres else sqlite.insert(table)

    def tidy(self) -> None:
        """Brings SQLite's log into its file, which waits for the disk; to be called now and then."""
        if not self.postgres:
            self.read(lambda connection: connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)").all())

    def keep_head(self, chain: str, sequence: int, digest: str) -> None:
        """Copies the head of a chain of the audit, unless a later one is here."""
        row = {"chain": chain, "sequence": sequence, "hash": digest}
        added = self.upsert(HEADS).values(row)
        later = HEADS.c.sequence < sequence
        known = added.on_conflict_do_update(
            index_elements=["chain"], set_={"sequence": sequence, "hash": digest}, where=later
        )
        self.write(lambda connection: connection.execute(known))

    def heads(self) -> dict[str, tuple[int, str]]:
        """The copies of heads: chain -> (sequence, hash)."""
        rows = self.read(lambda connection: connection.execute(select(HEADS)).all())
        return {row.chain: (row.sequence, row.hash) for row in rows}

    def close(self) -> None:
        """Gives the connections back."""
        self.engine.dispose()


_LOCK = select(func.pg_advisory_xact_lock(bindparam("number", type_=BigInteger)))
_NOW = select(func.extract("epoch", func.clock_timestamp()))


@contextlib.contextmanager
def _faults() -> Iterator[None]:
    """Tells faults of the database from ours. No message of a driver goes on: it may hold parts of an address."""
    try:
        yield
    except (DBAPIError, PoolTimeout, sqlite3.Error) as error:
        raise _told(error) from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "psycopg":
            raise
        raise _told(error) from None


def _told(error: Exception) -> Exception:
    cause = getattr(error, "orig", None) or error
    known = ("OperationalError", "InterfaceError", "TimeoutError")
    names = [kind.__name__ for kind in type(cause).__mro__]
    if isinstance(error, PoolTimeout) or any(name in names for name in known):
        return Unreachable(f"{type(cause).__name__}")
    return RuntimeError(f"the database refused a statement: {type(cause).__name__}")


def _number(name: str) -> int:
    """A name as the 63 bits that a lock of Postgres has."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def open_store(state: Path, secret: bytes, clock: Callable[[], float] = time.time) -> Store:
    """The database of a state folder, its tables made. Two processes may do so at once.

    Raises ValueError where the address is no address, the database cannot be reached, or its keys were made with
    another secret than this server's.
    """
    address = secrets.given(state, secrets.DATABASE)
    store = Store(_engine(state, address), clock)
    try:
        store.write(lambda connection: _prepare(store, connection, secret))
    except Unreachable as error:
        where = store.engine.url.render_as_string(hide_password=True)
        raise ValueError(f"the database {where} cannot be used: {error}") from None
    return store


def _engine(state: Path, address: str | None) -> Engine:
    if address is None:
        path = state / FILE
        path.touch(mode=0o600, exist_ok=True)
        engine = create_engine(f"sqlite:///{path}", paramstyle="named", pool_size=16, pool_timeout=WAIT_SECONDS)
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_at_once)
        return engine
    try:
        url = make_url(address)
    except ArgumentError:
        raise ValueError("the database's address is none, as in postgresql://user:password@host/name") from None
    if url.get_backend_name() != "postgresql":
        raise ValueError(f"a database {url.get_backend_name()} is unknown: postgresql:// or none, for SQLite")
    timeouts = {
        "connect_timeout": 3,
        "tcp_user_timeout": WAIT_SECONDS * 1000,
        "options": f"-c statement_timeout={WAIT_SECONDS * 1000} -c idle_in_transaction_session_timeout=30000",
    }
    url = url.set(drivername="postgresql+psycopg")
    return create_engine(url, pool_size=16, pool_timeout=WAIT_SECONDS, connect_args=timeouts, hide_parameters=True)


def _set_up_sqlite(raw, record) -> None:
    raw.isolation_level = None  # transactions begin where we say so, not where the driver thinks
    raw.execute(f"PRAGMA busy_timeout={WAIT_SECONDS * 1000}")
    raw.execute("PRAGMA journal_mode=WAL")
    raw.execute("PRAGMA synchronous=NORMAL")
    raw.execute("PRAGMA wal_autocheckpoint=20000")  # pages: `tidy` comes first, so that no request waits for it


def _begin_writing(cursor: sqlite3.Cursor, wait: bool) -> None:
    """BEGIN IMMEDIATE, for which SQLite waits or does not."""
    if wait:
        cursor.execute("BEGIN IMMEDIATE")
        return
    cursor.execute("PRAGMA busy_timeout=0")
    try:
        cursor.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        raise Unreachable("another writer") from None
    finally:
        cursor.execute(f"PRAGMA busy_timeout={WAIT_SECONDS * 1000}")


def _begin_at_once(connection: Connection) -> None:
    """Takes SQLite's one write lock first, so that what a transaction reads stays true until it writes."""
    if "single" not in connection.get_execution_options():
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _prepare(store: Store, connection: Connection, secret: bytes) -> None:
    store.exclusive(connection, ["schema"])
    tables.create_all(connection)
    facts = {"schema": SCHEMA, "secret": hmac.new(secret, b"which secret", hashlib.sha256).hexdigest()}
    found = dict(connection.execute(select(FACTS.c.name, FACTS.c.value)).all())
    for name, value in facts.items():
        if name not in found:
            connection.execute(insert(FACTS), {"name": name, "value": value})
    if found.get("schema", SCHEMA) != SCHEMA:
        raise ValueError(f"the database has schema {found['schema']}, this code {SCHEMA}")
    if found.get("secret", facts["secret"]) != facts["secret"]:
        raise ValueError(
            f"the keys in this database were made with another secret: give all replicas the same {secrets.SECRET[1]}"
        )
