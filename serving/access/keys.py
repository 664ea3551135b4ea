"""API keys: im-<id>-<secret>. The id finds the key; of the whole only a keyed hash is stored.

So a stolen database opens nothing. A key is looked up in the database at every request: revoked there, it is refused
everywhere from that moment.
"""

import hashlib
import hmac
import json
import math
import re
import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, func, insert, select, update

from serving.access.store import BARRED, KEYS, Store

SHAPE = re.compile(r"(im-[a-z0-9]{10})-[A-Za-z0-9]{40}")  # 40 of 62 characters: 238 bits
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:-]{0,63}")  # of holders, tenants, roles: safe in any log
OVERLAP = 3600.0  # seconds for which a rotated key still works

_BY_ID = select(KEYS).where(KEYS.c.id == bindparam("id"))
_BARRED = select(BARRED.c.since).where(BARRED.c.subject == bindparam("subject"))


@dataclass(frozen=True)
class Key:
    """What is known of a key, without its secret."""

    id: str
    holder: str  # limits count by it: a rotated key has the holder of the one before
    name: str
    role: str
    tenant: str
    models: tuple[str, ...]
    limits: Mapping[str, int]  # those that differ from the role's
    made: float
    made_by: str
    expires: float | None
    revoked: float | None

    def usable(self, now: float) -> bool:
        """Whether it opens anything at this time."""
        return self.revoked is None and (self.expires is None or now < self.expires)


