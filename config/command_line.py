"""The command line of train.py and of whatever takes its overrides: one run, several, help, or a study of many."""

import contextlib
import itertools
import os
import shlex
import sys
from pathlib import Path

from config.build import plain
from config.compose import load, parsed
from config.help import help_text
from config.schema import Config, differences, identity
from runtime.exit_codes import DONE, MISTAKE
from runtime.overrides import override

SEARCH = "hydra/sweeper=search"
EXPERIMENT = "experiment="
EXPERIMENTS = Path("experiments")
LAUNCHER = ("hydra/launcher=", "hydra.launcher.")


def command_line(arguments: list[str]) -> list[Config]:
    """The runs that a command line asks for: one, or with -m (--multirun) each of a Hydra sweep.

    The process becomes `python -m scaling search` with hydra/sweeper=search, `scaling run experiments/NAME/sweep.yaml`
    with experiment=NAME, and `scaling launch` with hydra/launcher=...: they start each run as a process of its own.

    Help, of the run that the other arguments ask for, is printed and ends the process with 0; a mistake is one line on
    stderr and exit code 2.
    """
    try:
        if {"-h", "--help"} & set(arguments):
            print(help_text(overrides=[a for a in arguments if a not in ("-h", "--help")]))
            sys.exit(DONE)
        if {"-m", "--multirun"} & set(arguments):
            words = [a for a in arguments if a not in ("-m", "--multirun", SEARCH)]
            if SEARCH in arguments:
                _become("search", *words)
            if any(word.startswith(EXPERIMENT) for word in words):
                _become("run", *_experiment(words))
            if any(word.startswith(LAUNCHER) for word in words):
                _become("launch", *words)
            return multirun(words)
        return [load(arguments)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        _tell_others(arguments, f"error: {error}")
        sys.exit(MISTAKE)


def _tell_others(arguments: list[str], line: str) -> None:
    """Ends the other processes too where each was started by hand; a launcher gives all the same command."""
    place = [argument for argument in arguments if argument.startswith("runtime.")]
    if any(argument.startswith("runtime.coordinator=") for argument in place):
        with contextlib.suppress(ValueError):  # its place is the mistake
            runtime = load(place).runtime
            from runtime.start import join_and_leave  # here: it imports JAX

            join_and_leave(runtime, line)


def _become(*words: str) -> None:
    """Replaces this process by a command of `scaling`, which is not imported here."""
    os.execv(sys.executable, [sys.executable, "-m", "scaling", *words])


def _experiment(words: list[str]) -> list[str]:
    """The arguments of `python -m scaling run` for experiment=NAME, on a launcher if one is named."""
    (*_, name) = [word.removeprefix(EXPERIMENT) for word in words if word.startswith(EXPERIMENT)]
    sweep = EXPERIMENTS / name / "sweep.yaml"
    if not sweep.is_file():
        there = ", ".join(sorted(path.parent.name for path in EXPERIMENTS.glob("*/sweep.yaml")))
        raise ValueError(f"experiment={name}: there is no {sweep}; experiments with a sweep: {there}")
    if others := [word for word in words if not word.startswith((EXPERIMENT, *LAUNCHER))]:
        raise ValueError(f"experiment={name} is a whole sweep: {others[0]} belongs into the overrides of {sweep}")
    chosen = [word.partition("=")[2] for word in words if word.startswith(LAUNCHER[0])]
    launcher = ["--launcher", chosen[-1]] if chosen else []
    return [str(sweep), *launcher, *(word for word in words if word.startswith(LAUNCHER[1]))]


def combinations(overrides: list[str]) -> list[list[str]]:
    """Every combination of the comma-separated choices, in Hydra's order."""
    choices = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [o.input_line]
        for o in parsed(overrides)
    ]
    return [list(combination) for combination in itertools.product(*choices)]


def multirun(overrides: list[str]) -> list[Config]:
    """The config of every combination. Raises ValueError where two of them would be one run."""
    jobs = [load(combination) for combination in combinations(overrides)]
    for a, b in itertools.combinations(jobs, 2):
        if a.run.dir == b.run.dir and identity(a) == identity(b):
            apart = differences(plain(a), plain(b))
            raise ValueError(
                f"two jobs of the sweep are one run in {a.run.dir}: {'; '.join(apart)} does not decide its results; "
                "sweep run.dir too"
            )
    return jobs


def next_commands(config: Config, launcher: list[str], *, done: bool) -> dict[str, str]:
    """The commands that a user may want after this one, by what they do; `launcher` are the words that start several
    processes. Each can be pasted into a shell."""
    arguments = sys.argv[1:]
    see = {"see": shlex.join(["python", "-m", "tracking", config.run.dir])}
    command = ["python", *launcher, "train.py", *arguments]
    own = ", in each process with its own runtime.process_id" if "runtime.process_id=" in " ".join(arguments) else ""
    if not done:
        return {f"go on{own}": shlex.join(command), **see}
    prompts = list(config.sample.prompts[:1])
    marked = ["--", *prompts] if any(prompt.startswith("-") or "=" in prompt for prompt in prompts) else prompts
    if config.model.generates:
        use = {"generate": shlex.join(["python", "-m", "inference", config.run.dir, *marked])} | see
    else:
        use = ({"judge": shlex.join(["python", "-m", "evaluation", config.run.dir])} if config.task else {}) | see
    if {"-m", "--multirun"} & set(arguments):  # one command made several runs: none has a command of its own
        return use
    kept = [argument for argument in command if not argument.startswith(("run.dir=", "train.steps="))]
    extend = shlex.join([*kept, override("run.dir", config.run.dir), f"train.steps={2 * config.train.steps}"])
    return {f"extend{own}": extend, **use}
