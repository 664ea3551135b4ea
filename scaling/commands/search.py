"""python -m scaling search: the best settings of a run by trials."""

import argparse
import dataclasses
import importlib.util
import signal
from pathlib import Path

from rich.console import Console

from config.build import keys
from config.compose import CONF, load
from config.schema import Config
from runtime.exit_codes import DONE, PREEMPTED
from training import recipes

CHECKOUT = Path(__file__).parents[2]


def add_search(options: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m scaling search` to its parser, and `command`, which runs with them."""
    options.set_defaults(command=run_search)
    options.add_argument(
        "words",
        nargs="+",
        metavar="FILE|key=value",
        help="search.yaml; a sweep in Hydra's grammar is searched, any other override holds for every trial, and "
        "search.FIELD=value changes the file's",
    )
    options.add_argument("--workers", type=int, default=1, help="trials at once (default: 1)")
    options.add_argument("--dir", type=Path, help="folder of the study (default: runs/search-NAME)")


def run_search(options: argparse.Namespace) -> int:
    """Goes on with a search until its trials are done. Raises ValueError for the user's mistakes."""
    if importlib.util.find_spec("optuna") is None:
        raise ValueError("a search needs optuna; install it with `make setup EXTRAS=search`")
    from scaling.search import loop as search_loop
    from scaling.search import report as search_report
    from scaling.search import space, trial
    from scaling.search import study as search

    from_hydra(options)
    files = [word for word in options.words if "=" not in word]
    if len(files) > 1 or options.workers < 1:
        raise ValueError(f"one file and one worker or more, not {len(files)} files and --workers {options.workers}")
    file = Path(files[0]) if files else None
    settings = numbered(search_loop.read_search(file, [word for word in options.words if "=" in word]))
    known = {*keys(Config), *(path.name for path in CONF.iterdir() if path.is_dir())}
    if unknown := space.parse_space(settings.space).keys() - known:
        raise ValueError(f"space: unknown {', '.join(sorted(unknown))}; python train.py --help lists the keys")
    name = f"search-{file.resolve().parent.name}" if file else "search"
    study = search.Search(settings, options.dir or Path("runs") / name)
    console, out = Console(), file.parent if file else study.folder
    runner = trial.Runner(settings, CHECKOUT, load)
    signal.signal(signal.SIGTERM, lambda *_: runner.stop.set())

    def ended(asked, found) -> None:
        values = zip(settings.objectives, found.values, strict=False)
        told = ", ".join(f"{key} {value:.6g}" for (key, _), value in values) or found.reason
        point = " ".join(study.space.overrides(asked.params))
        console.print(f"trial {asked.number} {found.kind} {told} | {point}", markup=False, soft_wrap=True)
        search_report.write_rows(study, out / "results.jsonl")

    try:
        done = search_loop.run(study, runner, options.workers, ended, runner.stop)
    finally:
        study.close()
    search_report.show(study, console)
    if importlib.util.find_spec("matplotlib") and search_report.front(study):
        search_report.draw(study, out / "search.png")
    return DONE if done else PREEMPTED


def numbered(settings):
    """The search with numbers where its starting points name published laws, as the config would resolve them."""
    points = []
    for point in settings.start:
        named = [key for key, value in point.items() if value in recipes.LAWS.get(tuple(key.split(".", 1)), ())]
        if named:
            own = [f"{key}={value}" for key, value in point.items() if not isinstance(value, dict)]
            values = dataclasses.asdict(load([*settings.train, *own]))
            point = point | {key: values[key.partition(".")[0]][key.partition(".")[2]] for key in named}
        points.append(point)
    return dataclasses.replace(settings, start=tuple(points))


def from_hydra(options: argparse.Namespace) -> None:
    """Through Hydra's door, hydra.sweeper.{workers,dir,file}=VALUE are what --workers, --dir and FILE are here."""
    given, options.words = options.words, []
    for word in given:
        key, _, value = word.partition("=")
        if key == "hydra.sweeper.file":
            options.words.append(value)
        elif key == "hydra.sweeper.workers":
            options.workers = int(value) if value.isdecimal() else 0
        elif key == "hydra.sweeper.dir":
            options.dir = Path(value)
        else:
            options.words.append(word)