class Keys:
    """The keys in a database. Raises ValueError for what cannot be; unreachable databases raise as Store tells."""

    def __init__(self, store: Store, secret: bytes):
        self._store, self._secret = store, secret
        self._by_id, self._barred = store.compiled(_BY_ID), store.compiled(_BARRED)

    def digest(self, key: str) -> str:
        """The keyed hash of a key (HMAC-SHA256): all that is stored of its secret."""
        return hmac.new(self._secret, key.encode(), hashlib.sha256).hexdigest()

    def find(self, key: str) -> Key | None:
        """The usable key that these characters are, else None; whatever it is, the time hardly tells."""
        shape = SHAPE.fullmatch(key)
        if shape is None:
            return None

        def look_up(cursor: Any) -> tuple[tuple | None, float]:
            return cursor.execute(self._by_id, {"id": shape[1]}).fetchone(), self._store.now(cursor)

        row, now = self._store.run(look_up)
        fields = dict(zip(KEYS.c.keys(), row, strict=True)) if row else {"digest": ""}
        right = hmac.compare_digest(self.digest(key), fields["digest"])
        found = _key(fields) if row and right else None
        return found if found and found.usable(now) else None

    def usable_of(self, holder: str) -> Key | None:
        """The newest key of a holder that opens anything now: after a rotation that is another than before."""

        def look_up(connection: Connection) -> Key | None:
            found = connection.execute(select(KEYS).where(KEYS.c.holder == holder).order_by(KEYS.c.made.desc())).all()
            now = self._store.now(connection)
            return next((key for row in found if (key := _key(row._mapping)).usable(now)), None)

        return self._store.read(look_up)

    def create(
        self,
        role: str,
        *,
        made_by: str,
        name: str = "",
        tenant: str | None = None,
        models: tuple[str, ...] = ("*",),
        limits: Mapping[str, int] | None = None,
        seconds: float | None = None,
    ) -> tuple[Key, str]:
        """Makes a key that works for so many seconds (None: without end); returns it with its text."""
        _check_names(role=role, **({"name": name} if name else {}), **({} if tenant is None else {"tenant": tenant}))
        given = {"role": role, "name": name, "tenant": tenant, "models": models, "limits": dict(limits or {})}
        return self._store.write_durably(
            lambda connection: self._add(connection, {**given, "made_by": made_by}, seconds)
        )

    def create_first(self, role: str, *, made_by: str) -> tuple[Key, str] | None:
        """Makes a key if there is none at all; of several processes only one does."""

        def make(connection: Connection):
            self._store.exclusive(connection, ["first key"])
            if connection.execute(select(func.count()).select_from(KEYS)).scalar_one():
                return None
            given = {"role": role, "name": "first", "tenant": None, "models": ("*",), "limits": {}}
            return self._add(connection, {**given, "made_by": made_by}, None)

        return self._store.write_durably(make)

    def rotate(self, id: str, *, made_by: str, overlap: float = OVERLAP) -> tuple[Key, str]:
        """A new key for the holder of this one, which still works for `overlap` seconds, and then no more."""

        def change(connection: Connection):
            self._store.exclusive(connection, [id])
            old = self._usable(connection, id)
            ends = self._store.now(connection) + overlap
            ends = ends if old.expires is None else min(ends, old.expires)
            connection.execute(update(KEYS).where(KEYS.c.id == id).values(expires=ends))
            same = {"role": old.role, "name": old.name, "tenant": old.tenant, "models": old.models}
            same |= {"limits": dict(old.limits), "holder": old.holder, "made_by": made_by}
            return self._add(connection, same, None if old.expires is None else old.expires - old.made)

        if not 0 <= overlap < math.inf:
            raise ValueError(f"an overlap of {overlap} s must be 0 or more")
        return self._store.write_durably(change)

    def revoke(self, id: str) -> Key:
        """Refuses a key from now on, in every replica."""

        def change(connection: Connection) -> Key:
            self._store.exclusive(connection, [id])
            key = self._named(connection, id)
            if key.revoked is None:
                connection.execute(update(KEYS).where(KEYS.c.id == id).values(revoked=self._store.now(connection)))
            return self._named(connection, id)

        return self._store.write_durably(change)

    def bar(self, subject: str) -> None:
        """Refuses all tokens of a subject that were issued up to now."""

        def change(connection: Connection) -> None:
            row = {"subject": subject, "since": self._store.now(connection)}
            added = self._store.upsert(BARRED).values(row)
            connection.execute(added.on_conflict_do_update(index_elements=["subject"], set_={"since": row["since"]}))

        self._store.write_durably(change)

    def barred_since(self, subject: str) -> float | None:
        """Tokens of this subject that were issued up to this time are refused."""
        row = self._store.run(lambda cursor: cursor.execute(self._barred, {"subject": subject}).fetchone())
        return row[0] if row else None

    def get(self, id: str) -> Key:
        """The key with this id. Raises ValueError where there is none."""
        return self._store.read(lambda connection: self._named(connection, id))

    def all(self) -> list[Key]:
        """Every key that was ever made, oldest first."""
        rows = self._store.read(lambda connection: connection.execute(select(KEYS).order_by(KEYS.c.made)).all())
        return [_key(row._mapping) for row in rows]

    def now(self) -> float:
        """The time by which keys expire."""
        return self._store.read(self._store.now)

    def _named(self, connection: Connection, id: str) -> Key:
        row = connection.execute(_BY_ID, {"id": id}).first()
        if row is None:
            raise ValueError(f"no key {id[:64]!r}; python -m serving keys list names them all")
        return _key(row._mapping)

    def _usable(self, connection: Connection, id: str) -> Key:
        key = self._named(connection, id)
        if not key.usable(self._store.now(connection)):
            raise ValueError(f"key {id} is {'expired' if key.revoked is None else 'revoked'}; make a new one")
        return key

    def _add(self, connection: Connection, row: dict, seconds: float | None) -> tuple[Key, str]:
        if seconds is not None and not 0 < seconds < math.inf:
            raise ValueError(f"a key that works for {seconds} s must be above 0")
        id = f"im-{_random(string.ascii_lowercase + string.digits, 10)}"
        text = f"{id}-{_random(string.ascii_letters + string.digits, 40)}"
        now = self._store.now(connection)
        row = {"id": id, "holder": id, "revoked": None, **row}
        row |= {"name": row["name"] or id, "tenant": row["tenant"] or id, "models": list(row["models"])}
        row |= {"digest": self.digest(text), "made": now, "expires": None if seconds is None else now + seconds}
        connection.execute(insert(KEYS), row)
        return self._named(connection, id), text


def _random(alphabet: str, length: int) -> str:
    return "".join(secrets.choice(alphabet) for _ in range(length))


def _check_names(**names: str) -> None:
    for what, name in names.items():
        if not NAME.fullmatch(name):
            raise ValueError(f"{what}={name[:64]!r}: 1 to 64 letters, digits and . _ @ : -, a letter or digit first")


def _key(row: Mapping[str, Any]) -> Key:
    fields = {name: value for name, value in row.items() if name != "digest"}
    for name in ("models", "limits"):  # SQLite's driver knows no JSON
        fields[name] = json.loads(fields[name]) if isinstance(fields[name], str) else fields[name]
    return Key(**{**fields, "models": tuple(fields["models"])})
