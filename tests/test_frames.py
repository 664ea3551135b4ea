"""From step to softmax there are few calls of ours: whoever reads a step, or a traceback, finds the way."""

import traceback
from pathlib import Path

import jax
import jax.numpy as jnp

from config.compose import load
from parallel.mesh import AXES, make_mesh
from training.job import make_job

ROOT = Path(__file__).parent.parent
MOST = 12


def test_few_frames_lie_between_step_and_softmax(monkeypatch):
    stacks, softmax = [], jax.nn.softmax

    def watched(x, *args, **kwargs):
        files = [Path(frame.filename) for frame in traceback.extract_stack()[:-1]]
        ours = [file for file in files if file.is_relative_to(ROOT) and file.relative_to(ROOT).parts[0] != "tests"]
        stacks.append([file for file in ours if ".venv" not in file.parts])
        return softmax(x, *args, **kwargs)

    monkeypatch.setattr("model.plain_attention.jax.nn.softmax", watched)
    cfg, mesh = load(["train.batch_size=2", "train.seq_len=16"]), make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        job = make_job(cfg, mesh)
        dtypes = {"tokens_BT": jnp.int32, "targets_BT": jnp.int32, "mask_BT": jnp.float32}
        job.step.lower(job.abstract, {n: jax.ShapeDtypeStruct((2, 16), d) for n, d in dtypes.items()})
    assert stacks
    assert stacks[0][0].name == "step.py"
    assert max(map(len, stacks)) <= MOST, "\n".join(str(file.relative_to(ROOT)) for file in max(stacks, key=len))
