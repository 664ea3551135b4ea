"""The exit codes of every program of the project."""

DONE = 0
MISTAKE = 2  # the user's, told in one line
FAULT = 3  # while running; the state was saved
PREEMPTED = 75  # stopped on request after a clean checkpoint: the same command goes on
INTERRUPTED = 130  # by Ctrl-C, before there was anything to save or without waiting for it
