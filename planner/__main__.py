"""Which mesh, schedule and remat for a model on a machine, before it is paid for: python -m planner [key=value ...]

    python -m planner model=llama3_8b train.batch_size=512 train.seq_len=8192 --hardware h200 --devices 64

Every legal layout is weighed by arithmetic; no device is needed and no JAX is imported. Keys of train.py that are given
are kept, all others of the layout are searched. Exit codes: 0 done; 2 the user's mistake, or nothing fits, in one line.
"""

import math
import os
import sys
from argparse import Namespace
from pathlib import Path

from config.compose import load
from planner import compile, explain, report
from planner.cost import Planner
from planner.inference import serving_plans
from planner.inference import table as serving_table
from planner.machine import known, open_machine
from planner.search import Found, Pins, pins_of, search
from planner.software import PROGRAMS, program
from runtime import leave
from runtime.arguments import Parser
from runtime.exit_codes import DONE, MISTAKE

MOST_DEVICES = 262_144  # above the largest machine that was built
PICTURES = (".png", ".svg", ".pdf")


def arguments(words: list[str]) -> tuple[Namespace, list[str]]:
    """The program's own options, and the settings."""
    parser = Parser(
        "python -m planner",
        description="Ranks the layouts of a run on a machine that need not be there.",
        usage="%(prog)s [--hardware NAME|FILE.yaml] [--devices N] [--top N] [--json FILE] [--picture FILE] "
        "[--compile K [--texts FOLDER]] [key=value ...]\n"
        "       %(prog)s inference [--hardware NAME] ... [key=value ...]\n       %(prog)s calibrate RUN [RUN ...]",
    )
    parser.add_argument("--hardware", default="h200", help=f"{', '.join(known())}, or a .yaml file like those")
    parser.add_argument("--devices", type=int, default=8, help="as JAX counts them")
    parser.add_argument("--top", type=int, default=10, help="how many meshes are told of")
    parser.add_argument("--tokens", type=float, help="of the whole run, for its cost; default: train.steps")
    parser.add_argument("--program", default="isomesh", help=f"whose behaviour is priced: {', '.join(PROGRAMS)}")
    parser.add_argument("--compile", type=int, default=0, metavar="K", help="give the K best to the real compiler")
    parser.add_argument("--texts", type=Path, metavar="FOLDER", help="keep the compiled programs: 1.txt, 2.txt, ...")
    parser.add_argument("--json", type=Path, help="all layouts, for programs")
    parser.add_argument("--picture", type=Path, help="parts of a step and of memory, .png or .svg")
    return parser.parse_known_args(words)


def plan(words: list[str]) -> None:
    """Prints a plan. Raises ValueError where there is none, OSError where a file cannot be written."""
    options, settings = arguments(words)
    at_least_one(options, "devices", "top")
    if options.compile < 0:
        raise ValueError(f"--compile {options.compile} must be 0 or more: how many layouts the compiler is given")
    if options.tokens is not None and not 0 < options.tokens < math.inf:
        raise ValueError(f"--tokens {options.tokens:g} must be a number above 0, as in --tokens 15e12")
    for name, kinds in (("json", ()), ("picture", PICTURES)):
        writable(name, getattr(options, name), kinds)
    machine = open_machine(options.hardware)
    config = load(settings)
    if options.compile:
        compile.interpreter(machine.platform)
    if options.texts and options.texts.exists():
        raise ValueError(f"--texts {options.texts} is there already: name a folder that is not")
    planner = Planner(config, machine, options.devices, program(options.program, machine.platform))
    pins = pins_of(config, settings)
    found = best(planner, pins)
    train = config.train
    tokens = options.tokens or float(train.steps * train.batch_size * train.seq_len)
    print(report.text(planner, found, settings, options.top, tokens))
    for number, weighed in enumerate(found.meshes()[: options.compile], 1):
        text = options.texts and options.texts / f"{number}.txt"
        try:
            answer = compile.told(compile.compiled(planner, planner.predict(weighed.layout), settings, text))
        except compile.Refused as refusal:  # that is an answer too
            answer = str(refusal)
        print(f"\n{answer}", flush=True)
    if options.json:
        report.write_json(options.json, report.as_json(planner, found, settings, options.top))
    if options.picture:
        report.picture(planner, found.meshes()[: options.top], options.picture)


def at_least_one(options: Namespace, *names: str) -> None:
    """Raises ValueError for an option below 1, and for more devices than there are."""
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)} must be 1 or more")
    if options.devices > MOST_DEVICES:
        raise ValueError(f"--devices {options.devices:,} is more than a search weighs: use {MOST_DEVICES:,} or fewer")


