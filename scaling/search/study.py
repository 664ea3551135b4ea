"""Search by ask and tell: what a study holds, which point is next, and what became of it.

A study lives in one folder: `journal.log` (Optuna's journal, appended to), `trials/` and `workers/`. Any number of
threads, processes and machines that share the folder may work on it at once, and any of them may be killed: what it
was at is asked again. The point of trial n follows from the seed, n and the results so far.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from runtime.locks import Locked, acquire
from scaling.search.space import parse_space

SAMPLERS = ("tpe", "random")
PRUNERS = ("none", "median", "halving")
DIRECTIONS = ("minimize", "maximize")
# How a trial ended. Only the last three do not count as one of `trials`: they have not trained to an end.
OUTCOMES = ("complete", "pruned", "diverged", "failed", "rejected", "interrupted", "lost")
SPENT = OUTCOMES[:4]
# Every fourth trial stays random: TPE leaves a choice whose first trials went badly (an optimizer at
# another's learning rates) alone for good. SMAC interleaves in the same way, BOHB a third (arXiv 1807.01774).
EXPLORE = 4
REJECTIONS = 30  # in a row, after which a space counts as one in which nothing fits

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class SearchConfig:
    """A search as its YAML file has it. Raises ValueError for values out of range."""

    space: dict  # key -> sweep in Hydra's grammar, or a list of choices (scaling/search/space.py)
    train: tuple[str, ...] = ()  # overrides of every trial
    start: tuple[dict, ...] = ()  # points, or parts of points, to try first
    objectives: tuple[tuple[str, str], ...] = (("eval/loss", "minimize"),)  # keys of metrics.jsonl
    trials: int = 20  # that train; rejected ones do not count
    startup: int = 0  # random trials before the sampler models; 0: a quarter of `trials`, at most 10
    sampler: str = "tpe"  # tpe | random
    pruner: str = "none"  # none | median | halving: stops trials by their eval/loss so far; for one objective
    memory_limit: float = 0.0  # bytes a device; a trial whose compiled step needs more is not run; 0 off
    seed: int = 0

    def __post_init__(self):
        for name, valid in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}: {getattr(self, name)} is unknown; valid: {', '.join(valid)}")
        for name, least in (("trials", 1), ("startup", 0), ("memory_limit", 0), ("seed", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}: {getattr(self, name)} must be {least} or more")
        if not self.objectives or len(self.objectives) > 3:
            raise ValueError(f"objectives: {len(self.objectives)} are given; use 1 to 3")
        for key, direction in self.objectives:
            if direction not in DIRECTIONS:
                raise ValueError(f"objectives: {key}: {direction} is unknown; valid: {', '.join(DIRECTIONS)}")
        if self.pruner != "none" and self.objectives != (("eval/loss", "minimize"),):
            raise ValueError(f"pruner: {self.pruner} follows eval/loss alone; use objectives: {{eval/loss: minimize}}")

    def digest(self) -> str:
        """Of what must stay as it is while a study grows."""
        kept = {name: value for name, value in asdict(self).items() if name in ("space", "train", "objectives")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: one of OUTCOMES, the objectives' values if complete, and why if not."""

    kind: str
    values: tuple[float, ...] = ()
    reason: str = ""
    seconds: float = 0.0


