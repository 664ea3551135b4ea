"""Training steps that compilers have compiled: which, and what is kept of them in tests/golden/compiled/.

No JAX here: the planner's predictions are compared with what is kept, where no compiler is.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from config.compose import load
from config.layout import mesh_sizes
from parallel.config import schedule_for
from planner import compile
from planner.cost import Planner, Prediction
from planner.layout import layout_of
from planner.machine import open_machine
from planner.software import program

FOLDER = Path(__file__).parents[1] / "golden" / "compiled"
LLAMA = ("model=llama_1b", "model.layers=8", "model.vocab_size=32768", "train.seq_len=2048", "train.batch_size=64")
GPT2 = ("model=gpt2_124m", "model.scan_layers=true", "train.seq_len=1024", "train.batch_size=128")
EXPERTS = (
    *("model=moe_nano", "model.layers=8", "model.width=1024", "model.heads=8", "model.kv_heads=8"),
    *("model.head_dim=128", "model.ffn=2048", "model.vocab_size=32768", "model.scan_layers=true"),
    *("train.seq_len=2048", "train.batch_size=32"),
)
# fits a test that compiles it: eight simulated devices, a few seconds
SMALL = (
    *("model.layers=4", "model.width=128", "model.heads=4", "model.kv_heads=4", "model.head_dim=32", "model.ffn=256"),
    *("model.vocab_size=512", "model.scan_layers=true", "train.seq_len=128", "train.batch_size=16"),
)


@dataclass(frozen=True)
class Case:
    """One step: a model on a mesh of a machine of planner/machines/."""

    hardware: str
    devices: int
    model: tuple[str, ...]
    mesh: dict[str, int]
    more: tuple[str, ...] = ()
    guarded: bool = False  # its collectives and memory are held: make test-aot fails where they change

    @property
    def settings(self) -> list[str]:
        """As after `python train.py`."""
        axes = [f"mesh.{axis}={size}" for axis, size in ({"fsdp": 1} | self.mesh).items()]
        return [*self.model, "optimizer=adamw", *axes, *self.more]

    @cached_property
    def planner(self) -> Planner:
        """Of its model and machine, with the factors of data sheets."""
        machine = open_machine(self.hardware, calibrated=False)
        return Planner(load(self.settings), machine, self.devices, program("isomesh", machine.platform))

    @property
    def platform(self) -> str:
        """cpu, gpu or tpu."""
        return self.planner.machine.platform

    def predicted(self) -> Prediction:
        """What the planner says of it."""
        config = self.planner.config
        sizes = mesh_sizes(config, self.devices)
        schedule = schedule_for(config.pipeline, config.train.batch_size // config.train.grad_accumulation, sizes)
        return self.planner.predict(layout_of(config, sizes, schedule and schedule.microbatches))

    def question(self) -> dict:
        """What planner.compiled_step is asked."""
        return compile.question(self.planner, self.settings)


def _remat(policy: str, *more: str) -> tuple[str, ...]:
    return (f"train.remat={policy}", *more)


CASES = {
    "cpu-fsdp-tensor": Case("cpu", 8, SMALL, {"fsdp": 4, "tensor": 2}, _remat("full"), guarded=True),
    "cpu-pipe": Case("cpu", 8, SMALL, {"pipe": 2, "fsdp": 2, "data": 2}, _remat("none"), guarded=True),
    "h200-fsdp": Case("h200", 8, LLAMA, {"fsdp": 8}, _remat("none"), guarded=True),
    "h200-fsdp-full": Case("h200", 8, LLAMA, {"fsdp": 8}, _remat("full")),
    "h200-unrolled": Case("h200", 8, LLAMA, {"fsdp": 8}, _remat("full", "model.scan_layers=false"), guarded=True),
    "h200-unrolled-tensor": Case("h200", 8, LLAMA, {"fsdp": 4, "tensor": 2}, _remat("full", "model.scan_layers=false")),
    "h200-fsdp-dots": Case("h200", 8, LLAMA, {"data": 2, "fsdp": 4}, _remat("dots")),
    "h200-parts": Case("h200", 8, LLAMA, {"fsdp": 8}, _remat("full", "train.grad_accumulation=2")),
    "h200-tensor": Case("h200", 8, LLAMA, {"fsdp": 4, "tensor": 2}, _remat("full")),
    "h200-context": Case("h200", 8, LLAMA, {"fsdp": 2, "context": 4}, _remat("full", "train.seq_len=8192")),
    "h200-pipe": Case("h200", 8, LLAMA, {"pipe": 2, "fsdp": 4}, _remat("full"), guarded=True),
    "h200-pipe-tensor": Case(
        "h200", 8, LLAMA, {"pipe": 4, "tensor": 2}, _remat("full", "pipeline.schedule=1f1b", "train.batch_size=32")
    ),
    "h100-data": Case("h100", 8, GPT2, {"data": 8}, _remat("none")),
    "h100-hosts": Case("h100", 64, GPT2, {"data": 8, "fsdp": 8}, _remat("attention", "train.batch_size=1024")),
    "h200-experts": Case("h200", 8, EXPERTS, {"expert": 8}, _remat("full")),
    "v5e-fsdp": Case("v5e", 16, GPT2, {"fsdp": 16}, _remat("none"), guarded=True),
    "v5e-fsdp-full": Case("v5e", 16, LLAMA, {"fsdp": 16}, _remat("full")),
    "v5e-tensor": Case("v5e", 16, LLAMA, {"fsdp": 4, "tensor": 4}, _remat("full")),
    "v5p-pipe": Case("v5p", 8, LLAMA, {"pipe": 2, "fsdp": 4}, _remat("full")),
    "v5p-pipe-1f1b": Case("v5p", 8, LLAMA, {"pipe": 2, "fsdp": 4}, _remat("full", "pipeline.schedule=1f1b")),
    "v5p-pipe-deep": Case("v5p", 8, LLAMA, {"pipe": 4, "fsdp": 2}, _remat("full")),
    "v5p-context": Case("v5p", 8, LLAMA, {"fsdp": 2, "context": 4}, _remat("full", "train.seq_len=8192"), guarded=True),
    "v6e-data": Case("v6e", 8, GPT2, {"data": 8}, _remat("none")),
    "v6e-dots": Case("v6e", 16, LLAMA, {"data": 4, "fsdp": 4}, _remat("dots")),
    # compiled when the arithmetic was done
    "h200-data-tensor": Case("h200", 8, LLAMA, {"data": 2, "tensor": 4}, _remat("none")),
    "h200-pipe-data": Case("h200", 8, LLAMA, {"pipe": 2, "data": 2, "tensor": 2}, _remat("dots"), guarded=True),
    "h100-context": Case(
        "h100", 8, LLAMA, {"fsdp": 4, "context": 2}, _remat("full", "train.seq_len=16384", "train.batch_size=16")
    ),
    "v5e-context": Case(
        "v5e", 16, LLAMA, {"fsdp": 4, "context": 4}, _remat("full", "train.seq_len=8192", "train.batch_size=32")
    ),
    "v6e-pipe": Case("v6e", 16, LLAMA, {"pipe": 4, "fsdp": 4}, _remat("dots", "train.batch_size=128")),
}


def kept(name: str) -> dict | None:
    """What a compiler said of a case; None where it has not been asked yet."""
    file = FOLDER / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else None
