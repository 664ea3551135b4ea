"""What is drawn beside the processors of logits of transformers, which need PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as peers

from inference.requests import Sampling
from tests.inference.test_drawing import ADJUSTED, CHOICES, NARROWED, asks_of, logits, slots_of


@pytest.mark.parametrize("asked", CHOICES, ids=str)
def test_distributions_are_those_of_transformers(asked):
    """The set of tokens is the same and so are their probabilities."""
    sampling, prompt, new = Sampling(**asked), [3, 9, 9, 200], [4, 4, 650]
    wanted = [
        *(
            [peers.SequenceBiasLogitsProcessor([[[t], b] for t, b in sampling.logit_bias.items()])]
            if sampling.logit_bias
            else []
        ),
        peers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        peers.TemperatureLogitsWarper(sampling.temperature),
        *([peers.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []),
        *([peers.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []),
        *([peers.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []),
    ]
    for seed in range(4):
        x_BV, slots = logits(1, seed), slots_of(sampling, prompt=prompt, new=new)
        peer = (
            peers.LogitsProcessorList(wanted)(torch.tensor([prompt + new]), torch.tensor(x_BV))[0].softmax(-1).numpy()
        )
        rows = jnp.zeros(1, int)
        ours = jax.nn.softmax(NARROWED(ADJUSTED(slots, rows, x_BV, None), asks_of(slots, rows)))[0]
        assert np.flatnonzero(ours).tolist() == np.flatnonzero(peer).tolist()
        np.testing.assert_allclose(ours, peer, rtol=2e-5, atol=1e-9)
