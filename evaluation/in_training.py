"""The tasks that a model answers while it trains."""

import jax
import jax.numpy as jnp

from config.schema import Config
from data.tokenizer import Tokenizer
from evaluation.needs import harness
from evaluation.scoring import Scorer
from evaluation.tell import keys
from inference.generate import trained_reach
from training.job import Job


class Tasks:
    """Those of evaluation.tasks; none where evaluation.every is 0. Raises ValueError for one that is not there."""

    def __init__(self, config: Config, job: Job, tokenizer: Tokenizer):
        self._job, self._tokenizer, self._every = job, tokenizer, config.evaluation.every
        self._dtype, model, seq_len = jnp.dtype(config.train.compute_dtype), config.model, config.train.seq_len
        self._reach = model.max_positions if model.positions == "learned" else trained_reach(model, seq_len)
        self._adapter = None
        if self._every:
            self._suite = harness()
            self._tasks = self._suite.load_tasks(list(config.evaluation.tasks))

    def due(self, step: int, last: bool) -> bool:
        """Whether they are to be answered after this step."""
        return self._every > 0 and (last or step % self._every == 0)

    def metrics(self, params: dict) -> dict[str, float]:
        """`eval/TASK/METRIC` and its standard error, of parameters as they are trained. All processes call it."""
        with self._job.for_inference(params) as (description, params):
            if self._adapter is None:
                scorer = Scorer(description, params, jax.sharding.get_mesh(), self._dtype)
                self._adapter = self._suite.MeshModel(scorer, self._tokenizer, self._reach)
            self._adapter.scorer.params = params
            outcomes = self._suite.run_tasks(self._adapter, self._tasks)
            self._adapter.scorer.params = None  # the next step may write where they were
        return keys(outcomes)
