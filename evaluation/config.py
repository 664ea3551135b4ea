"""What a run may set of the evaluation inside its training. No JAX here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationConfig:
    """Tasks that the model answers while it trains. Raises ValueError for values out of range."""

    tasks: tuple[str, ...] = ()  # as of python -m evaluation: offline, its tasks, files of your own
    every: int = 0  # steps between two times that they are answered; 0: never

    def __post_init__(self):
        if self.every < 0:
            raise ValueError(f"evaluation.every={self.every} must be 0 (never) or more")
        if self.every and not self.tasks:
            raise ValueError(f"evaluation.every={self.every} needs evaluation.tasks, as in evaluation.tasks=[offline]")
        if strange := next((task for task in self.tasks if ":" in task or task == "humaneval"), None):
            raise ValueError(f"evaluation.tasks: {strange} is for python -m evaluation only")
