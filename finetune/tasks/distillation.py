"""A model learns what another one says of text: the whole distribution of the next token, not the token alone.

The loss of a token is `hard` times its cross-entropy, plus (1 - hard) t^2 times the divergence of the student from the
teacher, both at temperature t (Hinton et al., arXiv 1503.02531, section 2). Of the teacher the `top_k` most likely
tokens are told; all others count as one. With as many as there are tokens nothing is left out.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from finetune.task import Setup
from finetune.task import Task as Base
from model.transformer import Transformer
from training.config import TrainConfig
from training.loss import LossSums, PartialSoftmax, over_vocabulary
from training.step import Batch

IDS, LOG_P, HIDDEN = "teacher_ids_BT", "teacher_log_p_BT", "teacher_hidden_BT"  # (B, T, k), (B, T, k), (B, T, D)
LEAST = 1e-9  # share of the tokens that the teacher does not name, so that its logarithm is a number


@dataclass(frozen=True)
class Options:
    """Settings task.options.* of this task."""

    teacher: str = ""  # a run's directory, a Hugging Face folder or a .gguf file, put on the mesh beside the student
    kept: str = ""  # instead of it, a folder of what a teacher said: python -m finetune teach
    temperature: float = 1.0  # both distributions are of logits over this
    hard: float = 0.5  # weight of the true next token; the rest is the teacher's
    top_k: int = 64  # tokens that the teacher names
    hidden: float = 0.0  # weight of the squared distance of final vectors, each of length 1; wants one width; 0 off

    def __post_init__(self):
        if bool(self.teacher) == bool(self.kept):
            raise ValueError("task.options: set either teacher=PATH, or kept=FOLDER with what a teacher said")
        if not self.temperature > 0 or not 0 <= self.hard <= 1 or self.top_k < 1 or self.hidden < 0:
            raise ValueError("task.options: temperature and top_k must be above 0, hard from 0 to 1, hidden 0 or more")
        if self.hidden and self.kept:
            raise ValueError("task.options.hidden: hidden vectors are not kept; give the teacher itself")


class Task(Base):
    """Distillation."""

    Options = Options
    columns = {}
    reads_text = True
    wants_teacher = True

    def __init__(self, setup: Setup, options: Options):
        super().__init__(setup, options)
        if not setup.model.generates:
            raise ValueError("distillation is of the next token: set model.causal=true and model.head=vocabulary")

    def change(self, batch, number, rows):
        """The batch itself."""
        return batch

    def loss(self, model: Transformer, x_BTD: jax.Array, batch: Batch, config: TrainConfig) -> LossSums:
        """What the module says, summed over the tokens that count, as `nll`."""
        o = self.options
        found = matched(model, x_BTD, batch["targets_BT"], batch[IDS], o.temperature, config.loss_chunk)
        losses = found.hard.losses()
        soft_BT = o.temperature**2 * found.divergence(batch[LOG_P])
        loss_BT = o.hard * losses.nll_BT + (1 - o.hard) * soft_BT
        if o.hidden:
            loss_BT = loss_BT + o.hidden * jnp.sum(jnp.square(unit(x_BTD) - unit(batch[HIDDEN])), axis=-1)
        total = lambda x_BT: jnp.sum(x_BT * batch["mask_BT"])
        return LossSums(total(loss_BT), total(losses.z_BT), total(losses.correct_BT))


def unit(x_BTD: jax.Array) -> jax.Array:
    """The vectors in length 1, float32."""
    x_BTD = x_BTD.astype(jnp.float32)
    return x_BTD * jax.lax.rsqrt(jnp.sum(jnp.square(x_BTD), axis=-1, keepdims=True) + 1e-12)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Match:
    """What some rows of the student's vocabulary say of each token, at a temperature, too."""

    hard: PartialSoftmax
    total_BT: jax.Array  # sum of exp((logit - top) / temperature), with the top of `hard`
    at_BTk: jax.Array  # the logits of the tokens that the teacher names, 0 for those that are none of the rows
    temperature: float = field(metadata={"static": True})

    def __add__(self, other: "Match") -> "Match":
        hard = self.hard + other.hard
        scaled = lambda one: one.total_BT * jnp.exp((one.hard.top_BT - hard.top_BT) / self.temperature)
        return Match(hard, scaled(self) + scaled(other), self.at_BTk + other.at_BTk, self.temperature)

    def divergence(self, log_p_BTk: jax.Array) -> jax.Array:
        """sum p log(p / q) of each token, over those that the teacher names and all others as one; float32, nats."""
        log_q_BTk = (self.at_BTk - self.hard.top_BT[..., None]) / self.temperature - jnp.log(self.total_BT)[..., None]
        p_BTk = jnp.exp(log_p_BTk)
        named_BT = jnp.sum(p_BTk * (log_p_BTk - log_q_BTk), axis=-1)
        rest = lambda share_BTk: jnp.maximum(1 - jnp.sum(share_BTk, axis=-1), LEAST)
        p_BT, q_BT = rest(p_BTk), rest(jnp.exp(log_q_BTk))
        return named_BT + p_BT * jnp.log(p_BT / q_BT)


def matched(model: Transformer, x_BTD, targets_BT, ids_BTk, temperature: float, chunk: int) -> Match:
    """All rows of the vocabulary together, from final hidden vectors; `chunk` as in training.loss.token_losses."""

    def of(logits_BTV: jax.Array, token_V: jax.Array) -> Match:
        hard = PartialSoftmax.of(logits_BTV, token_V, targets_BT)
        total_BT = jnp.exp((logits_BTV - hard.top_BT[..., None]) / temperature).sum(-1)
        V = len(token_V)
        spacing = token_V[1] - token_V[0] if V > 1 else 1  # tokens of a part are evenly spaced
        column_BTk = jnp.clip((ids_BTk - token_V[0]) // spacing, 0, V - 1)
        at_BTk = jnp.take_along_axis(logits_BTV, column_BTk, axis=-1)
        return Match(hard, total_BT, jnp.where(token_V[column_BTk] == ids_BTk, at_BTk, 0), temperature)

    def zero(zero_BT: jax.Array) -> Match:
        at_BTk = jnp.zeros(ids_BTk.shape, jnp.float32)
        return Match(PartialSoftmax.none(zero_BT), zero_BT, at_BTk, temperature)

    return over_vocabulary(model, x_BTD, chunk, of, zero)
