"""A teacher beside the student: what it says of each batch is put there before the step, or read from a folder.

The folder of `python -m finetune teach` has a file for each step, since the batch of a step is a pure function of the
data and the seed; its manifest says of which batches they are, and holds their digests.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from checkpoint.digests import find_damage, read_manifest, seal, write_manifest
from config.layout import model_requirements
from config.schema import identity
from finetune.tasks.distillation import HIDDEN, IDS, LOG_P, Options
from inference.opening import find_model, read_weights
from model.transformer import Description, describe
from parallel.mesh import MeshConfig, resolve
from parallel.sharding import local_rows, put_batch, shard
from training.config import TrainConfig
from training.feed import Arrays, Feed
from training.step import hidden, in_context_order, in_float32_matmuls
from training.subject import Subject

SAID = (HIDDEN, IDS, LOG_P)
FORMAT = 2

Teach = Callable[[int, Arrays], Arrays]  # of a step's number and its batch, what the teacher says of it


@dataclass(frozen=True, eq=False)
class TaughtFeed:
    """A feed whose training batches have what the teacher says; held-out ones are as they were."""

    feed: Feed
    teach: Teach

    def batch(self, step: int) -> Arrays:
        """The global arrays of a step, with those of SAID."""
        batch = self.feed.batch(step)
        return batch | self.teach(step, batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.feed, name)


def taught(subject: Subject, options: Options, mesh: Mesh, loss) -> Subject:
    """What a run learns, with a teacher. Raises ValueError for one that does not go with the student."""
    if mesh.shape["pipe"] > 1:
        raise ValueError("task=distillation: what a teacher says does not go through stages; set mesh.pipe=1")
    if options.kept:
        teach, digest = kept(Path(options.kept).expanduser(), subject, options, mesh)
    else:
        teach, digest = beside(subject, options, mesh)
    feed = TaughtFeed(subject.feed, teach)
    feed.told["teacher"] = options.kept or options.teacher
    plain = lambda batch: {name: x for name, x in batch.items() if name not in SAID}
    both = hashlib.sha256(f"{subject.digest} {digest}".encode()).hexdigest()
    judge = lambda job, batch: subject.judge(job, plain(batch))
    return replace(subject, feed=feed, digest=both, loss=loss, judge=judge)


# ---------------------------------------------------------------------------------------------------------- on the mesh


def beside(subject: Subject, options: Options, mesh: Mesh) -> tuple[Teach, str]:
    """A teacher on the mesh in context, and its digest. Raises ValueError."""
    config, found = subject.config, find_model(options.teacher)
    ours, theirs = subject.tokenizer.digest, found.tokenizer.digest
    if ours != theirs or found.config.model.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"task.options.teacher={options.teacher} knows other tokens ({theirs[:8]}, {found.config.model.vocab_size} "
            f"of them) than the student ({ours[:8]}, {config.model.vocab_size}): both need one tokenizer, as of "
            "tokenizer=file tokenizer.path=TEACHER/tokenizer.json"
        )
    if not found.config.model.generates:
        raise ValueError(f"task.options.teacher={options.teacher} says no next tokens: it is no decoder")
    if options.hidden and found.config.model.width != config.model.width:
        width = found.config.model.width
        raise ValueError(f"task.options.hidden: the teacher's width is {width}, the student's {config.model.width}")
    resolve(MeshConfig(**mesh.shape), mesh.size, model_requirements(found.config.model))
    description = describe(found.config.model, context_style=config.context.style, forms=found.forms)
    read = read_weights(found.path, description, mesh, jnp.dtype(config.train.param_dtype))
    says = jax.jit(in_float32_matmuls(_says(description, config.train, options), config.train))
    return lambda step, batch: says(read.params, batch), read.digest


def _says(description: Description, config: TrainConfig, options: Options):
    """The program (params, batch) -> what a teacher says, in the batch's order."""
    vocabulary = description.config.vocab_size

    def says(params: dict, batch: Arrays) -> Arrays:
        moved = in_context_order(description, batch)
        model, x_BTD, _ = hidden(description, config, params, moved)
        logits_BTV = model.logits(x_BTD)[..., :vocabulary]
        log_p_BTV = jax.nn.log_softmax(logits_BTV / options.temperature)
        log_p_BTk, ids_BTk = jax.lax.top_k(log_p_BTV, min(options.top_k, vocabulary))
        said = {IDS: ids_BTk, LOG_P: log_p_BTk} | ({HIDDEN: x_BTD} if options.hidden else {})
        if "positions_BT" in moved and "positions_BT" not in batch:
            back_T = jnp.argsort(moved["positions_BT"][0])
            said = jax.tree.map(lambda x: jnp.take(x, back_T, axis=1), said)
        return jax.tree.map(lambda x: shard(x, "batch", "tokens", None), said)

    return says


