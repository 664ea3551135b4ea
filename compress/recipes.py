"""What a model is made into, and by which method. No JAX here: a mistake is told before anything slow is imported."""

from dataclasses import dataclass

GROUP = 64  # inputs that share a step in int4, where nothing else is asked for


@dataclass(frozen=True)
class Recipe:
    """What becomes of the matrices of the layers."""

    form: str  # int8 | w8a8 | fp8 | int4 | nf4: see compress/forms.py; sparse: compress/pruning.py; narrow
    method: str  # round | gptq | awq: see compress/rounding.py; magnitude | wanda; narrow: compress/narrowing.py
    words: str
    two_of_four: bool = False  # of each four neighbouring inputs two weights are zero

    @property
    def calibrated(self) -> bool:
        """Whether it needs text."""
        return self.method not in ("round", "magnitude")

    @property
    def is_dense(self) -> bool:
        """Whether it leaves a model of floats, which can be trained."""
        return self.form in ("sparse", "narrow")


RECIPES = {
    "int8": Recipe("int8", "round", "a step for each output of a matrix, the nearest codes"),
    "w8a8": Recipe("w8a8", "round", "the same, and what is multiplied with it in int8 with a step for each token"),
    "fp8": Recipe("fp8", "round", "floats of 8 bits (e4m3), a step for each output of a matrix"),
    "int4": Recipe("int4", "round", "a step and a zero for each group of inputs, the nearest codes"),
    "nf4": Recipe("nf4", "round", "codes of a normal distribution's quantiles, a step for each group (QLoRA)"),
    "int4-gptq": Recipe("int4", "gptq", "the same grid, codes by GPTQ from calibration text"),
    "int4-awq": Recipe("int4", "awq", "inputs scaled and groups clipped by AWQ from calibration text"),
    "magnitude": Recipe("sparse", "magnitude", "zeros for a --share of each matrix, its smallest weights"),
    "wanda": Recipe("sparse", "wanda", "zeros for a --share of each output's weights, by Wanda from calibration text"),
    "magnitude-2of4": Recipe("sparse", "magnitude", "zeros for two of each four inputs, the smaller weights", True),
    "wanda-2of4": Recipe("sparse", "wanda", "zeros for two of each four inputs, by Wanda from calibration text", True),
    "narrow": Recipe("narrow", "narrow", "a smaller dense model, of --layers, --kv-heads and --ffn, to be trained on"),
}
TABLES = ("int8", "keep")  # what becomes of the tables of tokens
