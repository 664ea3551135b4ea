"""Text from a run: python -m inference RUN_DIR "prompt" ["prompt 2" ...] [key=value ...]; --help says more.

Prompts with their continuations go to stdout, everything else to stderr. Exit codes: 0 done; 2 the user's mistake.
"""

import sys

from inference.options import BEST, GROUPS, NEWEST, parse
from runtime import leave
from runtime.exit_codes import MISTAKE

if __name__ == "__main__":
    leave.answer_signals()
    OPTIONS = parse(sys.argv[1:])  # before the slow imports: a typo is told in a fraction of a second

import argparse
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from checkpoint.store import CheckpointStore, Restored
from config.compose import load_run, overridden
from config.layout import model_requirements
from config.schema import Config
from data.tokenizer import load_tokenizer
from inference.detokenizer import after_prompt
from inference.generate import beyond_training, check, generate
from model.specs import Specs
from model.transformer import Description, describe
from parallel.mesh import MeshConfig, make_mesh, resolve
from runtime.config import RuntimeConfig
from runtime.start import start
from tracking.run_directory import RunDirectory
from training.state import has_vocabulary


def main(options: argparse.Namespace) -> int:
    """Generates what was asked for; returns the exit code."""
    try:
        texts = run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    print("\n\n".join(texts))
    return 0


def run(options: argparse.Namespace) -> list[str]:
    """Each prompt with its continuation. Raises ValueError or OSError for what the user can mend."""
    directory = RunDirectory(options.run)
    config = load_run(directory.path)
    alone = RuntimeConfig(compile_cache=config.runtime.compile_cache)  # one process, whatever trained the model
    config = overridden(replace(config, mesh=MeshConfig(), runtime=alone), options.overrides, GROUPS)
    sample = config.sample
    tokenizer = load_tokenizer(config.tokenizer, saved=directory.tokenizer)
    prompts = [tokenizer.encode(prompt).tolist() or [tokenizer.eos_id] for prompt in options.prompts]
    check(config.model, prompts, sample.tokens)
    if warning := beyond_training(config.model, config.train.seq_len, prompts, sample.tokens):
        print(f"warning: {warning}", file=sys.stderr)

    start(replace(config.runtime, coordinator=None, processes=1, process_id=-1))
    if config.mesh.pipe != 1:
        raise ValueError(f"mesh.pipe={config.mesh.pipe}: stages are for training; use data, fsdp, expert or tensor")
    mesh = make_mesh(resolve(config.mesh, jax.device_count(), model_requirements(config.model)))
    store = CheckpointStore(Path(config.checkpoint.dir or directory.path / "checkpoints"), config.checkpoint)
    with closing(store), jax.set_mesh(mesh):
        description = describe(config.model)
        restored = restore(store, options.step, abstract_params(config, description, mesh), description.specs)
        print(f"{directory.path}: step {restored.step}", file=sys.stderr)
        params, dtype = restored.state["params"], jnp.dtype(config.train.compute_dtype_on(jax.default_backend()))
        new = generate(description, params, prompts, sample, eos_id=tokenizer.eos_id, dtype=dtype)
    asked = zip(options.prompts, prompts, new, strict=True)
    return [text + after_prompt(tokenizer, text, prompt, ids) for text, prompt, ids in asked]


def abstract_params(config: Config, description: Description, mesh: Mesh) -> dict:
    """The part of a training state that generation needs, with its layout on the mesh."""
    dtype = jnp.dtype(config.train.param_dtype)
    leaf = lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, dtype, sharding=sharding)
    return {"params": jax.tree.map(leaf, description.shapes, description.shardings(mesh))}


def restore(store: CheckpointStore, step: str | int, abstract: dict, specs: Specs) -> Restored:
    """The newest intact checkpoint, or that of the step asked for and no other; ValueError if it is not there."""
    before = None
    if step != NEWEST:
        wanted = store.best() if step == BEST else step
        if wanted is None:
            raise ValueError(f"no checkpoint in {store.directory} has an evaluation, so none is best; use --step last")
        if wanted not in store.steps():
            there = ", ".join(map(str, store.steps())) or "none"
            raise ValueError(f"{store.directory} holds no checkpoint of step {wanted}; there are: {there}")
        before = wanted + 1
    restored = store.restore(abstract, before=before, resize=has_vocabulary(specs), part=True)
    if restored is None:
        raise ValueError(f"{store.directory} holds no checkpoint")
    if before is not None and restored.step != wanted:
        raise ValueError(f"the checkpoint of step {wanted} in {store.directory} is damaged")
    return restored


if __name__ == "__main__":
    sys.exit(main(OPTIONS))
