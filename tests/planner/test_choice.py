"""mesh=auto: a legal layout for the devices at hand that changes no number; and what a run says of its prediction."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import pytest

from config import compose
from config.layout import mesh_sizes
from config.schema import identity
from parallel.mesh import make_mesh
from planner.choice import forecast, planned


@dataclass(frozen=True)
class Device:
    """What a choice reads of a jax device."""

    device_kind: str
    bytes_limit: float | None = None

    def memory_stats(self) -> dict | None:
        """As an accelerator's."""
        return {"bytes_limit": self.bytes_limit}


LLAMA = ["model=llama3_8b", "optimizer=adamw", "train.seq_len=8192", "train.batch_size=64", "mesh=auto"]


@pytest.mark.parametrize(
    "words", [["model.layers=8"], ["model=moe_nano"], ["mesh.tensor=2"], ["mesh.pipe=4", "train.remat=full"]]
)
def test_the_choice_is_legal_and_changes_no_number(words):
    config = compose.load(["mesh=auto", *words])
    chosen = planned(config, jax.devices())
    sizes = mesh_sizes(chosen, len(jax.devices()))
    assert math.prod(sizes.values()) == 8
    assert identity(chosen) == identity(config)
    for word in words:
        key, _, value = word.partition("=")
        if key.startswith("mesh."):
            assert sizes[key.removeprefix("mesh.")] == int(value)
    assert chosen.train.remat == "full" or config.train.remat == "none"


def test_without_auto_nothing_is_chosen():
    config = compose.load([])
    assert planned(config, jax.devices()) is config


def test_memory_decides_what_is_chosen():
    config = compose.load(LLAMA)
    roomy, tight = (planned(config, [Device("NVIDIA H200", limit)] * 8) for limit in (140e9, 40e9))
    assert (tight.train.remat, tight.train.grad_accumulation) != (roomy.train.remat, roomy.train.grad_accumulation)


@pytest.mark.parametrize(
    ("device", "said"),
    [(Device("abacus"), "no machine is known for abacus"), (Device("NVIDIA H200", 1e9), "fits .the smallest needs")],
)
def test_what_cannot_be_chosen_is_said(device, said):
    with pytest.raises(ValueError, match=said):
        planned(compose.load(LLAMA), [device] * 8)


def test_a_run_says_what_was_predicted():
    config = compose.load(["mesh=auto", "train.compute_dtype=float32"])
    chosen = planned(config, jax.devices())
    mesh = make_mesh(mesh_sizes(chosen, 8))
    memory = SimpleNamespace(argument_size_in_bytes=1e9, temp_size_in_bytes=2e9)
    facts, read = forecast(chosen, mesh, memory, {"data": "text"}, lambda step: {"epoch": step / 10})
    assert facts["data"] == "text"
    assert facts["predicted"].startswith("mesh=auto: ")
    metrics = read(5)
    assert (metrics["epoch"], metrics["perf/memory_gb"]) == (0.5, 3.0)
    assert metrics["perf/predicted_step_ms"] > 0
    assert metrics["perf/predicted_memory_gb"] > 0
