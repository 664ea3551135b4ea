"""Tuned heads as transformers reads them: the same logits from the exported folder, and from the folder here again."""

from pathlib import Path

import jax
import numpy as np
import pytest
import runs
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from checkpoint.huggingface.__main__ import main as huggingface
from checkpoint.huggingface.options import parse
from inference.opening import open_model

ALL = ["runtime.cpu_devices=8", "mesh.data=8", "mesh.fsdp=1"]
TOKENS = np.array([[5, 9, 77, 101, 33, 12, 64, 8]], np.int32)
ENCODER = (
    *("model.causal=false", "model.positions=learned", "model.max_positions=32", "model.token_types=2"),
    *("model.norm=layer", "model.norm_position=post", "model.bias=all", "model.embedding_norm=true"),
    *("model.activation=gelu_exact", "model.norm_eps=1e-12"),
)
CASES = {
    "classification": (AutoModelForSequenceClassification, ENCODER, "text,label\n"),
    "decoder": (AutoModelForSequenceClassification, ("model.tied_embeddings=false",), "text,label\n"),
    "token_classification": (AutoModelForTokenClassification, ENCODER, "words,tags\n"),
    "span_qa": (AutoModelForQuestionAnswering, ENCODER, "context,answers,question\n"),
}


@pytest.mark.parametrize("case", CASES)
def test_transformers_has_the_same_logits(case, tmp_path):
    kind, model, head = CASES[case]
    rows = [f"{'good' if i % 2 else 'bad'}{i},{'B-X' if i % 2 else 'O'}\n" for i in range(40)]
    if case == "span_qa":
        rows = [f"it is {i} here,{i},who?\n" for i in range(40)]
    (tmp_path / "rows.csv").write_text(head + "".join(rows))
    task = "classification" if case == "decoder" else case
    arguments = [f"task={task}", f"task.path={tmp_path}/rows.csv", "task.heldout=0.3", *model, "task.options={}"]
    arguments += ["task.options.stride=4", "task.options.question=8"] if case == "span_qa" else []
    arguments += ["train.steps=2", "train.batch_size=8", "train.seq_len=32", "train.eval_every=0", "train.log_every=0"]
    arguments += ["wandb.mode=disabled", f"run.dir={tmp_path}/run", "optimizer.lr=1e-3", "checkpoint.every=2"]
    assert runs.run([*arguments, "runtime.compile_cache=null"], devices=1) == 0
    assert huggingface(parse(["export", str(tmp_path / "run"), str(tmp_path / "folder"), *ALL])) == 0

    theirs = kind.from_pretrained(tmp_path / "folder").eval()
    with torch.no_grad():
        said = theirs(torch.tensor(TOKENS))
    said = torch.stack([said.start_logits, said.end_logits], -1) if case == "span_qa" else said.logits
    assert set(theirs.config.id2label.values()) <= {"good", "bad", "B-X", "O", "begin", "end"}
    for path in (tmp_path / "run", tmp_path / "folder"):
        opened = open_model(path, ALL)
        with jax.set_mesh(opened.mesh):
            net = opened.description.bind(opened.params)
            x_BTD, _, _ = net(TOKENS)
            logits_BTC = np.asarray(net.label_logits(x_BTD))
        ours = {"classification": logits_BTC[:, 0], "decoder": logits_BTC[:, -1]}.get(case, logits_BTC)
        np.testing.assert_allclose(ours, said.numpy(), rtol=1e-4, atol=1e-4, err_msg=Path(path).name)
