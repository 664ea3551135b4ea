"""The options of a program, `--flags`, beside the `key=value` settings that all programs share."""

import argparse
import sys
from typing import NoReturn

from runtime.exit_codes import MISTAKE


class Parser(argparse.ArgumentParser):
    """An argument parser that says a mistake in one line on stderr and ends the process with exit code 2."""

    def __init__(self, *positional, **named):
        super().__init__(*positional, **{"allow_abbrev": False, **named})

    def error(self, message: str) -> NoReturn:
        """Says the mistake in one line on stderr and ends the process with exit code 2."""
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(MISTAKE)
