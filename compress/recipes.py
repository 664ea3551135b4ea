"""What a model is made into, and by which method. No JAX here: a mistake is told before anything slow is imported."""

from dataclasses import dataclass

GROUP = 64  # inputs that share a step in int4, where nothing else is asked for


@dataclass(frozen=True)
class Recipe:
    """How the matrices of the layers are quantised."""

    bits: int
    method: str  # round | gptq | awq: see compress/rounding.py
    words: str
    normal: bool = False  # codes of quantiles of the normal distribution

    @property
    def calibrated(self) -> bool:
        """Whether it needs text."""
        return self.method != "round"


RECIPES = {
    "int8": Recipe(8, "round", "a step for each output of a matrix, the nearest codes"),
    "int4": Recipe(4, "round", "a step and a zero for each group of inputs, the nearest codes"),
    "nf4": Recipe(4, "round", "codes of a normal distribution's quantiles, a step for each group (QLoRA)", normal=True),
    "int4-gptq": Recipe(4, "gptq", "the same grid, codes by GPTQ from calibration text"),
    "int4-awq": Recipe(4, "awq", "inputs scaled and groups clipped by AWQ from calibration text"),
}
TABLES = ("int8", "keep")  # what becomes of the tables of tokens