def writable(name: str, file: Path | None, kinds: tuple[str, ...]) -> None:
    """Raises ValueError, before the work is done, for a file of option `name` that will not be written."""
    if file is None:
        return
    if file.is_dir():
        named = file / f"plan{kinds[0] if kinds else '.json'}"
        raise ValueError(f"--{name} {file} is a folder; name a file in it, as in --{name} {named}")
    if kinds and file.suffix.lower() not in kinds:
        raise ValueError(f"--{name} {file} must end with {' or '.join(kinds)}")
    above = next(folder for folder in file.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"--{name} {file}: {above} is no folder that can be written to")


def best(planner: Planner, pins: Pins) -> Found:
    """What a search finds. Raises ValueError where no layout is legal, or none fits."""
    found = search(planner, pins)
    if not found.considered:
        raise ValueError(explain.nothing_legal(planner, pins))
    if not found.fitting:
        raise ValueError(explain.nothing_fits(planner, found, pins))
    return found


def serve(words: list[str]) -> None:
    """Prints plans of serving. Raises ValueError where nothing fits."""
    options, settings = inference_arguments(words)
    machine, config = open_machine(options.hardware), load(settings)
    at_least_one(options, "devices", "top", "prompt", "answer")
    for name, value in (("weight-bits", options.weight_bits), ("cache-bits", options.cache_bits)):
        if not 1 <= value <= 32:
            raise ValueError(f"--{name} {value:g} is no width of a number: use 1 to 32, as 16, 8 or 4")
    if not options.next_ms > 0:
        raise ValueError(f"--next-ms {options.next_ms:g} must be above 0")
    plans = serving_plans(
        config,
        machine,
        options.devices,
        program("isomesh", machine.platform),
        prompt=options.prompt,
        answer=options.answer,
        weight_bytes=options.weight_bits / 8,
        cache_element=options.cache_bits / 8,
    )
    fitting = [plan for plan in plans if plan.fits and 1e3 * plan.next_s <= options.next_ms]
    if not fitting:
        least = min(plans, key=lambda plan: plan.memory)
        said = f"needs {least.memory / 1e9:.1f} GB a device of {least.limit / 1e9:.1f}"
        ways = "use more devices or fewer bits (--weight-bits 8)"
        if options.next_ms < math.inf:
            said += f" and {1e3 * least.next_s:.1f} ms a token of --next-ms {options.next_ms:g}"
            ways = "use more devices, fewer bits (--weight-bits 8) or a longer --next-ms"
        raise ValueError(f"nothing serves this: the smallest plan, tensor={least.tensor}, {said}; {ways}")
    print(f"{options.devices} x {machine.name}: prompts of {options.prompt:,} tokens, answers of {options.answer:,}")
    print(serving_table(fitting[: options.top]))
    print(f"\nmesh      mesh.tensor={fitting[0].tensor} on each of {fitting[0].replicas} replicas")


def inference_arguments(words: list[str]) -> tuple[Namespace, list[str]]:
    """The options of `inference`, and the settings."""
    parser = Parser(
        "python -m planner inference",
        description="Shards, sequences at once, and times to the first and each next token.",
        usage="%(prog)s [--hardware NAME|FILE.yaml] [--devices N] [--prompt N] [--answer N] [--next-ms MS] "
        "[key=value ...]",
    )
    parser.add_argument("--hardware", default="h200", help=f"{', '.join(known())}, or a .yaml file like those")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--top", type=int, default=10, help="how many plans are told of")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--next-ms", type=float, default=float("inf"), help="the longest that a next token may take")
    parser.add_argument("--weight-bits", type=float, default=16, help="of a kept parameter")
    parser.add_argument("--cache-bits", type=float, default=16, help="of a key's or value's entry")
    return parser.parse_known_args(words)


def fit(words: list[str]) -> None:
    """Fits a machine's factors to runs. Raises ValueError for what is no run, or tells too little."""
    options, _ = calibrate_arguments(words)
    from planner.calibration import calibrate  # here: scipy takes half a second

    print(calibrate(options.runs, options.devices))


def calibrate_arguments(words: list[str]) -> tuple[Namespace, list[str]]:
    """The options of `calibrate`; there are no settings."""
    parser = Parser("python -m planner calibrate", usage="%(prog)s [--devices N] RUN [RUN ...]")
    parser.add_argument("--devices", type=int, help="of the runs, where they do not say")
    parser.add_argument("runs", type=Path, nargs="+", help="directories of runs of train.py")
    return parser.parse_args(words), []


COMMANDS = {"inference": serve, "calibrate": fit}


def main(words: list[str]) -> int:
    """Runs one command; returns the exit code."""
    try:
        if words and words[0] in COMMANDS:
            COMMANDS[words[0]](words[1:])
        else:
            plan(words)
    except BrokenPipeError:  # whoever reads has read enough
        sys.stdout = None
    except (ValueError, OSError) as error:
        print(leave.one_line(error), file=sys.stderr)
        return MISTAKE
    return DONE


if __name__ == "__main__":
    leave.answer_signals()
    sys.exit(main(sys.argv[1:]))
