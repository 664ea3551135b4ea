"""Machines as data: files, what is wrong with them, and how a mesh lies on a network."""

import math

import pytest

from performance.hardware import CHIPS
from planner.machine import FOLDER, known, lines, machine_of, open_machine, torus_dims

MINE = """
name: a machine of mine
kind: mine
platform: gpu
source: measured
peak_tflops: {bfloat16: 100}
memory_gib: 10
memory_gb_s: 1000
exponentials_tera_s: 1
domain: 4
inside: {gb_s: 100}
across: {gb_s: 10}
price_per_hour: 2.5
"""


@pytest.mark.parametrize("name", known())
def test_every_machine_has_a_source_and_the_peaks_that_mfu_is_measured_against(name):
    machine = open_machine(name)
    assert machine.source
    chip = next((c for c in CHIPS if c.kind.strip("^$") in (machine.kind.strip("^$"), rf"\b{machine.kind}\b")), None)
    if chip is not None:
        assert machine.peak("bfloat16") == pytest.approx(1e12 * chip.bfloat16)


def test_a_machine_of_the_users_is_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text(MINE)
    machine = open_machine(str(tmp_path / "mine.yaml"))
    assert (machine.price_per_hour, machine.limit) == (2.5, 0.92 * 10 * 2**30)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("platform: gpu", "platform: abacus", "platform=abacus is not one of cpu, gpu, tpu"),
        ("domain: 4", "domian: 4", "did you mean domain"),
        ("memory_gib: 10", "memory_gib: lots", "should be float"),
        ("memory_gib: 10", "memory_gib: 0", "must be above 0"),
        ("{bfloat16: 100}", "{int3: 100}", "peak_tflops"),
        ("name: a machine of mine", "name: [", "mine.yaml"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path, old, new, said):
    (tmp_path / "mine.yaml").write_text(MINE.replace(old, new))
    with pytest.raises(ValueError, match=said) as error:
        open_machine(str(tmp_path / "mine.yaml"))
    assert "\n" not in str(error.value)


def test_an_unknown_machine_is_told_with_the_known_ones():
    with pytest.raises(ValueError, match="no such machine; use one of a100, b200") as error:
        open_machine("tpu")
    assert all(file.stem in str(error.value) for file in FOLDER.glob("*.yaml"))


def test_devices_are_found_by_what_jax_calls_them():
    assert machine_of("NVIDIA H200").name.startswith("NVIDIA H200")
    assert machine_of("TPU v5p").name == "TPU v5p"
    assert machine_of("TPU v5 lite").name == "TPU v5e"
    assert machine_of("abacus") is None


def axes(**sizes: int) -> dict[str, int]:
    """All six, outermost first."""
    return dict.fromkeys(("pipe", "data", "fsdp", "expert", "context", "tensor"), 1) | sizes


def test_inner_axes_stay_inside_a_host():
    found = lines(open_machine("h100"), axes(pipe=2, fsdp=16, tensor=4))
    assert [found[axis].within for axis in ("pipe", "fsdp", "tensor")] == [1, 2, 4]


def test_a_ring_over_hosts_uses_all_adapters_of_a_host():
    """16 GPUs of two hosts gather 16 GB: each host receives half of it through eight adapters."""
    machine = open_machine("h100")
    line = lines(machine, axes(fsdp=16))["fsdp"]
    across = 8e9 / (8 * machine.across.gb_s * 1e9 * machine.sustained.across)
    inside = 14e9 / (machine.inside.gb_s * 1e9 * machine.sustained.inside)
    assert line.seconds(16e9) == pytest.approx(max(across, inside) + 0.1 * min(across, inside), rel=0.01)


def test_axes_of_a_torus_take_its_dims():
    machine = open_machine("v5p")
    one_dim = machine.inside.gb_s * 1e9 * machine.sustained.inside
    found = lines(machine, axes(fsdp=16, tensor=4))
    assert found["tensor"].inside == pytest.approx(one_dim)  # one whole side of 4 x 4 x 4
    assert found["fsdp"].inside == pytest.approx(2 * one_dim)  # the two others
    assert lines(machine, axes(fsdp=32, tensor=2))["tensor"].inside == pytest.approx(one_dim / 2)  # no way around


@pytest.mark.parametrize(("devices", "dims"), [(64, (4, 4, 4)), (512, (8, 8, 8)), (6144, (16, 16, 24)), (7, (1, 1, 7))])
def test_tori_are_compact(devices, dims):
    assert torus_dims(devices, 3) == dims
    assert math.prod(torus_dims(devices, 2)) == devices
