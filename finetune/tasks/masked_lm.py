"""Masked tokens of running text: how encoders are pretrained (Devlin et al. 2018).

It reads data=..., as pretraining does, and no rows: packing, mixtures and prepared corpora are those of every run.
"""

from dataclasses import dataclass

import numpy as np

from data.packing import Batch
from data.tokenizer import ByteTokenizer
from finetune.task import Setup
from finetune.task import Task as Base

NAMES = ("[MASK]", "<mask>", "<|mask|>")
NO_BYTE = 255  # that no text holds: what stands for a masked byte


@dataclass(frozen=True)
class Options:
    """Settings task.options.* of this task."""

    share: float = 0.15  # of the tokens that are to be told
    masked: float = 0.8  # of these, that are hidden behind the mask token
    random: float = 0.1  # of these, that another token stands for; the rest stays

    def __post_init__(self):
        if not 0 < self.share < 1 or not 0 <= self.masked <= self.masked + self.random <= 1:
            raise ValueError("task.options: share must lie between 0 and 1, and masked and random sum to 1 at most")


class Task(Base):
    """Masked language modelling."""

    Options = Options
    columns = {}
    reads_text = True

    def __init__(self, setup: Setup, options: Options):
        super().__init__(setup, options)
        if setup.model.causal:
            raise ValueError("masked_lm needs an encoder: set model.causal=false")
        specials = getattr(setup.tokenizer, "specials", {})
        self._mask = next((specials[name] for name in NAMES if name in specials), None)
        if isinstance(setup.tokenizer, ByteTokenizer):
            self._mask = NO_BYTE
        if self._mask is None:
            raise ValueError(f"the tokenizer has no mask token; looked for {', '.join(NAMES)}")
        self._special = np.array(sorted({*specials.values(), setup.tokenizer.eos_id}))

    def change(self, batch: Batch, number: int, rows: np.ndarray) -> Batch:
        """A batch of text with tokens masked: a pure function of the seed, the batch's number and each row's."""
        tokens_BT, o = batch["tokens_BT"], self.options
        draws = [np.random.default_rng((self.setup.seed, number % 2**32, row)) for row in rows.tolist()]
        T, vocabulary = tokens_BT.shape[1], self.setup.tokenizer.vocab_size
        chosen_BT = np.stack([draw.random(T) for draw in draws]) < o.share
        how_BT = np.stack([draw.random(T) for draw in draws])
        other_BT = np.stack([draw.integers(0, vocabulary, T, dtype=np.int32) for draw in draws])
        chosen_BT &= ~np.isin(tokens_BT, self._special) & batch["mask_BT"].any(1, keepdims=True)
        if "segments_BT" in batch:
            chosen_BT &= batch["segments_BT"] > 0
        hidden_BT, swapped_BT = how_BT < o.masked, how_BT < o.masked + o.random
        shown_BT = np.where(hidden_BT, self._mask, np.where(swapped_BT, other_BT, tokens_BT)).astype(np.int32)
        shown_BT = np.where(chosen_BT, shown_BT, tokens_BT)
        return batch | {"tokens_BT": shown_BT, "targets_BT": tokens_BT, "mask_BT": chosen_BT.astype(np.float32)}
