"""A student and its teacher: the loss is its definition, no mesh changes it, and what is kept says the same."""

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from tuning import SMALL, assert_same, trace

from checkpoint.config import CheckpointConfig
from checkpoint.store import CheckpointStore
from config import compose
from finetune.__main__ import main
from finetune.options import parse
from finetune.tasks.distillation import Match, matched
from model.transformer import describe
from training.loss import PartialSoftmax

LARGER = ("model.width=48", "model.heads=8", "model.kv_heads=8", "model.ffn=96")


@functools.cache
def text() -> Path:
    return runs.corpus(Path(tempfile.mkdtemp()) / "text")


def data() -> list[str]:
    return ["data=text", f"data.path={text()}/*.txt", f"data.cache={text().parent / 'cache'}", "data.heldout=0.2"]


@functools.cache
def teacher() -> Path:
    """A run's directory with weights that nobody trained."""
    path = text().parent / "teacher"
    config = compose.load([*data(), *SMALL, *LARGER, f"run.dir={path}"])
    path.mkdir()
    (path / "config.yaml").write_text(compose.to_yaml(config))
    params = jax.jit(describe(config.model).init)(jax.random.key(7))
    store = CheckpointStore(path / "checkpoints", CheckpointConfig(asynchronous=False))
    assert store.save(3, {"params": jax.tree.map(lambda p: 3 * p, params)}, {}, metric=1.0)
    store.close()
    return path


def arguments(*more: str, hidden: str = "0") -> list[str]:
    options = [f"task.options.teacher={teacher()}", "task.options.top_k=20", f"task.options.hidden={hidden}"]
    shared = ["task=distillation", *data(), *SMALL, "data.segments=true", "train.eval_batches=1"]
    return [*shared, *(options if not any("kept=" in word for word in more) else options[1:]), *more]


@functools.cache
def one_device():
    return trace(arguments())


@pytest.mark.long
def test_the_mesh_changes_nothing():
    """Nor do microbatches, and a vocabulary in parts; with hidden vectors, too."""
    alike = ["model.width=48"]
    how = ["train.grad_accumulation=2", "train.loss_chunk=8"]
    mesh = {"fsdp": 2, "context": 2, "tensor": 2}
    assert_same(trace(arguments(*alike, *how, hidden="0.5"), **mesh), trace(arguments(*alike, hidden="0.5")))


def test_the_loss_is_its_definition():
    """Named tokens and the rest as one; all of them named, it is the divergence of the whole distributions."""
    draw, t = np.random.default_rng(0), 2.0
    student, other = draw.standard_normal((2, 2, 3, 11))
    log = lambda logits: np.log(np.exp(logits / t) / np.exp(logits / t).sum(-1, keepdims=True))
    for k in (4, 11):
        ids = np.argsort(-other, axis=-1)[..., :k]
        log_p, log_q = (np.take_along_axis(log(logits), ids, -1) for logits in (other, student))
        theirs = (np.exp(log_p) * (log_p - log_q)).sum(-1)
        if k < 11:
            p, q = 1 - np.exp(log_p).sum(-1), 1 - np.exp(log_q).sum(-1)
            theirs += p * np.log(p / q)

        class Head:
            def vocabulary(self, parts, dtype):
                from model.heads import VocabularyRows

                n = 1 if parts == 1 else 11
                tokens = jnp.arange(11, dtype=jnp.int32).reshape(11 // n, n).T
                return VocabularyRows(jnp.eye(11)[tokens], tokens)

            def logits(self, x_BTD, rows):
                return x_BTD @ rows.table_VD.T

        for chunk in (0, 1):
            found = matched(
                Head(), jnp.asarray(student, jnp.float32), jnp.zeros((2, 3), int), jnp.asarray(ids), t, chunk
            )
            assert isinstance(found, Match)
            assert isinstance(found.hard, PartialSoftmax)
            np.testing.assert_allclose(found.divergence(jnp.asarray(log_p, jnp.float32)), theirs, rtol=2e-4, atol=1e-5)


@pytest.mark.long
def test_what_is_kept_says_what_the_teacher_said(tmp_path):
    """The same losses, on another mesh, without the teacher; other batches are refused, and damage is named."""
    out = tmp_path / "kept"
    words = [
        "teach",
        str(out),
        *arguments("runtime.platform=cpu", "runtime.cpu_devices=8", "mesh.data=8"),
    ]
    assert main(parse(words)) == 0
    kept = [f"task.options.kept={out}"]
    assert_same(trace(arguments(*kept), fsdp=2), one_device())
    with pytest.raises(ValueError, match="is of seed=0, and this run has 1"):
        trace(arguments(*kept, "seed=1"))
    with pytest.raises(ValueError, match=r"is of temperature=1.0, and this run has 3.0"):
        trace(arguments(*kept, "task.options.temperature=3"))
    with pytest.raises(ValueError, match=r"is of data.packing=concatenate, and this run has best_fit"):
        trace(arguments(*kept, "data.packing=best_fit"))
    with pytest.raises(ValueError, match=r"has 10 steps, and train.steps=11"):
        trace(arguments(*kept, "train.steps=11"))
    file = out / "00000001.npz"
    altered = bytearray(file.read_bytes())
    altered[len(altered) // 2] ^= 1
    file.write_bytes(bytes(altered))
    with pytest.raises(ValueError, match=r"damaged: 00000001.npz"):
        trace(arguments(*kept))


def test_what_does_not_go_together_is_refused():
    for more, message in (
        (["tokenizer=bpe", "tokenizer.vocab_size=300"], "knows other tokens"),
        (["task.options.hidden=1"], "the teacher's width is 48, the student's 32"),
        (["task.options.kept=folder", "task.options.teacher=other"], "set either teacher=PATH, or kept=FOLDER"),
        (["task.options.temperature=0"], "must be above 0"),
        (["model.causal=false"], "distillation is of the next token"),
    ):
        with pytest.raises(ValueError, match=message):
            trace(arguments(*more))
    with pytest.raises(ValueError, match="does not go through stages"):
        trace(arguments(), pipe=2)
