"""How initial scales, multipliers and the sizes of updates follow the sizes of the model: this file is the whole rule.

With w = width / base_width and l = layers / base_depth, where `standard` has 1 everywhere:

    parameter                  mup, complete_p: change by a step    gradient's size: mup    complete_p, in a layer
    matrices in layers         1 / w                                1 / w                   1 / (w l)
    routers of experts         1 / w                                1                       1 / l
    tables, norms, biases      1                                    1 / w                   1 / (w l)
    norm scales of heads       1                                    1                       1 / l

    embedding x 1; attention scores x 1 / head_dim; logits x 1 / w; a block's two outputs x 1, with complete_p x 1 / l

Maximal update parametrization: Yang et al., arXiv 2203.03466 (tables 3 and 8, in the form for tied tables). CompleteP:
Dey et al., arXiv 2505.01618 (table 1, alpha = 1). Heads and ffn are meant to grow as the width does. A router, from
width to a fixed number of experts, is an output: its initial scale also falls by sqrt(w).

The last two columns say by how much an optimizer's view of a gradient is to be magnified, before any epsilon is added:
Adam's, divided by w, is then the same share of every gradient.
"""

from dataclasses import dataclass

from model.config import ModelConfig

TABLE_STD = 0.02


def width_ratio(config: ModelConfig) -> float:
    """By how much the model is wider than the one whose learning rate it takes; 1 in the standard parametrization."""
    return 1.0 if config.parametrization == "standard" else config.width / config.base_width


def depth_ratio(config: ModelConfig) -> float:
    """By how much the model is deeper than the one whose learning rate it takes; 1 but for CompleteP."""
    return config.layers / config.base_depth if config.parametrization == "complete_p" else 1.0


# ----------------------------------------------------------------------------------------------------- initial scales


def matrix_std(config: ModelConfig, fan_in: int, *, residual: bool = False) -> float:
    """1 / sqrt(fan_in); the two matrices of a block that write to the residual stream are smaller by sqrt(2 L).

    With CompleteP, L is the base depth: `residual_multiplier` does the rest.
    """
    scale = (2 * config.layers / depth_ratio(config)) ** -0.5 if residual else 1.0
    return scale * fan_in**-0.5


def router_std(config: ModelConfig) -> float:
    """1 / sqrt(width) at the base width, and a variance that falls with the square of the width from there."""
    return (config.width * width_ratio(config)) ** -0.5


# -------------------------------------------------------------------------------------------------------- multipliers


def embedding_multiplier(config: ModelConfig) -> float:
    """What embeddings are multiplied by: sqrt(width), of the base model, if the config asks for it."""
    return (config.width / width_ratio(config)) ** 0.5 if config.embedding_scale else 1.0


def attention_scale(config: ModelConfig) -> float:
    """What scores are multiplied by, unless the config says: queries and keys become aligned, so that they add up."""
    if config.attention_scale is not None:
        return config.attention_scale
    return config.head_dim ** (-0.5 if config.parametrization == "standard" else -1.0)


def logit_multiplier(config: ModelConfig) -> float:
    """What the output table's products are multiplied by."""
    return 1 / width_ratio(config)


def residual_multiplier(config: ModelConfig) -> float:
    """What the two outputs of a block are multiplied by before they are added to the residual stream."""
    return 1 / depth_ratio(config)


# ------------------------------------------------------------------------------------------------------------ updates


@dataclass(frozen=True)
class Factors:
    """How a parameter's updates and gradients compare with the base model's."""

    change: float  # of an update that does not depend on the gradient's size, as Adam's
    gradient: float  # of the gradient's entries
    matrix: bool  # an optimizer for matrices changes singular values, of which a wider matrix has more


def factors_of(config: ModelConfig, specs: dict, within: float | None = None) -> dict:
    """The Factors of every parameter of a tree of specifications (model.specs), a nested dict like it."""
    return {
        name: factors_of(config, branch, within or (depth_ratio(config) if name == "layers" else 1.0))
        if isinstance(branch, dict)
        else _factors(config, branch.axes, branch.is_matrix, within or 1.0)
        for name, branch in specs.items()
    }


def _factors(config: ModelConfig, axes: tuple[str, ...], matrix: bool, within: float) -> Factors:
    w = width_ratio(config)
    if "routes" in axes:
        return Factors(1 / w if matrix else 1.0, 1 / within, False)
    shared = [name for name in axes if name != "layers"] == [
        "head_dim"
    ]  # one scale for all heads: it sums more gradients
    return Factors(1 / w if matrix else 1.0, 1 / (within if shared else within * w), matrix)
