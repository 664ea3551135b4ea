"""python -m serving audit verify|show: whether the audit is as it was written, and what it says."""

import argparse
import json
import sys
from pathlib import Path

from runtime.arguments import Parser
from runtime.exit_codes import FAULT
from serving.access import audit, verify
from serving.access.opening import FOLDER, open_state


def add_audit(parser: Parser) -> None:
    """Adds the actions and their options."""
    actions = {"verify": _verify, "show": _show}
    words = "name the first line of each chain that is not as it was written; or print the records by their time"
    parser.add_argument("action", choices=actions, help=words)
    parser.add_argument("--state", type=Path, default=FOLDER, help=f"the server's folder; default {FOLDER}")
    parser.add_argument("--archived", action="store_true", help="verify: the oldest files are kept elsewhere")
    parser.add_argument("--who", help="show: the records of one key or subject alone")
    parser.add_argument("--last", type=int, metavar="N", help="show: only the last ones")
    parser.set_defaults(command=lambda options: actions[options.action](options))


def _verify(options: argparse.Namespace) -> int:
    opened = open_state(options.state)
    folder = opened.folder / audit.FOLDER
    mine = f"{audit.folder_id(folder)}/" if folder.exists() else "/"
    copied = {name.removeprefix(mine): head for name, head in opened.store.heads().items() if name.startswith(mine)}
    names = sorted({*verify.chains(folder), *copied})
    faults = 0
    for name in names:
        verdict = verify.verify(folder, name, opened.secret, copied)
        fault = verdict.fault
        if fault is None and verdict.archived and not options.archived:
            fault = f"records 1 to {verdict.archived} are not here; with --archived that is right"
        faults += fault is not None
        print(f"{name}: {fault or f'{verdict.records} records, as they were written'}")
    if not names:
        print(f"{folder}: no record yet", file=sys.stderr)
    return FAULT if faults else 0


def _show(options: argparse.Namespace) -> None:
    folder = open_state(options.state).folder / audit.FOLDER
    records = [line.record for name in verify.chains(folder) for line in verify.lines(folder, name) if line.record]
    records = [record for record in records if options.who in (None, record.get("who"))]
    records.sort(key=lambda record: record.get("time", 0))
    for record in records[-options.last :] if options.last else records:
        print(json.dumps(record))
