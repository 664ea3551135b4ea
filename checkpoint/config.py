"""What a run may set of its checkpoints and first weights. No JAX here: a mistake is told before slow imports."""

import argparse
from dataclasses import dataclass

NEWEST, BEST = "last", "best"  # choices of --step besides a number


def step(text: str) -> str | int:
    """The value of --step, which names a checkpoint: a number, or one of the two words.

    Raises argparse.ArgumentTypeError for anything else.
    """
    if text in (NEWEST, BEST):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is neither best nor last nor the number of a step")
    return int(text)


@dataclass(frozen=True)
class WeightsConfig:
    """The weights that a run begins from, where it does not draw its own; written by model.from=PATH."""

    path: str | None = None  # a run's directory, a Hugging Face folder or a .gguf file
    digest: str | None = None  # tells these weights from others


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, what to keep, when to go on from it. Raises ValueError for values out of range."""

    dir: str | None = None  # where checkpoints go; null: <run.dir>/checkpoints
    every: int = 0  # steps between saves; 0: off
    every_minutes: float = 0.0  # minutes between saves; 0: off
    keep: int = 2  # how many of the newest are kept
    keep_best: int = 1  # how many of the best by eval/loss are kept besides
    resume: str = "auto"  # auto: go on if there is a checkpoint | never: start anew | require: fail if there is none
    verify: bool = True  # compare the digest of every file before restoring; false: names and sizes only
    asynchronous: bool = True  # write while training goes on; false: wait for the disk

    def __post_init__(self):
        for name, least in (("every", 0), ("every_minutes", 0), ("keep", 1), ("keep_best", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"checkpoint.{name}={getattr(self, name)} must be at least {least}")
        if self.resume not in ("auto", "never", "require"):
            raise ValueError(f"checkpoint.resume={self.resume} is unknown; choose auto, never or require")
