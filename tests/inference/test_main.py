"""The command: mistakes are one line and exit code 2; texts come from a checkpoint's parameters alone."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint.config import CheckpointConfig
from checkpoint.store import CheckpointStore
from config.compose import to_yaml
from config.schema import Config, finish
from data.tokenizer import ByteTokenizer
from inference import options
from inference.generate import generate
from model.config import ModelConfig
from model.transformer import describe

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelConfig(layers=1, width=16, heads=2, kv_heads=2, head_dim=8, ffn=16, vocab_multiple=16)


def command(*arguments) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "inference", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def refused(capsys, *arguments) -> str:
    """The message of a mistake in the command line itself."""
    with pytest.raises(SystemExit) as exit_:
        options.parse([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (exit_.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with two checkpoints, the first one the better, and the parameters of both."""
    path = tmp_path_factory.mktemp("run")
    config = finish(Config(model=MODEL))
    runtime = replace(config.runtime, compile_cache=str(path / "cache"))
    (path / "config.yaml").write_text(to_yaml(replace(config, runtime=runtime)))
    description, params = describe(config.model), {}
    store = CheckpointStore(path / "checkpoints", CheckpointConfig(asynchronous=False))
    for step, metric in ((2, 1.0), (5, 3.0)):
        params[step] = jax.jit(description.init)(jax.random.key(step))
        state = {"step": jnp.int32(step), "params": params[step], "opt_state": ({"mu": jnp.ones(7)},)}
        assert store.save(step, state, {}, metric=metric)
    store.close()
    return path, description, params, config.sample


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "newest"], "newest is neither best nor last nor the number of a step"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_mistakes_in_the_options(run, capsys, arguments, message):
    assert message in refused(capsys, run[0], "a prompt", *arguments)


def test_no_run_directory_and_no_prompt(run, tmp_path, capsys):
    assert "is no run directory: it has no config.yaml" in refused(capsys, tmp_path, "a prompt")
    assert "the following arguments are required: PROMPT" in refused(capsys, run[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample.tokens=-3"], "sample.tokens=-3 must be 0 or more"),
        (["sample.tokens=many"], "sample.tokens='many' is str, but should be int"),
        (["mesh.fdsp=2"], "unknown mesh.fdsp; did you mean mesh.fsdp?"),
        (["mesh.fsdp=0"], "mesh.fsdp=0 is no number of devices"),
        (["mesh.fsdp=3"], "mesh 3 = 3 needs 3 devices, 1 found"),
        (["mesh.pipe=2", "runtime.cpu_devices=2"], "stages are for training"),
        (["runtime.cpu_devices=0"], "runtime.cpu_devices=0 is below 1"),
        (["runtime.platform=abacus"], "runtime.platform=abacus is unknown"),
        (["--step", "3"], "holds no checkpoint of step 3; there are: 2, 5"),
    ],
)
def test_mistakes_that_the_run_shows(run, arguments, message):
    code, out, err = command(run[0], "a prompt", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_run_without_a_checkpoint(run, tmp_path):
    (tmp_path / "config.yaml").write_text((run[0] / "config.yaml").read_text())
    code, out, err = command(tmp_path, "a prompt")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "holds no checkpoint" in err


@pytest.mark.parametrize(
    ("arguments", "step"),
    [([], 5), (["--step", "best"], 2), (["--step", "2", "mesh.fsdp=2", "mesh.tensor=2", "runtime.cpu_devices=4"], 2)],
)
def test_texts_come_from_the_checkpoint(run, arguments, step):
    path, description, params, sample = run
    code, out, err = command(path, "def f", "", "sample.tokens=9", "sample.seed=3", "sample.top_k=90", *arguments)
    assert (code, err) == (0, f"{path}: step {step}\n")
    tokenizer, sample = ByteTokenizer(), replace(sample, tokens=9, seed=3, top_k=90)
    prompts = [tokenizer.encode("def f").tolist(), [tokenizer.eos_id]]
    new = generate(description, params[step], prompts, sample, eos_id=tokenizer.eos_id)
    texts = [tokenizer.decode(np.array(prompt + ids)) for prompt, ids in zip(prompts, new, strict=True)]
    assert out == "\n\n".join(texts) + "\n"
