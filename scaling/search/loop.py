"""A search from its YAML file to its end: reading it, and workers that ask, run and tell."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from config.build import build, keys, one_line
from scaling.search.study import Outcome, Search, SearchConfig

PREFIXES = ("search.", "hydra.sweeper.")  # of words on the command line that set a field of SearchConfig
JOIN_S = 0.2

Evaluate = Callable[[optuna.Trial, Sequence[str], Path], Outcome]


def read_search(file: Path | None, words: Sequence[str] = ()) -> SearchConfig:
    """The config of a YAML file, changed by words of the command line: search.FIELD=value, a sweep in Hydra's grammar,
    or a plain override for every trial. Raises ValueError for what is wrong with it."""
    values = {} if file is None else _load(_text(file), str(file))
    values["space"], values["train"] = dict(values.get("space") or {}), [*(values.get("train") or [])]
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{word} is no override; write key=value")
        if name := next((key.removeprefix(p) for p in PREFIXES if key.startswith(p)), None):
            values |= _load(f"{name}: {text}", word)
        elif _is_sweep(word):
            values["space"][key] = text
        else:
            values["train"].append(word)
            values["space"].pop(key, None)
    return _built(values)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {file}: {one_line(error)}") from None


def _load(text: str, where: str) -> dict:
    try:
        values = OmegaConf.to_container(OmegaConf.create(text))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"cannot read {where}: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where} should hold keys: {', '.join(keys(SearchConfig))}")
    return values


def _built(values: dict) -> SearchConfig:
    """Objectives are a mapping in YAML: of each key, whether it is to be as small or as large as can be."""
    objectives = values.get("objectives", {})
    if not isinstance(objectives, dict):
        raise ValueError(f"objectives should be a mapping, not {objectives!r}")
    pairs = {"objectives": [*objectives.items()]} if objectives else {}
    return build(SearchConfig, values | pairs)


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
