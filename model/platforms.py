"""What is chosen for a kind of device because it is faster or smaller there: one row a platform, nothing elsewhere.

The mathematics of a choice is the same everywhere; where and when 16-bit values are rounded may differ. Measured on one
H200, gpt2_124m at 32 x 1,024 tokens: experiments/LOG.md, 2026-11-28.
"""

from dataclasses import dataclass

from runtime.platform import platform


@dataclass(frozen=True)
class Choices:
    """What is computed in another way for a platform's compiler; results are the same but for rounding."""

    # Activations are computed again in the backward pass from what went in. Unless that is kept apart from the forward
    # pass, the compiler finds that it has the values already and keeps them, in float32: 4.7 GB of them.
    recompute_apart: bool = False
    # Norms keep each vector's moments for the backward pass. Without them the compiler writes normalised vectors in
    # float32 for the gradient of the scale, and reads them again: 100 MB of a layer.
    keep_moments: bool = False
    # A scan over layers takes matrices that are cast already: else each layer's is cast in every pass over the layers,
    # and its gradient widened to be stacked.
    cast_before_scan: bool = False
    # Logits are written in the compute dtype and reduced in float32. They are read three times: 3.3 GB less to keep.
    narrow_logits: bool = False
    # A bias is added in the compute dtype, where the matmul's own kernel can do it; its gradient is summed in float32.
    narrow_bias: bool = False
    # What decodes keeps the weights of each output of a matrix together: as few tokens as it has at a time are
    # multiplied with them faster (model.matmul.project_by_output).
    by_output: bool = False
    # Sines and cosines of rotary positions are computed apart from what turns by them. Else the compiler computes them
    # again where it turns, in each layer and direction, for each head.
    angles_apart: bool = False


CHOICES = {
    # its compiler widens 16-bit values anyway, and float32 runs are kept bitwise as they were
    "cpu": Choices(by_output=True, angles_apart=True),
    "gpu": Choices(
        recompute_apart=True, keep_moments=True, cast_before_scan=True, narrow_logits=True, narrow_bias=True
    ),
    "tpu": Choices(),  # not measured
}


def choices() -> Choices:
    """The row of the platform that the mesh in context is of."""
    return CHOICES.get(platform(), Choices())
