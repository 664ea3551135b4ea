"""A search from its YAML file to its end: reading it, and workers that ask, run and tell."""

import dataclasses
import threading
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from scaling.search.study import Outcome, Search, SearchConfig

PREFIXES = ("search.", "hydra.sweeper.")  # of words on the command line that set a field of SearchConfig
JOIN_S = 0.2

Evaluate = Callable[[optuna.Trial, Sequence[str], Path], Outcome]


def read_search(file: Path | None, words: Sequence[str] = ()) -> SearchConfig:
    """The config of a YAML file, changed by words of the command line: search.FIELD=value, a sweep in Hydra's grammar,
    or a plain override for every trial. Raises ValueError for what is wrong with it."""
    values = {} if file is None else _load(file)
    values["space"], values["train"] = dict(values.get("space") or {}), [*(values.get("train") or [])]
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{word} is no override; write key=value")
        if name := next((key.removeprefix(p) for p in PREFIXES if key.startswith(p)), None):
            values[name] = yaml.safe_load(text)
        elif _is_sweep(word):
            values["space"][key] = text
        else:
            values["train"].append(word)
            values["space"].pop(key, None)
    return _build(values)


def _load(file: Path) -> dict:
    try:
        values = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {file}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} should hold keys: {', '.join(_fields())}")
    return values


def _build(values: dict) -> SearchConfig:
    hints, made = typing.get_type_hints(SearchConfig), {}
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"unknown {name}; valid: {', '.join(_fields())}")
        hint = hints[name]
        try:
            made[name] = hint(value) if hint in (int, float, str) and not isinstance(value, bool) else value
        except (TypeError, ValueError):
            raise ValueError(f"{name}: {value} should be a number") from None
        if hint is int and made[name] != float(value):
            raise ValueError(f"{name}: {value} should be a whole number")
    for name, kind in (("objectives", dict), ("train", list), ("start", list)):
        if name in made and not isinstance(made[name], kind):
            raise ValueError(f"{name} should be a {'mapping' if kind is dict else 'list'}, not {made[name]!r}")
    if not all(isinstance(point, dict) for point in made.get("start", ())):
        raise ValueError("start should be a list of points, each key: value")
    if "objectives" in made:
        made["objectives"] = tuple((str(key), str(way)) for key, way in made["objectives"].items())
    made["train"], made["start"] = tuple(map(str, made["train"])), tuple(made.get("start", ()))
    return SearchConfig(**made)


def _fields() -> list[str]:
    return [f.name for f in dataclasses.fields(SearchConfig)]


def _is_sweep(word: str) -> bool:
    try:
        return OverridesParser.create().parse_override(word).is_sweep_override()
    except HydraException as error:
        raise ValueError(f"cannot read {word}: {' '.join(str(error).split())}") from None


def run(
    search: Search,
    evaluate: Evaluate,
    workers: int = 1,
    ended: Callable[[optuna.Trial, Outcome], None] = lambda trial, outcome: None,
    stop: threading.Event | None = None,
) -> bool:
    """Asks, evaluates and tells until the budget is spent (True) or `stop` is set (False).

    `ended` hears of each trial, one at a time. What a worker raises stops them all and is raised here.
    """
    stop, turn, faults = stop or threading.Event(), threading.Lock(), []

    def work() -> None:
        try:
            while not stop.is_set() and (trial := search.ask()) is not None:
                overrides = search.overrides(trial)
                found = search.told(overrides) or evaluate(trial, overrides, search.directory(overrides))
                with turn:
                    search.tell(trial, found)
                    ended(trial, found)
        except BaseException as error:
            faults.append(error)
            stop.set()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        try:
            for thread in threads:
                thread.join(JOIN_S)
        except KeyboardInterrupt:  # the trials, which got it too, save and end
            stop.set()
    if faults:
        raise faults[0]
    return not stop.is_set()
