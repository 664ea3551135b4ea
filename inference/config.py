"""How text is sampled. No JAX here, so that a mistake is told before anything slow is imported."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SampleConfig:
    """Generation from a trained model."""

    prompts: tuple[str, ...] = ("def ", "import ", "class ")  # of the samples at the end of a run
    tokens: int = 128  # generated for each prompt; 0: no samples
    temperature: float = 0.8  # 0: greedy
    top_k: int = 0  # only the k most likely tokens; 0 off
    top_p: float = 1.0  # only the most likely tokens that make up this probability; 1 off
    seed: int = 0  # of the sampling: the same seed gives the same text

    def __post_init__(self):
        for name in ("tokens", "temperature", "top_k"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"sample.{name}={getattr(self, name)} must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sample.top_p={self.top_p} must be above 0 and at most 1")
