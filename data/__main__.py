"""Corpora: python -m data COMMAND ...; --help lists the commands, COMMAND --help their options.

Exit codes: 0 done; 2 the user's mistake, told in one line; 3 a fault; 75 and 130 stopped: the same command goes on.
"""

import sys

from runtime import commands, leave

# Command -> (module in data/commands, what it does)
COMMANDS = {
    "prepare": ("prepare", "tokenise a corpus once, into shards with digests, an index and a card"),
    "clean": ("clean", "remove duplicates, what is too short or of another language, and what an evaluation holds"),
    "tokenizer": ("tokenizer", "train a tokenizer, show one, or convert one to a tokenizer.json"),
    "show": ("show", "print or draw a batch as the model sees it: tokens, documents, masks, sources"),
}


def main(arguments: list[str]) -> int:
    """Runs one command; returns the exit code."""
    return commands.run("data", "Corpora.", COMMANDS, arguments)


if __name__ == "__main__":
    leave.answer_signals()
    sys.exit(main(sys.argv[1:]))
