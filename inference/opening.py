"""A trained model as programs use it: found by its path, its parameters on a mesh, its tokenizer beside them."""

import contextlib
import hashlib
import logging
import re
import shutil
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from checkpoint.config import BEST, NEWEST
from checkpoint.digests import MANIFEST
from checkpoint.huggingface.load import load as load_pretrained
from checkpoint.huggingface.opened import SMALL_FILES, open_pretrained
from checkpoint.store import CheckpointStore, Restored
from compress.folder import read_forms
from config.compose import load, load_run, overridden
from config.layout import model_requirements
from config.pretrained import FROM
from config.schema import Config
from data.chat import ChatTemplate, open_chat
from data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer
from finetune.adapters.adaptation import Adaptation, adaptation
from finetune.adapters.base import begun, in_base_forms
from inference.generate import reach_of
from inference.options import GROUPS
from model.config import MASKED_LM, ModelConfig
from model.forms import Forms
from model.specs import HEAD, Specs, map_specs, parameter_specs
from model.transformer import Description, describe
from parallel.mesh import MeshConfig, make_mesh, resolve
from runtime.config import RuntimeConfig
from runtime.start import start
from tracking.run_directory import RunDirectory
from training.job import Job
from training.state import TrainState, has_vocabulary, init_key
from training.trainable import chosen, joined

log = logging.getLogger("isomesh.model")


@dataclass(frozen=True)
class Opened:
    """A model with its parameters on `mesh`; what is computed with it runs inside `jax.set_mesh(opened.mesh)`."""

    path: Path
    config: Config
    tokenizer: Tokenizer
    mesh: Mesh
    description: Description
    params: dict
    dtype: jnp.dtype  # of matmuls and activations
    step: int | None  # of training; None where the model's file does not say
    digest: str  # sha256 that tells these weights from others


@dataclass(frozen=True)
class Found:
    """What is known of a model before JAX has started and any array is read."""

    path: Path
    config: Config  # its mesh and runtime are those of this program, not of the training
    tokenizer: Tokenizer
    begin: tuple[int, ...] = ()  # tokens that the model wants before every text
    frame: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # those around a text that it reads whole
    forms: Forms = field(default_factory=dict)  # of its parameters, where it is compressed or has adapters

    @property
    def reach(self) -> int:
        """Tokens of the longest sequence that the model was made for."""
        return reach_of(self.config.model, self.config.train.seq_len)

    def open(self, step: str | int = NEWEST) -> Opened:
        """Starts JAX, makes the mesh and reads the parameters onto it.

        step: of a run its checkpoint: last, best or a number. Raises ValueError or OSError for what the user can mend.
        """
        config = self.config
        start(replace(config.runtime, coordinator=None, processes=1, process_id=-1))
        if config.mesh.pipe != 1:
            raise ValueError(f"mesh.pipe={config.mesh.pipe}: stages are for training; use data, fsdp, expert or tensor")
        mesh = make_mesh(resolve(config.mesh, jax.device_count(), model_requirements(config.model)))
        with jax.set_mesh(mesh):
            description = describe(config.model, forms=self.forms)
            read = read_weights(self.path, description, mesh, jnp.dtype(config.train.param_dtype), step)
        dtype = jnp.dtype(config.train.compute_dtype_on(jax.default_backend()))
        shared = self.path, config, self.tokenizer, mesh, description
        return Opened(*shared, read.params, dtype, read.step, read.digest)


def find_model(path: str | Path, overrides: Sequence[str] = (), groups: tuple[str, ...] = GROUPS) -> Found:
    """The model of a run directory, a Hugging Face folder or a .gguf file.

    overrides: key=value for keys of these groups of its settings. Raises ValueError or OSError for what the user can
    mend.
    """
    directory = RunDirectory(Path(path))
    if directory.config.exists():
        config = load_run(directory.path)
    else:
        opened = open_pretrained(path)
        config = load([f"{FROM}={opened.path}"])
        config = replace(config, train=replace(config.train, seq_len=opened.length))
        directory = RunDirectory(opened.path)
    alone = RuntimeConfig(compile_cache=config.runtime.compile_cache)  # one process, whatever trained the model
    config = overridden(replace(config, mesh=MeshConfig(), runtime=alone), list(overrides), groups)
    tokenizer = load_tokenizer(config.tokenizer, saved=directory.tokenizer)
    trained_here = directory.config.exists() and not directory.imported.exists()  # runs are trained without
    begin = () if trained_here else tuple(tokenizer.begin_ids)
    before, behind = tuple(tokenizer.begin_ids), tuple(tokenizer.end_ids)
    if trained_here and config.task is None:  # a task's texts have them in training, too
        before, behind = (), () if config.model.causal else behind
    adapts = adaptation(config.adapter, config.model, config.train.steps)
    forms = read_forms(directory.path) if adapts is None else adapts.forms
    return Found(directory.path, config, tokenizer, begin, (before, behind), forms)


def open_model(path: str | Path, overrides: Sequence[str] = (), step: str | int = NEWEST) -> Opened:
    """`find_model` and `Found.open` in one."""
    return find_model(path, overrides).open(step)


