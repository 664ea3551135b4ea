"""Published starting points for the learning rate, the batch size and the weight decay. No JAX here: config.py asks.

Each law was fitted on runs of its authors: a place to begin a search, not a result. N counts parameters without token
and position tables and the head, D tokens of training, C FLOPs; batches are in tokens.
"""

import math

from model.config import ModelConfig
from model.counts import flops_per_token, parameter_count
from training.config import OptimizerConfig, TrainConfig

# The config keys that may name a law, in the order in which they are resolved.
LAWS = {
    ("train", "batch_size"): ("step_law", "deepseek", "power_lines", "critical"),
    ("optimizer", "lr"): ("step_law", "deepseek"),
    ("optimizer", "weight_decay"): ("power_lines",),
}
POWER_LINES_SEQUENCE = 2048  # tokens of a sequence in its runs, in which it counts batches


def step_law_lr(n: float, d: float) -> float:
    """Step Law's peak learning rate, 1.79 N^-0.713 D^0.307 (arXiv 2503.04715, equation 1; AdamW, cosine to 1e-5)."""
    return 1.79 * n**-0.713 * d**0.307


def deepseek_lr(c: float) -> float:
    """DeepSeek LLM's peak learning rate, 0.3118 C^-0.1250 (arXiv 2401.02954, equation 1; AdamW)."""
    return 0.3118 * c**-0.1250


def power_lines_timescale(tokens_per_parameter: float) -> float:
    """The best share of a run over which AdamW averages, B / (lr weight_decay D), is 1.084 (D / N)^-0.527.

    Power Lines (arXiv 2505.13738, figure 1). N counts all parameters.
    """
    return 1.084 * tokens_per_parameter**-0.527


def power_lines_weight_decay(lr: float, batch: float, n: float, d: float) -> float:
    """The weight decay, decoupled and multiplied by lr, that has the time-scale of Power Lines; N all parameters."""
    return batch / (lr * d * power_lines_timescale(d / n))


def step_law_batch(d: float) -> float:
    """Step Law's batch, 0.58 D^0.571 (arXiv 2503.04715, equation 1)."""
    return 0.58 * d**0.571


def deepseek_batch(c: float) -> float:
    """DeepSeek LLM's batch, 0.2920 C^0.3271 (arXiv 2401.02954, equation 1)."""
    return 0.2920 * c**0.3271


def power_lines_batch(d: float) -> float:
    """The batch of least loss for D tokens, 0.0306 D^0.383 sequences (arXiv 2505.13738, figure 1)."""
    return POWER_LINES_SEQUENCE * 0.0306 * d**0.383


def critical_batch(d: float) -> float:
    """The batch beyond which more sequences save few steps, 0.0471 D^0.462 sequences (arXiv 2505.13738, figure 1).

    D are the tokens that a small batch would need for the same loss.
    """
    return POWER_LINES_SEQUENCE * 0.0471 * d**0.462


def deepseek_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """M of arXiv 2401.02954, equation 2: FLOPs a token without the output table, every token attending to all."""
    return flops_per_token(model, seq_len, full_attention=True) - 6 * model.vocab_size * model.width


# --------------------------------------------------------------------------------------------------------- in a config


def law_number(
    key: tuple[str, str], law: str, model: ModelConfig, train: TrainConfig, optimizer: OptimizerConfig
) -> float | int:
    """What the config key (group, name) is by `law`. Raises ValueError for a config that the law was not made for."""
    spelled, d = f"{key[0]}.{key[1]}={law}", float(train.steps * train.batch_size * train.seq_len)
    if key == ("train", "batch_size"):
        return batch_size(law, model, train.steps, train.seq_len, train.grad_accumulation)
    if optimizer.name not in ("adamw", "muon"):  # whose updates here are as large as AdamW's
        raise ValueError(f"{spelled} was fitted for AdamW, and optimizer.name={optimizer.name}; use adamw, muon")
    if key == ("optimizer", "lr"):
        if model.parametrization != "standard":
            also = f"model.parametrization={model.parametrization}"
            raise ValueError(f"{spelled} depends on the model's size already, and so does {also}; use one of the two")
        if law == "deepseek":
            return deepseek_lr(d * deepseek_flops_per_token(model, train.seq_len))
        return step_law_lr(parameter_count(model).layers, d)
    if optimizer.lr == 0:
        raise ValueError(f"{spelled} divides by optimizer.lr=0; set a learning rate")
    batch = float(train.batch_size * train.seq_len)
    return power_lines_weight_decay(optimizer.lr, batch, parameter_count(model).total, d)


def batch_size(law: str, model: ModelConfig, steps: int, seq_len: int, multiple: int) -> int:
    """Sequences a step by `law` for a run of `steps` steps: `multiple` times the nearest power of two.

    A law is a power of D = steps * batch or of C = D * FLOPs a token, so that the batch stands on both sides of
    batch = a batch^b, where a is what the law says of a batch of one token.
    """
    per_token = deepseek_flops_per_token(model, seq_len)
    tokens = {
        "step_law": lambda batch: step_law_batch(steps * batch),
        "deepseek": lambda batch: deepseek_batch(steps * batch * per_token),
        "power_lines": lambda batch: power_lines_batch(steps * batch),
        "critical": lambda batch: critical_batch(steps * batch),
    }[law]
    a, b = tokens(1.0), math.log(tokens(math.e) / tokens(1.0))
    sequences = a ** (1 / (1 - b)) / seq_len
    return multiple * 2 ** max(0, round(math.log2(sequences / multiple)))
