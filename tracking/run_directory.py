"""The directory of a run: whose it is, and which files it holds."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.files import naming, replace_text
from runtime.locks import Locked, acquire


@dataclass(frozen=True)
class RunDirectory:
    """The files of a run, by the names that others rely on."""

    path: Path

    @property
    def config(self) -> Path:
        """config.yaml: every setting of the run, resolved."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """metrics.jsonl: one JSON object a line, see tracking.metrics_file."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """samples.txt: text that the model wrote."""
        return self.path / "samples.txt"

    @property
    def log(self) -> Path:
        """What the console said, with times."""
        return self.path / "run.log"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer, where it is more than plain bytes."""
        return self.path / "tokenizer.json"

    @property
    def pretrained(self) -> Path:
        """The small files of the published model that the run began from: its config, tokenizer, chat template."""
        return self.path / "pretrained"

    @property
    def imported(self) -> Path:
        """Where the weights came from, in a directory that holds nothing but imported ones."""
        return self.path / "imported.json"

    @property
    def compressed(self) -> Path:
        """How the parameters were compressed, in a directory that holds nothing but a compressed model."""
        return self.path / "compressed"

    def files(self, checkpoints: Path) -> dict[str, Path]:
        """What there is for a person to look at, by what it holds."""
        written = {"metrics": self.metrics, "checkpoints": checkpoints, "config": self.config, "log": self.log}
        return {name: path for name, path in written.items() if path.exists()}

    def holds_results(self) -> bool:
        """Whether a run has got anywhere here; one that ended at its first mistake leaves a config.yaml only.

        Raises ValueError where imported or compressed weights lie here, which are no run.
        """
        if self.compressed.exists():
            raise ValueError(f"{self.path} holds a compressed model, which is no run: set another run.dir")
        if self.imported.exists():
            raise ValueError(f"{self.path} holds imported weights: begin a run from them with model.from={self.path}")
        return self.metrics.exists() or (self.path / "checkpoints").exists()

    def write_config(self, text: str) -> None:
        """Replaces config.yaml at once, so that no reader sees half of it."""
        self.path.mkdir(parents=True, exist_ok=True)
        replace_text(self.config, text)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Makes the directory and keeps other runs out of it; the lock ends with the process, however it ends.

        Raises ValueError when another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "w") as file:
            try:
                acquire(file)
            except Locked:
                raise ValueError(f"{self.path} is in use by another process; wait for it, or set run.dir") from None
            except OSError:
                pass  # a file system without locks
            yield

    def set_metrics_aside(self) -> bool:
        """Renames metrics that no checkpoint goes with, so that a new start does not erase them; whether there were."""
        if not self.metrics.exists() or self.metrics.stat().st_size == 0:
            return False
        number = next(n for n in itertools.count(1) if not (self.path / f"metrics.{n}.jsonl").exists())
        self.metrics.rename(self.path / f"metrics.{number}.jsonl")
        return True

    def write_samples(self, step: int, texts: list[tuple[str, str]]) -> None:
        """Appends the texts that the model wrote after `step` steps, each after its prompt."""
        with naming(self.samples), self.samples.open("a", encoding="utf-8") as file:
            for prompt, text in texts:
                file.write(f"--- step {step}, prompt {prompt!r}\n{prompt}{text}\n")