class Weights(NamedTuple):
    """Parameters, the step of training that they are of, and what tells them from others."""

    params: dict
    step: int | None
    digest: str


def read_weights(
    path: Path, description: Description, mesh: Mesh, dtype: jnp.dtype, step: str | int = NEWEST
) -> Weights:
    """The parameters of what lies at a path, straight onto the mesh. `description` is of what they are there.

    step: of a run its checkpoint: last, best or a number. Raises ValueError or OSError for what the user can mend.
    """
    if not RunDirectory(path).config.exists():
        opened = open_pretrained(path)
        return Weights(load_pretrained(opened, description, mesh, dtype), None, opened.fingerprint())
    config = load_run(path)
    adapts = adaptation_of(config)
    if adapts is not None and not adapts.whole:
        return _read_adapted(path, config, adapts, description, mesh, dtype, step)
    if read_forms(path) and not description.forms:
        raise ValueError(f"{path} is compressed, and codes are not trained: begin from what it was made of")
    stored = jnp.dtype(config.train.param_dtype)
    with closing(CheckpointStore(Path(config.checkpoint.dir or path / "checkpoints"), config.checkpoint)) as store:
        restored = restore(store, step, abstract_params(stored, description, mesh), description.specs)
    params = restored.state["params"]
    if stored != dtype:
        own = map_specs(lambda spec: spec.dtype is not None, description.specs)
        params = jax.tree.map(lambda p, own: p if own else p.astype(dtype), params, own)
    return Weights(params, restored.step, _digest(restored))


def _read_adapted(
    path: Path, config: Config, adapts: Adaptation, description: Description, mesh: Mesh, dtype, step: str | int
) -> Weights:
    """As `read_weights`, of a run whose checkpoints hold adapters alone."""
    if adapts.forms and not description.forms:
        raise ValueError(f"{path} holds adapters: make a whole model of them with python -m finetune merge {path} OUT")
    base = read_base(config, adapts, mesh, dtype)
    trained = read_trained(path, config, adapts, description, mesh, step)
    params = jax.tree.map(lambda p: p.astype(dtype), trained.params)
    digest = hashlib.sha256(f"{base.digest} {trained.digest}".encode()).hexdigest()
    return Weights(joined(base.params, params), trained.step, digest)


def read_trained(
    path: Path, config: Config, adapts: Adaptation, description: Description, mesh: Mesh, step: str | int = NEWEST
) -> Weights:
    """What the checkpoints of a run with adapters hold. `description` is that of its model with them. Raises as
    `read_weights`.
    """
    wanted = abstract_params(jnp.dtype(config.train.param_dtype), description, mesh)["params"]
    with closing(CheckpointStore(Path(config.checkpoint.dir or path / "checkpoints"), config.checkpoint)) as store:
        restored = restore(store, step, {"params": chosen(wanted, adapts.trainable)}, description.specs)
    return Weights(restored.state["params"], restored.step, _digest(restored))


def read_base(config: Config, adapts: Adaptation, mesh: Mesh, dtype: jnp.dtype) -> Weights:
    """The parameters that a run's adapters stand on, with its layers in the model's order: those of weights.path, or
    drawn from the seed where it has none. Raises ValueError for others than the run began with.
    """
    description, path = describe(config.model), config.weights.path
    if path is None:
        draw = lambda: jax.tree.map(lambda p: p.astype(dtype), description.init(init_key(config.seed)))
        read = Weights(jax.jit(draw, out_shardings=description.shardings(mesh))(), None, f"seed {config.seed}")
    else:
        description = without(description, new_head(config))  # which is among what was trained
        read = read_weights(Path(path), description, mesh, dtype)
        asked = config.weights.digest or read.digest
        if not read.digest.startswith(asked):
            raise ValueError(
                f"{path} holds other weights (digest {read.digest[:8]}) than those that the adapters were trained on "
                f"({asked[:8]}): adapters fit no other base"
            )
    return read._replace(params=in_base_forms(adapts, description, read.params, mesh))


def first_state(job: Job, config: Config) -> TrainState:
    """The state that a run begins with: its weights where it has some, and what they lack as it was drawn. Raises as
    `read_weights`.
    """
    adapts, state, path = adaptation_of(config), job.init(config.seed), config.weights.path
    dtype, new = jnp.dtype(config.train.param_dtype), new_head(config)
    if new:
        there = labels_at(path) if "head_labels" in new else ()
        of = f" (that of {path} is for {_few(there)})" if there else ""
        log.info("new in this model: %s%s", ", ".join(sorted(new)), of)
    if adapts is None or adapts.whole:
        if path is None:
            return state
        read = read_weights(Path(path), without(job.stored_description, new), job.mesh, dtype).params
        return replace(state, params=job.from_stored(joined(job.to_stored(state.params), read) if new else read))
    base = job.from_stored(read_base(config, adapts, job.mesh, dtype).params)
    return replace(state, params=begun(job.description, joined(state.params, base), job.mesh))


