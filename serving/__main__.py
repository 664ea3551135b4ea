"""A model behind an address: python -m serving MODEL [--port N ...], and the commands beside it; --help says more."""

import sys

from runtime import commands, leave

TITLE = "Serves a model over HTTP, and manages who may use it."
SERVE = "serve"  # what a first word that names no command means
# command -> (module in serving/commands, what it does)
COMMANDS = {
    SERVE: ("serve", "a model behind an address"),
    "batch": ("batch", "a file of requests, answered in this process"),
    "cluster": ("cluster", "replicas of it behind a balancer, started again when they fail"),
    "roll": ("cluster", "replace the replicas of a cluster, one at a time, without losing a request"),
    "replicas": ("cluster", "show the replicas of a cluster"),
    "keys": ("keys", "who may use a server: create, list, rotate, revoke, roles"),
    "audit": ("audit", "what was done on a server: verify, show"),
}


def main(arguments: list[str]) -> int:
    """Runs what was asked for; returns the exit code."""
    names_none = arguments and not {arguments[0]} & {*COMMANDS, "-h", "--help"}
    return commands.run("serving", TITLE, COMMANDS, [SERVE, *arguments] if names_none else arguments)


if __name__ == "__main__":
    leave.answer_signals()
    sys.exit(main(sys.argv[1:]))