# -------------------------------------------------------------------------------------------------------------- on disk


def about(subject: Subject, options: Options) -> dict[str, Any]:
    """What decides the batches of a run, and what is kept of them."""
    config, t = subject.config, subject.config.train
    said = {"temperature": options.temperature, "tokenizer": subject.tokenizer.digest}
    said |= {"data": subject.digest, "seed": config.seed, "batch_size": t.batch_size, "seq_len": t.seq_len}
    settings = identity(config)["data"]
    sources = {f"mixture.{name}": source for name, source in (settings.pop("mixture") or {}).items()}
    for group, values in {"": settings, **sources}.items():  # the digest tells what lies at a path
        said |= {".".join(filter(None, ("data", group, name))): v for name, v in values.items() if name != "path"}
    return said


def keep(folder: Path, subject: Subject, options: Options, mesh: Mesh, steps: int, progress: Callable) -> None:
    """Fills a folder with what a teacher says of the first `steps` batches. Raises as `beside`."""
    teach, digest = beside(subject, options, mesh)
    for step in range(steps):
        said = teach(step, subject.feed.batch(step))
        np.savez(folder / _name(step), ids=np.asarray(said[IDS]), log_p=np.asarray(said[LOG_P]))
        progress(step + 1)
    body = {"format": FORMAT, "teacher": {"path": options.teacher, "digest": digest}, "steps": steps}
    write_manifest(folder, {**body, **about(subject, options), "files": seal(folder)})


def kept(folder: Path, subject: Subject, options: Options, mesh: Mesh) -> tuple[Teach, str]:
    """What a teacher said, read for each step, and its digest. Raises ValueError for a folder of other batches."""
    try:
        body = read_manifest(folder)
        damage = find_damage(folder, body["files"], contents=True)
    except (ValueError, KeyError) as error:
        raise ValueError(f"task.options.kept={folder}: {error}") from None
    if damage:
        raise ValueError(f"task.options.kept={folder} is damaged: {', '.join(damage[:4])}")
    if body.get("format") != FORMAT:
        raise ValueError(f"task.options.kept={folder} is of format {body.get('format')}, not {FORMAT}: make it anew")
    for name, ours in about(subject, options).items():
        if body.get(name) != ours:
            raise ValueError(f"task.options.kept={folder} is of {name}={body.get(name)}, and this run has {ours}")
    batch_size, steps = subject.config.train.batch_size, subject.config.train.steps
    if body["steps"] < steps:
        raise ValueError(f"task.options.kept={folder} has {body['steps']} steps, and train.steps={steps}")
    rows = local_rows(mesh, batch_size)

    def teach(step: int, batch: Arrays) -> Arrays:
        with np.load(folder / _name(step)) as said:
            return put_batch(mesh, {IDS: said["ids"][rows], LOG_P: said["log_p"][rows]}, batch_size)

    return teach, body["teacher"]["digest"]


def _name(step: int) -> str:
    return f"{step:08d}.npz"
