"""How a model answers the held-out rows of a task: in training, and of a trained model."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from finetune.examples import InOrder, Table
from finetune.task import Judgement, Task
from inference.config import SampleConfig
from inference.generate import generate, room_behind
from model.transformer import Description
from parallel.sharding import local_rows, put_batch, replicated, shard, splits
from runtime.platform import platform
from training.config import TrainConfig
from training.heldout import Evaluation
from training.job import Job
from training.step import Batch, hidden, in_context_order, in_float32_matmuls

AT_ONCE = 32  # prompts that are written behind together


def make_answer_step(description: Description, config: TrainConfig, task: Task) -> Callable:
    """The step (params, batch) -> (loss and count, the task's answers), to be jitted.

    For parameters in the model's order of layers: those of a run with stages go through Job.for_inference first.
    """

    def answer_step(params, batch: Batch):
        moved = in_context_order(description, batch)
        model, x_BTD, _ = hidden(description, config, params, moved)
        losses = task.loss(model, x_BTD, moved, config)
        sums = {"loss": losses.nll, "right": losses.correct, "count": batch["mask_BT"].sum()}
        answers = task.answers(model, x_BTD, moved, config)
        if "positions_BT" in moved:
            back_T = jnp.argsort(moved["positions_BT"][0])
            back = lambda x: shard(jnp.take(x, back_T, axis=1), "batch", "tokens")
            answers = {name: back(x) if name.endswith("_BT") else x for name, x in answers.items()}
        return sums, answers

    return in_float32_matmuls(answer_step, config)


class Answers:
    """The answers of a model to the same examples each time, on the mesh in context, whole on every process."""

    def __init__(self, task: Task, description: Description, config: TrainConfig, table: Table):
        self.task, self.table, self._mesh, self._description = task, table, jax.sharding.get_mesh(), description
        self._dtype = jnp.dtype(config.compute_dtype_on(platform()))
        self._size = -(-config.batch_size // splits("batch")) * splits("batch")
        # a loss that compares the sequences of a batch is that of as many as in training, on whatever mesh
        self._counted = config.batch_size if task.whole_batch else self._size
        self._batches = InOrder(table, task.setup.seq_len, self._size, self._counted)
        self._step = jax.jit(make_answer_step(description, config, task), out_shardings=replicated(self._mesh))

    def of(self, params: dict) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Sums of the loss, of what is right and of what counts; and the answers, (examples, ...) each."""
        sums, parts, mine = dict.fromkeys(("loss", "right", "count"), 0.0), [], local_rows(self._mesh, self._size)
        for batch in self._batches:
            arrays = put_batch(self._mesh, {name: x[mine] for name, x in batch.items()}, self._size)
            found, answers = self._step(params, arrays)
            sums = {name: total + float(found[name]) for name, total in sums.items()}
            parts.append({name: np.asarray(x)[: self._counted] for name, x in answers.items()})
        count = len(self.table.examples)
        whole = {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}
        return sums, whole

    def judgement(self, params: dict) -> tuple[float, Judgement]:
        """The mean loss, and what the answers are worth."""
        (sums, whole), examples = self.of(params), self.table.examples
        loss, right = (sums[name] / max(sums["count"], 1) for name in ("loss", "right"))
        found = self.task.judge(self.table.rows, examples, whole)
        metrics = self.task.of_sums(loss, right) | found.metrics
        if texts := self.task.judge_texts(self.table.rows, examples, lambda *asked: self._written(params, *asked)):
            found, metrics = replace(found, judged=[*found.judged, *texts.judged]), metrics | texts.metrics
        return loss, replace(found, metrics=metrics)

    def _written(self, params: dict, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """What the model finds likeliest behind each prompt, up to so many tokens, the end of the text, or the last of
        its learned positions.
        """
        how = {"eos_id": self.task.setup.tokenizer.eos_id, "dtype": self._dtype}
        step = max(1, tokens // 8)  # each length is a program of its own, so that there are few
        room = [min(tokens, room_behind(self._description.config, prompt) // step * step) for prompt in prompts]
        written: list[list[int]] = [[] for _ in prompts]
        for most in sorted({*room} - {0}):  # those that have room for equally many are written together
            rows = [row for row, own in enumerate(room) if own == most]
            sample = SampleConfig(tokens=most, temperature=0.0)
            for first in range(0, len(rows), AT_ONCE):
                cut = rows[first : first + AT_ONCE]
                texts = generate(self._description, params, [prompts[row] for row in cut], sample, **how)
                for row, text in zip(cut, texts, strict=True):
                    written[row] = text
        return written


class TaskJudge:
    """Judges parameters while they are trained; a training.subject.Judge."""

    def __init__(self, task: Task, job: Job, table: Table):
        self._task, self._job, self._table = task, job, table
        self._metric = task.setup.config.metric or next(iter(task.metrics))
        self.watched = f"eval/{self._metric}"
        self._answers: Answers | None = None

    def evaluate(self, params: dict) -> Evaluation:
        """What it finds of parameters as they are trained. All processes call it."""
        with self._job.for_inference(params) as (description, params):
            if self._answers is None:
                self._answers = Answers(self._task, description, self._job.train, self._table)
            loss, judgement = self._answers.judgement(params)
        found = {"loss": loss} | judgement.metrics
        rank = -self._task.metrics[self._metric] * found[self._metric]
        return Evaluation(loss, metrics=judgement.metrics, watched=rank)
