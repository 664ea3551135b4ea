"""Scaling laws: python -m scaling COMMAND ...; --help lists the commands, COMMAND --help their options.

Exit codes: 0 done; 1 a coordinate check that is not flat, an optimum that moved; 2 the user's mistake, told in one
line; 3 a sweep has runs that failed; 75 a search was stopped, 130 a sweep was interrupted: the same command goes on.
"""

import sys

from runtime import commands

# Command -> (module in scaling/commands, what it does)
COMMANDS = {
    "plan": ("sweep", "show the runs of a sweep.yaml and the bill"),
    "run": ("sweep", "run what is missing of a sweep"),
    "status": ("sweep", "show how far a sweep is"),
    "launch": ("launch", "run a Hydra sweep on one of its launchers; train.py -m hydra/launcher=... comes here"),
    "collect": ("sweep", "write results.jsonl from runs"),
    "fit": ("fit", "fit a law to a CSV, JSON lines or JSON table"),
    "predict": ("fit", "fit a law to a table and predict the loss of other runs, with intervals"),
    "transfer": ("transfer", "does the best learning rate stay where it is when the model grows?"),
    "report": ("report", "write a report of an experiment: HTML, figures, JSON"),
    "search": ("search", "search for the best settings of a run"),
    "coord-check": ("coordinates", "do activations and their changes depend on the width or the depth?"),
}


def main(arguments: list[str]) -> int:
    """Runs one command; returns the exit code."""
    return commands.run("scaling", "Scaling laws.", COMMANDS, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
