"""Roles: which permission, for which models, within which limits. Decided by casbin; what no line allows is refused.

Beside the four roles here an operator may write others, in a file `policy.csv` of the state folder:

    p, analyst, embeddings, small*      the role may use a permission (* for all) for models (* and ? as in file names)
    g, analyst, reader                  the role may do all that another may
    limit, analyst, requests_a_minute, 60      for each holder of a key with this role
    total, analyst, tokens_a_day, 1000000      for all of them together
"""

import csv
import fnmatch
import functools
from collections.abc import Iterable
from pathlib import Path

import casbin

from serving.access.keys import NAME
from serving.access.limits import Limits
from serving.access.permissions import PERMISSIONS

FILE = "policy.csv"
ALL = "*"
ADMIN = ("keys", "drain", "adapters")  # they change the server: what they are used for is written down first
ROLES = {
    "admin": (ALL,),
    "operator": ("models", "page", "state", "metrics", "drain", "schema"),
    "user": (
        *("chat", "completions", "embeddings", "classify", "files", "batches"),
        *("models", "tokens", "requests", "page", "state", "schema"),
    ),
    "reader": ("models", "page", "state", "metrics", "schema"),
}
MODEL = """
[request_definition]
r = role, permission, model
[policy_definition]
p = role, permission, model
[role_definition]
g = _, _
[policy_effect]
e = some(where (p.eft == allow))
[matchers]
m = g(r.role, p.role) && names(r.permission, p.permission) && (r.model == "" || names(r.model, p.model))
"""


class Policy:
    """Every role that there is. Raises ValueError for a line of the file that says nothing."""

    def __init__(self, lines: Iterable[list[str]] = (), source: str = FILE):
        model = casbin.Model()
        model.load_model_from_text(MODEL)
        self._enforcer = casbin.Enforcer(model)
        self._enforcer.add_function("names", _matches)
        self._limits: dict[str, dict[str, dict[str, int]]] = {"limit": {}, "total": {}}
        self.roles = list(ROLES)
        for role, permissions in ROLES.items():
            for permission in permissions:
                self._enforcer.add_policy(role, permission, ALL)
        for number, line in enumerate(lines, 1):
            words = [word.strip() for word in line]
            if any(words) and not words[0].startswith("#"):
                self._read(f"{source}:{number}", words)
        self._check_roles(source)
        self.may = functools.lru_cache(maxsize=4096)(self._may)

    def _read(self, where: str, words: list[str]) -> None:
        kinds = {"p": 4, "g": 3, "limit": 4, "total": 4}
        if len(words) != kinds.get(words[0]):
            raise ValueError(
                f"{where}: {', '.join(words)[:100]!r} is no line; see the head of serving/access/policy.py"
            )
        kind, role, *rest = words
        if not NAME.fullmatch(role):
            raise ValueError(f"{where}: role {role[:64]!r} is no name: letters, digits and . _ @ : -")
        if role == "admin":
            raise ValueError(f"{where}: admin may do everything, without limits; name another role")
        self.roles += [role] * (role not in self.roles and kind in "pg")
        if kind == "p":
            if rest[0] not in (ALL, *PERMISSIONS):
                raise ValueError(f"{where}: no permission {rest[0][:64]!r}: *, {', '.join(PERMISSIONS)}")
            self._enforcer.add_policy(role, *rest)
        elif kind == "g":
            self._enforcer.add_grouping_policy(role, *rest)
        elif not rest[1].isdecimal():
            raise ValueError(f"{where}: {rest[1][:64]!r} must be a whole number, 0 or more")
        else:
            if kind == "total" and rest[0] == "context":
                raise ValueError(f"{where}: context is a limit of one request, not a total")
            limits = self._limits[kind].setdefault(role, {})
            limits[rest[0]] = int(rest[1])
            try:
                Limits().changed(limits)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None

    def _check_roles(self, source: str) -> None:
        inherited = {line[1] for line in self._enforcer.get_grouping_policy()}
        for role in sorted(inherited | {role for kind in self._limits.values() for role in kind}):
            if role not in self.roles:
                raise ValueError(f"{source}: no role {role!r}: {', '.join(self.roles)}")

    def _may(self, role: str, permission: str, model: str | None = None) -> bool:
        """Whether a role may do something with a model; None: with any at all."""
        return role in self.roles and model != "" and self._enforcer.enforce(role, permission, model or "")

    def limits(self, role: str) -> Limits:
        """Of each holder of a key with this role."""
        return Limits().changed(self._limits["limit"].get(role, {}))

    def total(self, role: str) -> Limits:
        """Of all holders of keys with this role together."""
        return Limits().changed(self._limits["total"].get(role, {}))

    def covers(self, role: str, other: str) -> bool:
        """Whether a role may do all that another may: nobody gives away more than they have."""
        if role == "admin":
            return True
        rules = self._enforcer.get_implicit_permissions_for_user(other)
        wide = [ALL] if self._limits["limit"].get(role) or self._limits["total"].get(role) else []
        return not wide and all(self._covered(role, permission, model) for _, permission, model in rules)

    def _covered(self, role: str, permission: str, model: str) -> bool:
        names = list(PERMISSIONS) if permission == ALL else [permission]
        return all(self.may(role, name, model) for name in names)

    def matrix(self) -> list[tuple[str, str, list[str]]]:
        """Role x route: each permission with its routes and the roles that have it."""
        return [
            (name, routes, [role for role in self.roles if self.may(role, name)])
            for name, routes in PERMISSIONS.items()
        ]


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern)


def allows(patterns: Iterable[str], model: str) -> bool:
    """Whether a model is among those that somebody may use."""
    return any(_matches(model, pattern) for pattern in patterns)


class PolicyFile:
    """`policy.csv` of a state folder, which need not be there, and whether it has changed since it was read."""

    def __init__(self, state: Path):
        self._path = state / FILE
        self._known = self._seen = self._stamp()  # () as known: what was read does not hold

    def read(self) -> Policy:
        """The roles. Raises ValueError or OSError where they cannot be read."""
        self._known = self._seen = self._stamp()
        if self._known is None:
            return Policy()
        with self._path.open(newline="") as file:
            try:
                return Policy(csv.reader(file, skipinitialspace=True), str(self._path))
            except csv.Error as error:
                raise ValueError(f"{self._path}: {error}") from None

    def settled(self) -> bool:
        """Whether it is another one than was read, and the same as at the last call: nobody is writing it now."""
        before, self._seen = self._seen, self._stamp()
        return self._seen != self._known and self._seen == before

    def forget(self) -> None:
        """What was read does not hold: it is to be read again."""
        self._known = ()

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size
