"""Corpora: python -m data COMMAND ...; --help lists the commands, COMMAND --help their options.

Exit codes: 0 done; 2 the user's mistake, told in one line; 3 a fault; 75 and 130 stopped: the same command goes on.
"""

import argparse
import importlib
import sys

from runtime import leave
from runtime.arguments import Parser
from runtime.exit_codes import MISTAKE

# Command -> (module in data/commands, what it does)
COMMANDS = {
    "prepare": ("prepare", "tokenise a corpus once, into shards with digests, an index and a card"),
    "clean": ("clean", "remove duplicates, what is too short or of another language, and what an evaluation holds"),
    "tokenizer": ("tokenizer", "train a tokenizer, show one, or convert one to a tokenizer.json"),
    "show": ("show", "print or draw a batch as the model sees it: tokens, documents, masks, sources"),
}


def parser(name: str | None) -> Parser:
    """The parser of a command, whose module alone is imported; for None the one that lists them."""
    if name:
        module, words = COMMANDS[name]
        options = Parser(prog=f"python -m data {name}", description=words)
        getattr(importlib.import_module(f"data.commands.{module}"), f"add_{name}")(options)
        return options
    listed = "commands:\n" + "\n".join(f"  {name:12} {words}" for name, (_, words) in COMMANDS.items())
    plain = argparse.RawDescriptionHelpFormatter
    top = Parser(prog="python -m data", description="Corpora.", epilog=listed, formatter_class=plain)
    top.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    return top


def main(arguments: list[str]) -> int:
    """Runs one command; returns the exit code."""
    name, rest = (arguments[0], arguments[1:]) if {*arguments[:1]} & COMMANDS.keys() else (None, arguments)
    options = parser(name).parse_intermixed_args(rest)
    try:
        return options.command(options) or 0
    except leave.MISTAKES as error:
        return leave.ended(MISTAKE, leave.one_line(error))


if __name__ == "__main__":
    leave.answer_signals()
    sys.exit(main(sys.argv[1:]))
