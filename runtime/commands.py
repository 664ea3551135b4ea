"""Programs of several commands: python -m ROOM COMMAND ..., each command in a module of ROOM/commands.

A module has a function add_COMMAND: it adds the command's options to a parser and sets `command`, what runs with them.
"""

import argparse
import importlib
from collections.abc import Mapping

from runtime import leave
from runtime.arguments import Parser
from runtime.exit_codes import MISTAKE

Commands = Mapping[str, tuple[str, str]]  # name -> (module in ROOM/commands, what it does)


def parser(room: str, title: str, commands: Commands, name: str | None) -> Parser:
    """The parser of a command, whose module alone is imported; for None the one that lists them."""
    if name:
        module, words = commands[name]
        options = Parser(prog=f"python -m {room} {name}", description=words)
        getattr(importlib.import_module(f"{room}.commands.{module}"), f"add_{name.replace('-', '_')}")(options)
        return options
    listed = "commands:\n" + "\n".join(f"  {name:12} {words}" for name, (_, words) in commands.items())
    plain = argparse.RawDescriptionHelpFormatter
    top = Parser(prog=f"python -m {room}", description=title, epilog=listed, formatter_class=plain)
    top.add_argument("command", choices=commands, metavar="COMMAND", help="one of those below")
    return top


def run(room: str, title: str, commands: Commands, arguments: list[str]) -> int:
    """Runs the command that the arguments name; returns the exit code. A mistake is told in one line."""
    name, rest = (arguments[0], arguments[1:]) if {*arguments[:1]} & commands.keys() else (None, arguments)
    options = parser(room, title, commands, name).parse_intermixed_args(rest)
    try:
        return options.command(options) or 0
    except leave.MISTAKES as error:
        return leave.ended(MISTAKE, leave.one_line(error))
