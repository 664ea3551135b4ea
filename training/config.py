"""What a run may set of the training itself. No JAX here: a mistake is told before anything slow is imported."""

import math
import re
from dataclasses import dataclass

from model.config import one_of

DTYPES = ("float32", "bfloat16")
REMATS = ("none", "full", "dots", "attention")
OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "sgd")
SCHEDULES = ("cosine", "linear", "wsd", "constant")


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at once, in which precision.

    Raises ValueError for a setting that is unknown or out of range.
    """

    steps: int = 1000  # optimizer steps of the whole run, those before a restart included
    # sequences a step, over the whole mesh; or a published law: step_law | deepseek | power_lines | critical
    batch_size: int = 32
    seq_len: int = 256  # tokens of a sequence
    grad_accumulation: int = 1  # microbatches that a step is cut into
    compute_dtype: str = "auto"  # of matmuls and activations: auto (bfloat16; on CPUs float32) | float32 | bfloat16
    param_dtype: str = "float32"  # float32 | bfloat16: of parameters and moments
    remat: str = "none"  # none | full | dots (keep weight matmuls) | attention (keep its outputs)
    loss_chunk: int = 1024  # a device has as many logits at once as this many tokens of a sequence have; 0: all
    z_loss: float = 0.0  # weight of the squared log-normaliser
    nonfinite: str = "stop"  # stop | skip: what to do when the loss or a gradient is not finite
    log_every: int = 10  # steps between two lines of metrics; 0: none
    eval_every: int = 100  # steps between two evaluations on held-out text; 0: none
    eval_batches: int = 8  # of batch_size, the same ones each time
    patience: int = 0  # evaluations without a new best after which to stop; 0 off
    profile: str = ""  # a:b traces the steps from a to b into <run.dir>/profile; empty: off

    def __post_init__(self):
        for name in ("steps", "batch_size", "seq_len", "grad_accumulation", "eval_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be 1 or more")
        if self.steps >= 2**31:
            raise ValueError(f"train.steps={self.steps} must be below 2^31 = {2**31}")
        for name in ("loss_chunk", "z_loss", "log_every", "eval_every", "patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name}={getattr(self, name)} must be 0 (off) or more")
        one_of("train.compute_dtype", self.compute_dtype, ("auto", *DTYPES))
        one_of("train.param_dtype", self.param_dtype, DTYPES)
        one_of("train.remat", self.remat, REMATS)
        one_of("train.nonfinite", self.nonfinite, ("stop", "skip"))
        if self.batch_size % self.grad_accumulation:
            cut = f"train.grad_accumulation={self.grad_accumulation}"
            raise ValueError(f"train.batch_size={self.batch_size} does not divide by {cut}")
        if (traced := profiled_steps(self.profile)) and traced[1] > self.steps:
            raise ValueError(f"train.profile={self.profile} ends after train.steps={self.steps}")

    def compute_dtype_on(self, platform: str) -> str:
        """The dtype that `compute_dtype` means on cpu, gpu or tpu."""
        if self.compute_dtype != "auto":
            return self.compute_dtype
        return "float32" if platform == "cpu" else "bfloat16"


def profiled_steps(text: str) -> tuple[int, int] | None:
    """The first and the last step that train.profile names, None if it is empty. Raises ValueError."""
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    begin, end = (int(found[1]), int(found[2])) if found else (0, 0)
    if text and not 1 <= begin < end:
        raise ValueError(f"train.profile={text} must be a:b, the first and the last step to trace, with 1 <= a < b")
    return (begin, end) if text else None


@dataclass(frozen=True)
class OptimizerConfig:
    """What turns gradients into updates. Raises ValueError for a setting that is unknown or out of range."""

    name: str = "adamw"  # adamw | adafactor | lion | muon (AdamW for what is not a matrix) | sgd
    lr: float = 1e-3  # peak learning rate; or a published law of size and length: step_law | deepseek
    weight_decay: float = 0.1  # decoupled, times the learning rate; matrices and tables only; or a law: power_lines
    beta1: float = 0.9  # adamw, lion: decay of the first moment
    beta2: float = 0.95  # adamw, lion: decay of the second
    eps: float = 1e-8  # adamw, and muon's vectors: added to the root of the second moment
    momentum: float = 0.95  # muon, sgd (Nesterov)
    moment_dtype: str = ""  # "" (as the parameters) | bfloat16: of stored moments; not adafactor's, which are small
    clip_norm: float = 1.0  # global norm that gradients are scaled down to; 0 off
    schedule: str = "cosine"  # cosine | linear | wsd (warm-up, stable, decay) | constant
    warmup_steps: int = 50  # linear from 0
    decay_fraction: float = 0.2  # wsd: share of the run that decays, linearly
    final_lr: float = 0.1  # share of the peak that a decay ends at

    def __post_init__(self):
        one_of("optimizer.name", self.name, OPTIMIZERS)
        one_of("optimizer.schedule", self.schedule, SCHEDULES)
        if self.moment_dtype not in ("", "bfloat16"):
            raise ValueError(f"optimizer.moment_dtype={self.moment_dtype} is neither empty nor bfloat16")
        if self.moment_dtype and self.name == "adafactor":
            raise ValueError("optimizer.moment_dtype=bfloat16 is for adamw, lion, muon and sgd; leave it empty")
        for name in ("lr", "weight_decay", "clip_norm", "warmup_steps", "final_lr"):
            if not getattr(self, name) >= 0 or math.isinf(getattr(self, name)):
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must be 0 or more")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must be at least 0 and below 1")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"optimizer.eps={self.eps} must be above 0")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"optimizer.decay_fraction={self.decay_fraction} must be above 0 and at most 1")


def short_warmup_warning(config: OptimizerConfig, steps: int) -> str | None:
    """What to tell of a run that ends before its learning rate has reached the peak."""
    if config.warmup_steps <= steps:
        return None
    highest = config.lr * steps / config.warmup_steps
    return (
        f"optimizer.warmup_steps={config.warmup_steps} is more than train.steps={steps}: the learning rate ends at "
        f"{highest:.3g} and never reaches optimizer.lr={config.lr:g}; set optimizer.warmup_steps={steps // 10}"
    )
