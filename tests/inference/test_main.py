"""The command: mistakes are one line and exit code 2; texts come from a checkpoint's parameters alone."""

import codecs
import os
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tokenizers_of_all_kinds import byte_fallback

from checkpoint.config import CheckpointConfig
from checkpoint.store import CheckpointStore
from config.compose import to_yaml
from config.schema import Config, finish
from data.tokenizer import ByteTokenizer, TokenizerConfig
from inference import options
from inference.__main__ import main
from inference.config import SampleConfig
from inference.generate import continuations, generate
from model.config import ModelConfig
from model.transformer import describe

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelConfig(layers=1, width=16, heads=2, kv_heads=2, head_dim=8, ffn=16, vocab_multiple=16)


def command(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code and what was printed, of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "inference", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def here(capsys, *arguments) -> tuple[int, str, str]:
    """The same in this process, which has eight devices already."""
    words = [str(argument) for argument in arguments]
    if not any("runtime.cpu_devices" in word for word in words):
        words.append(f"runtime.cpu_devices={jax.device_count()}")
    code = main(options.parse(words))
    return code, *capsys.readouterr()


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
        (["sampel.tokens=20"], "sampel.tokens=20 is no setting of generation (sample.*, mesh.*, runtime.*)"),
        (["train.steps=5"], "train.steps=5 is no setting of generation"),
        (["--step", "newest"], "newest is neither best nor last nor the number of a step"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_mistakes_in_the_options(run, capsys, arguments, message):
    assert message in refused(capsys, run[0], "a prompt", *arguments)


def test_no_run_directory_and_no_prompt(run, tmp_path, capsys):
    assert "is no run directory: it has no config.yaml" in refused(capsys, tmp_path, "a prompt")
    assert "the following arguments are required: PROMPT" in refused(capsys, run[0])


def test_a_prompt_that_looks_like_an_option(run, capsys):
    for arguments in (["-x"], ["a prompt", "-x"]):
        assert 'behind --, as in MODEL -- "-x"' in refused(capsys, run[0], *arguments)
    assert options.parse([str(run[0]), "sample.tokens=9", "--", "-x", "--y"]).prompts == ["-x", "--y"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample.tokens=-3"], "sample.tokens=-3 must be 0 or more"),
        (["sample.tokens=many"], "sample.tokens='many' is str, but should be int"),
        (["mesh.fdsp=2"], "unknown mesh.fdsp; did you mean mesh.fsdp?"),
        (["mesh.fsdp=0"], "mesh.fsdp=0 is no number of devices"),
        (["mesh.fsdp=9"], "mesh 9 = 9 needs 9 devices, 8 found"),
        (["mesh.pipe=2"], "stages are for training"),
        (["runtime.cpu_devices=0"], "runtime.cpu_devices=0 is below 1"),
        (["runtime.platform=abacus"], "runtime.platform=abacus is unknown"),
        (["--step", "3"], "holds no checkpoint of step 3; there are: 2, 5"),
    ],
)
def test_mistakes_that_the_run_shows(run, capsys, arguments, message):
    code, out, err = here(capsys, run[0], "a prompt", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_run_without_a_checkpoint(run, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((run[0] / "config.yaml").read_text())
    code, out, err = here(capsys, tmp_path, "a prompt")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "holds no checkpoint" in err


ONE = ("mesh.data=1",)


@pytest.mark.parametrize(
    ("arguments", "step", "started"),
    [
        (ONE, 5, here),
        (["--step", "best", *ONE], 2, here),
        (
            ["--step", "2", "mesh.fsdp=2", "mesh.tensor=2", "runtime.cpu_devices=4"],
            2,
            command,
        ),
    ],
)
def test_texts_come_from_the_checkpoint(run, capsys, arguments, step, started):
    path, description, params, sample = run
    asked = ("def f", "", "sample.tokens=9", "sample.seed=3", "sample.top_k=90")
    code, out, err = started(capsys, path, *asked, *arguments)
    assert (code, err) == (0, f"{path}: step {step}\n")
    tokenizer, sample = ByteTokenizer(), replace(sample, tokens=9, seed=3, top_k=90)
    prompts = [tokenizer.encode("def f").tolist(), [tokenizer.eos_id]]
    new = generate(description, params[step], prompts, sample, eos_id=tokenizer.eos_id)
    # a half character at the end is not printed
    spelled = lambda ids: codecs.getincrementaldecoder("utf-8")("replace").decode(bytes(filter(None, ids)))
    texts = [spelled(prompt + ids) for prompt, ids in zip(prompts, new, strict=True)]
    assert out == "\n\n".join(texts) + "\n"


def test_the_command_prints_what_samples_hold(tmp_path, capsys):
    """With a tokenizer whose words hold the space before them; and a prompt far beyond the trained length is told."""
    tokenizer = byte_fallback()
    tokenizer.save(tmp_path / "tokenizer.json")
    model = replace(MODEL, vocab_size=tokenizer.vocab_size)
    config = finish(
        Config(
            model=model,
            tokenizer=TokenizerConfig("file", path=str(tmp_path / "tokenizer.json")),
            train=replace(Config().train, seq_len=16),
            sample=SampleConfig(prompts=("the cat", "at ", ""), tokens=14),
            runtime=replace(Config().runtime, compile_cache=str(tmp_path / "cache")),
        )
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    description = describe(config.model)
    params = jax.jit(description.init)(jax.random.key(0))
    with closing(CheckpointStore(tmp_path / "checkpoints", CheckpointConfig(asynchronous=False))) as store:
        assert store.save(1, {"params": params}, {})
    samples = continuations(description, params, tokenizer, config.sample, "float32")
    code, out, err = here(capsys, tmp_path, *config.sample.prompts, *ONE)
    assert (code, out) == (0, "\n\n".join(prompt + text for prompt, text in samples) + "\n")
    longest = max(len(tokenizer.encode(prompt)) for prompt in config.sample.prompts)
    told, _ = err.splitlines()
    assert told == (
        f"warning: {longest} prompt tokens + 14 new ones = {longest + 14} go beyond the 16 that the model was trained "
        "on: expect worse text there"
    )
