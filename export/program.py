"""A model as a program of JAX: StableHLO for every platform, any batch and any length, with its weights beside it.

FOLDER/program.bin           the forward pass (jax.export), of weights and tokens (B, T)
FOLDER/weights.safetensors   the weights by their paths, in the dtypes that they are kept in
FOLDER/tokenizer.json        for programs that have texts
FOLDER/manifest.json         versions, shapes, a digest of every file and of itself

JAX reads programs of older versions for at least six months (docs.jax.dev, export, compatibility).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import export as jax_export

from checkpoint.digests import find_damage, read_manifest, seal, write_manifest
from checkpoint.huggingface.safetensors import Safetensors, write_header
from export.weights import outputs, portable
from inference.generate import exact_matmuls
from model.config import ModelConfig
from model.specs import leaves
from model.transformer import describe
from parallel.mesh import portable_mesh

PLATFORMS = ("cpu", "cuda", "tpu")
FORMAT = 1
PROGRAM, WEIGHTS, TOKENIZER = "program.bin", "weights.safetensors", "tokenizer.json"


@dataclass(frozen=True)
class Program:
    """A forward pass without the code that it was made of."""

    exported: jax_export.Exported
    params: dict[str, jax.Array]
    about: dict[str, Any] = field(repr=False)  # the body of the manifest

    @cached_property
    def _run(self):
        return jax.jit(self.exported.call)

    def __call__(self, tokens_BT: np.ndarray) -> jax.Array:
        """What the model says of tokens, of any batch and length: `about["output"]` tells its dims. Float32."""
        return self._run(self.params, jnp.asarray(tokens_BT, jnp.int32))


def save(folder: Path, config: ModelConfig, params: dict, dtype: Any, tokenizer: str, about: dict[str, Any]) -> None:
    """Fills a folder with the program of a model, from plain parameters.

    dtype: of matmuls and activations. tokenizer: the text of its tokenizer.json. about: what else the manifest says.
    """
    with jax.sharding.use_abstract_mesh(portable_mesh()):
        description = describe(portable(config))
    flat = dict(_flat(params, [path for path, _ in leaves(description.specs)]))
    batch, length = jax_export.symbolic_shape("batch, length")

    def forward(flat: dict[str, jax.Array], tokens_BT: jax.Array) -> jax.Array:
        with jax.sharding.use_abstract_mesh(portable_mesh()), exact_matmuls(dtype):
            return outputs(description.bind(_nested(flat)), tokens_BT, dtype)

    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in flat.items()}
    tokens_BT = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    exported = jax_export.export(jax.jit(forward), platforms=PLATFORMS)(shapes, tokens_BT)
    (folder / PROGRAM).write_bytes(exported.serialize())
    with (folder / WEIGHTS).open("wb") as file:
        write_header(file, {name: (np.dtype(value.dtype), value.shape) for name, value in flat.items()})
        for value in flat.values():
            file.write(np.asarray(jax.device_get(value)).tobytes())
    (folder / TOKENIZER).write_text(tokenizer)
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "flax": flax.__version__}
    calling = {"calling_convention": exported.calling_convention_version, "platforms": list(exported.platforms)}
    body = {"format": FORMAT, "versions": versions, **calling, "dtype": str(jnp.dtype(dtype))}
    body |= {"input": "int32 (batch, length)", "output": str(exported.out_avals[0])}
    write_manifest(folder, {**body, **about, "files": seal(folder)})


def load(path: str | Path) -> Program:
    """The program in a folder, with its weights on the default device. Raises ValueError for a damaged folder."""
    path = Path(path)
    try:
        body = read_manifest(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if body.get("format") != FORMAT:
        raise ValueError(f"{path} is of format {body.get('format')}, and this code reads {FORMAT}: use its version")
    if damage := find_damage(path, body["files"], contents=True):
        raise ValueError(f"{path} is damaged: {', '.join(damage)}")
    weights = Safetensors(path / WEIGHTS)
    try:
        exported = jax_export.deserialize(bytearray((path / PROGRAM).read_bytes()))
    except Exception as error:  # what a version that is too old says of it has many kinds
        made, here = body["versions"]["jax"], jax.__version__
        raise ValueError(f"{path}: made by JAX {made}, not read by {here}: {' '.join(str(error).split())}") from None
    params = {name: jnp.asarray(weights.tensor(name)) for name in sorted(weights.names())}
    return Program(exported, params, body)


def _flat(params: dict, paths: list[tuple[str, ...]]) -> Iterator[tuple[str, jax.Array]]:
    for path in paths:
        value: Any = params
        for name in path:
            value = value[name]
        yield "/".join(path), value


def _nested(flat: dict[str, jax.Array]) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        branch = tree
        for name in parents:
            branch = branch.setdefault(name, {})
        branch[last] = value
    return tree