def resumed_state(job: Job, config: Config, saved: dict) -> TrainState:
    """The state of a run's checkpoint. Raises as `read_weights`."""
    adapts = adaptation_of(config)
    if adapts is None or adapts.whole:
        return job.from_saved(saved, {})
    base = job.from_stored(read_base(config, adapts, job.mesh, jnp.dtype(config.train.param_dtype)).params)
    return job.from_saved(saved, base)


def adaptation_of(config: Config) -> Adaptation | None:
    """What a run trains, the head that its weights lack included; None where it has no adapter. Raises as
    `config_at`.
    """
    new = () if config.adapter.kind in ("none", "qat") else new_head(config)
    return adaptation(config.adapter, config.model, config.train.steps, new)


def config_at(path: str | Path) -> ModelConfig:
    """The model that lies at a path. Raises ValueError where there is none."""
    return load_run(path).model if RunDirectory(Path(path)).config.exists() else open_pretrained(path).config


def new_head(config: Config) -> tuple[str, ...]:
    """The branches of a run's head that its weights lack, or have for other labels. Raises as `config_at`.

    A pooler is what a head of classes begins with.
    """
    path, model = config.weights.path, config.model
    if path is None:
        return ()
    there = config_at(path)
    heads, theirs = {model.head, there.head}, parameter_specs(there)
    if len(heads) == 1 and model.labels == there.labels and not _renamed(config):
        return ()
    kept = {"head_dense"} if heads <= {"pooler", "classes"} else set()
    kept |= {"head"} if heads <= {"vocabulary", *MASKED_LM} else set()
    return tuple(name for name in parameter_specs(model) if name in HEAD and not (name in kept and name in theirs))


def labels_at(path: str | Path) -> tuple[str, ...]:
    """The labels of the head that lies at a path, in its order; none where it has none, or nobody has named them.

    Raises as `config_at`.
    """
    if RunDirectory(Path(path)).config.exists():
        task = load_run(path).task
        return () if task is None else task.labels
    opened = open_pretrained(path)
    names = _written_labels(opened.json, opened.config.labels or 0)
    return () if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def _renamed(config: Config) -> bool:
    """Whether the weights of a run tell other labels apart than its task, or have them in another order."""
    if config.task is None or config.model.head == "span" or config.model.labels == 1:  # names of these say nothing
        return False
    there = labels_at(config.weights.path)
    return bool(there) and there != config.task.labels


def _written_labels(written: dict, count: int) -> tuple[str, ...]:
    """The names of a published model's labels, by its config.json."""
    names = {int(number): str(name) for number, name in (written.get("id2label") or {}).items()}
    return tuple(names.get(number, f"LABEL_{number}") for number in range(count))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def without(description: Description, branches: Collection[str]) -> Description:
    """The description without these branches of its parameters."""
    return replace(description, specs={name: at for name, at in description.specs.items() if name not in branches})


def keep_pretrained(path: str | None, run: RunDirectory) -> None:
    """Keeps in a run's directory what goes with the weights at a path: config, tokenizer, chat template."""
    if path is None:
        return
    source = RunDirectory(Path(path))
    source = source.pretrained if source.config.exists() else source.path
    kept = run.pretrained
    kept.mkdir(parents=True, exist_ok=True)
    for name in SMALL_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, kept / name)
    if source.is_file():  # a .gguf file has all in itself
        tokenizer = load_tokenizer(TokenizerConfig("file", path=str(source)))
        tokenizer.save(kept / "tokenizer.json")
        with contextlib.suppress(ValueError):  # it has no chat template
            open_chat(source, tokenizer).save(kept)


def classes_of(found: Found) -> tuple[tuple[str, ...], str] | None:
    """The names of a model's classes, and what they are: one | several | regression. None without a head of classes."""
    task, model = found.config.task, found.config.model
    if model.head != "classes":
        return None
    if task is not None:
        return task.labels, task.options.get("kind", "one")
    written = open_pretrained(found.path).json
    names = _written_labels(written, model.labels)
    problem = written.get("problem_type") or ("regression" if model.labels == 1 else "")
    kinds = {"multi_label_classification": "several", "regression": "regression"}
    return names, kinds.get(problem, "one")


def chat_of(path: Path) -> ChatTemplate:
    """The chat template of the model at a path. Raises ValueError where it has none."""
    directory = RunDirectory(path)
    if directory.config.exists() and not directory.pretrained.exists():
        raise ValueError(f"{path} has no chat template: it did not begin from a published model")
    return open_chat(directory.pretrained if directory.config.exists() else path)


def abstract_params(dtype: jnp.dtype, description: Description, mesh: Mesh) -> dict:
    """The part of a training state that a model's user needs, with its layout on the mesh."""
    stored = map_specs(lambda spec: spec.dtype or dtype, description.specs)
    leaf = lambda shape, sharding, dtype: jax.ShapeDtypeStruct(shape.shape, dtype, sharding=sharding)
    return {"params": jax.tree.map(leaf, description.shapes, description.shardings(mesh), stored)}


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


def _digest(restored: Restored) -> str:
    """Of the manifest, which has a digest of every file of the checkpoint."""
    return hashlib.sha256((restored.directory / f"{restored.step:08d}" / MANIFEST).read_bytes()).hexdigest()