class FileLock:
    """An exclusive lock that ends with its process, for threads and processes. Optuna's journal takes it, too."""

    def __init__(self, path: Path):
        self.path = path
        self._file = None

    def acquire(self, block: bool = True) -> bool:
        """Waits for the lock; with block=False answers at once."""
        file = open(self.path, "ab")  # noqa: SIM115
        try:
            acquire(file, wait=block)
        except Locked:
            file.close()
            return False
        self._file = file
        return True

    def release(self) -> None:
        """Gives up the lock, which `acquire` must have taken before; it can be taken again."""
        self._file.close()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Waits for the lock and holds it meanwhile."""
        self.acquire()
        try:
            yield
        finally:
            self.release()


class Search:
    """A study in `folder`, opened by one worker process; `close` it. Raises ValueError if it is another's."""

    def __init__(self, config: SearchConfig, folder: Path):
        self.config, self.folder, self.space = config, folder, parse_space(config.space)
        self.start = [self.space.point(given) for given in config.start]
        (folder / "workers").mkdir(parents=True, exist_ok=True)
        self.worker = secrets.token_hex(4)
        self._alive = FileLock(folder / "workers" / self.worker)
        self._alive.acquire()
        journal, lock = folder / "journal.log", folder / "journal.lock"
        with FileLock(lock).held():
            _drop_torn_line(journal)
        with self._turn():
            self.study = optuna.create_study(
                study_name="search",
                storage=JournalStorage(JournalFileBackend(str(journal), FileLock(lock))),
                directions=[direction for _, direction in config.objectives],
                pruner=make_pruner(config.pruner),
                load_if_exists=True,
            )
            theirs = self.study.user_attrs.setdefault("config", config.digest())
            if theirs != config.digest():
                self.close()
                raise ValueError(f"{folder} holds a search of another space, train or objectives; choose another --dir")
            if not self.study.user_attrs.get("started"):
                self.study.set_user_attr("config", config.digest())
                for point in self.start:
                    self.study.enqueue_trial(point, skip_if_exists=True)
                self.study.set_user_attr("started", True)
            self._ask_lost_ones_again()

    def close(self) -> None:
        """Gives up this worker's claim on the trials that it has not finished."""
        self._alive.release()

    def trials(self) -> list[FrozenTrial]:
        """All trials of the study by number, those of other workers too, as the journal has them now."""
        return self.study.get_trials(deepcopy=False)

    def ask(self) -> optuna.Trial | None:
        """The next trial, or None when the budget is spent. Raises ValueError when nothing seems to fit."""
        with self._turn():
            trials = self.trials()
            outcomes = [outcome(trial) for trial in trials]
            running = sum(trial.state == TrialState.RUNNING for trial in trials)
            if sum(kind in SPENT for kind in outcomes) + running >= self.config.trials:
                return None
            finished = [trial for trial in trials if outcome(trial) in (*SPENT, "rejected")]
            last = finished[-REJECTIONS:]
            if len(last) == REJECTIONS and all(outcome(trial) == "rejected" for trial in last):
                raise ValueError(f"{REJECTIONS} trials in a row were rejected; the last: {reason(last[-1])}")
            rejected = outcomes.count("rejected")
            self.study.sampler = make_sampler(self.config, len(trials), rejected)
            trial = self.study.ask(self.space.distributions)
            trial.set_user_attr("worker", self.worker)
            return trial

    def tell(self, trial: optuna.Trial, ended: Outcome) -> None:
        """Writes down how a trial ended. An interrupted one stays open: it is asked again by the next worker."""
        assert ended.kind in OUTCOMES
        if ended.kind == "interrupted":
            return
        for name in ("kind", "reason", "seconds"):
            trial.set_user_attr(name, getattr(ended, name))
        if ended.kind == "complete":
            self.study.tell(trial, list(ended.values))
        else:  # Optuna ranks pruned trials behind complete ones, and forgets failed ones
            failed = ended.kind == "failed"
            self.study.tell(trial, state=TrialState.FAIL if failed else TrialState.PRUNED)

    def told(self, overrides: Sequence[str]) -> Outcome | None:
        """What became of an earlier trial with the same overrides: it need not run twice."""
        for trial in self.trials():
            if outcome(trial) in ("complete", "rejected", "diverged") and self.overrides(trial) == list(overrides):
                values = tuple(trial.values or ()) if outcome(trial) == "complete" else ()
                return Outcome(outcome(trial), values, f"as trial {trial.number}; {reason(trial)}".rstrip("; "))
        return None

    def overrides(self, trial: FrozenTrial | optuna.Trial) -> list[str]:
        """What train.py is told for a trial."""
        return [*self.config.train, *self.space.overrides(trial.params)]

    def directory(self, overrides: Sequence[str]) -> Path:
        """The run directory of a point: the same point goes on where it was."""
        return self.folder / "trials" / hashlib.sha256(json.dumps(list(overrides)).encode()).hexdigest()[:10]

    def _turn(self):
        return FileLock(self.folder / "turn.lock").held()

    def _ask_lost_ones_again(self) -> None:
        """Trials without a living worker come back: it has died, or never wrote its name."""
        for trial in self.trials():
            worker = trial.user_attrs.get("worker", "")
            if trial.state == TrialState.RUNNING and not self._lives(worker):
                self.study.tell(trial.number, state=TrialState.FAIL)
        trials = self.trials()
        for trial in [trial for trial in trials if outcome(trial) == "lost"]:
            later = trials[trial.number + 1 :]
            if not any(trial.params in (t.params, t.system_attrs.get("fixed_params")) for t in later):
                self.study.enqueue_trial(trial.params)

    def _lives(self, worker: str) -> bool:
        path = self.folder / "workers" / worker
        if not worker or not path.exists():
            return False
        lock = FileLock(path)
        if lock.acquire(block=False):
            lock.release()
            return False
        return True


def outcome(trial: FrozenTrial) -> str:
    """One of OUTCOMES; "" for a trial that is not at its end. A failed one of which nobody said so was lost."""
    return trial.user_attrs.get("kind", "lost") if trial.state.is_finished() else ""


def reason(trial: FrozenTrial) -> str:
    """Why a trial is not complete; empty for one that is, or that was lost."""
    return trial.user_attrs.get("reason", "")


def make_sampler(config: SearchConfig, number: int, rejected: int = 0) -> optuna.samplers.BaseSampler:
    """The sampler of one trial. Made anew for each, so that a search that goes on does as one that never stopped."""
    seed = int(hashlib.sha256(f"{config.seed} {number}".encode()).hexdigest()[:8], 16)
    startup = config.startup or min(10, -(-config.trials // 4))
    if config.sampler == "random" or (number > startup + rejected and number % EXPLORE == 0):
        return optuna.samplers.RandomSampler(seed=seed)
    # each key by itself: jointly, what was good of one optimizer's learning rates kept the others' from being tried
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup + rejected, constant_liar=True)


def make_pruner(name: str) -> optuna.pruners.BasePruner:
    """The rule that stops a trial early."""
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4)
    if name == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    return optuna.pruners.NopPruner()


def _drop_torn_line(journal: Path) -> None:
    """Cuts off what a crash left of the last line: Optuna would append to it and never read the file again."""
    if journal.exists():
        data = journal.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(journal, data.rfind(b"\n") + 1)
