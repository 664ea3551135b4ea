"""python -m serving keys create|list|rotate|revoke|roles: who may use a server, and for what.

`create` and `rotate` print the new key alone on standard output, once: it is stored nowhere.
"""

import argparse
import sys
import time
from pathlib import Path

from runtime.arguments import Parser
from serving.access.keys import OVERLAP, Key
from serving.access.limits import LIMITS
from serving.access.opening import FOLDER, Opened, open_state, recorded

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def add_keys(parser: Parser) -> None:
    """Adds the actions and their options."""
    actions = {"create": _create, "list": _list, "rotate": _rotate, "revoke": _revoke, "roles": _roles}
    words = "make a key; list all; make a new one for a holder; refuse one; show which role may use which route"
    parser.add_argument("action", choices=actions, help=words)
    parser.add_argument("id", nargs="?", help="rotate, revoke: the start of the key (im-...); revoke: or jwt:SUBJECT")
    parser.add_argument("--state", type=Path, default=FOLDER, help=f"the server's folder; default {FOLDER}")
    create = parser.add_argument_group("create")
    create.add_argument("--role", help="admin, operator, user, reader or one of policy.csv")
    create.add_argument("--name", help="whose it is, for the list and the audit")
    create.add_argument("--tenant", help="keys of one tenant see each other's requests; default: the key alone")
    create.add_argument("--model", action="append", help="one that it may use, * and ? as in file names; default: all")
    create.add_argument("--expires", type=seconds, metavar="90d", help="after so long; default: never")
    for name in LIMITS:
        create.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help="instead of the role's limit")
    rotate = parser.add_argument_group("rotate")
    rotate.add_argument("--overlap", type=seconds, metavar="1h", help="for which the old key still works; default 1h")
    parser.set_defaults(command=lambda options: actions[_checked(options).action](options))


def _checked(options: argparse.Namespace) -> argparse.Namespace:
    """The options, if each belongs to the action. Raises ValueError."""
    owners = dict.fromkeys(("role", "name", "tenant", "model", "expires", *LIMITS), ("create",))
    owners |= {"overlap": ("rotate",), "id": ("rotate", "revoke")}
    for name, actions in owners.items():
        if getattr(options, name) is not None and options.action not in actions:
            raise ValueError(f"{options.action} takes no {name.replace('_', '-')}; {' and '.join(actions)} does")
    if options.action == "create" and options.role is None:
        raise ValueError("create needs --role: admin, operator, user, reader or one of policy.csv")
    if options.action in owners["id"] and options.id is None:
        raise ValueError(f"{options.action} needs the start of a key, im-...; python -m serving keys list names them")
    return options


def seconds(text: str) -> float:
    """A time as people write it: 30s, 15m, 1h, 90d."""
    number, unit = text[:-1], UNITS.get(text[-1:])
    if unit is None or not number.isdecimal() or len(number) > 9:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 30s, 15m, 1h or 90d")
    return float(int(number) * unit)


def _create(options: argparse.Namespace) -> None:
    opened = open_state(options.state)
    check_role(opened, options.role)
    limits = {name: getattr(options, name) for name in LIMITS if getattr(options, name) is not None}
    opened.roles.limits(options.role).changed(limits)
    models = tuple(options.model or ("*",))
    given = {"name": options.name or "", "tenant": options.tenant, "models": models, "limits": limits}
    with recorded(opened, "keys create", subject=options.name, for_role=options.role):
        key, text = opened.keys.create(options.role, made_by="command", seconds=options.expires, **given)
    _hand_over(key, text)


def check_role(opened: Opened, role: str) -> None:
    """Raises ValueError for a role that there is not."""
    if role not in opened.roles.roles:
        raise ValueError(f"no role {role[:64]!r}: {', '.join(opened.roles.roles)}")


def _hand_over(key: Key, text: str) -> None:
    print(f"role {key.role}, {_lifetime(key)}; it is not shown again", file=sys.stderr)
    print(text)


def _list(options: argparse.Namespace) -> None:
    opened = open_state(options.state)
    now = opened.keys.now()
    rows = [("key", "name", "role", "tenant", "models", "limits", "made", "state")]
    for key in opened.keys.all():
        limits = " ".join(f"{name}={value}" for name, value in key.limits.items()) or "-"
        state = "revoked" if key.revoked else "expired" if not key.usable(now) else _lifetime(key)
        rows.append((key.id, key.name, key.role, key.tenant, " ".join(key.models), limits, _date(key.made), state))
    _print_table(rows)


def _lifetime(key: Key) -> str:
    return "never expires" if key.expires is None else f"expires {_date(key.expires)}"


def _date(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(moment))


def _rotate(options: argparse.Namespace) -> None:
    opened = open_state(options.state)
    opened.keys.get(options.id)
    with recorded(opened, "keys rotate", subject=options.id):
        key, text = opened.keys.rotate(
            options.id, made_by="command", overlap=OVERLAP if options.overlap is None else options.overlap
        )
    _hand_over(key, text)


def _revoke(options: argparse.Namespace) -> None:
    opened = open_state(options.state)
    subject = options.id.removeprefix("jwt:") if options.id.startswith("jwt:") else None
    if subject is None:
        opened.keys.get(options.id)
    with recorded(opened, "keys revoke", subject=options.id):
        opened.keys.revoke(options.id) if subject is None else opened.keys.bar(subject)
    print(f"{options.id} is revoked", file=sys.stderr)


def _roles(options: argparse.Namespace) -> None:
    opened = open_state(options.state)
    names = opened.roles.roles
    rows = [("permission", *names, "routes")]
    for permission, routes, roles in opened.roles.matrix():
        rows.append((permission, *("x" if name in roles else "-" for name in names), routes))
    for limit in LIMITS:
        for kind, of in (("each", opened.roles.limits), ("all", opened.roles.total)):
            values = [getattr(of(name), limit) for name in names]
            if any(value is not None for value in values):
                rows.append((limit, *("-" if value is None else str(value) for value in values), f"limit of {kind}"))
    _print_table(rows)


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
