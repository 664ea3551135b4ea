"""Which device a mesh puts where, for machines that are not here: inner axes within a slice or host, outer across."""

import math
import random
from dataclasses import dataclass, replace

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.mesh import AXES, crossings, make_mesh, slow_network_warning, split_over_slices

ONE = dict.fromkeys(AXES, 1)


@dataclass(frozen=True)
class Device:
    """What JAX tells of a device, as far as its place goes."""

    id: int
    process_index: int
    slice_index: int
    platform: str
    device_kind: str
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0


def gpus(hosts: int, each: int, processes: int = 1) -> list[Device]:
    """Hosts of GPUs, each of `processes` processes."""
    return [
        Device(host * each + i, host * processes + i * processes // each, host, "gpu", "NVIDIA H200")
        for host in range(hosts)
        for i in range(each)
    ]


def tpus(slices: int, columns: int, rows: int) -> list[Device]:
    """Slices of TPU v6e chips."""
    return [
        Device((s * rows + y) * columns + x, s, s, "tpu", "TPU v6 lite", (x, y, 0))
        for s in range(slices)
        for y in range(rows)
        for x in range(columns)
    ]


def cpus(processes: int, each: int) -> list[Device]:
    return [Device(131072 * p + i, p, p, "cpu", "cpu") for p in range(processes) for i in range(each)]


@given(sizes=st.tuples(*[st.sampled_from((1, 1, 2, 3, 4, 8))] * len(AXES)), data=st.data())
def test_outer_axes_take_what_crosses(sizes, data):
    sizes = dict(zip(AXES, sizes, strict=True))
    devices = math.prod(sizes.values())
    slices = data.draw(st.sampled_from([n for n in range(1, devices + 1) if devices % n == 0]))
    across = split_over_slices(sizes, slices)
    assert math.prod(across.values()) == slices
    for outer, axis in enumerate(AXES):
        assert sizes[axis] % across[axis] == 0
        further_in = math.prod(across[inner] for inner in AXES[outer + 1 :])
        assert math.gcd(sizes[axis] // across[axis], further_in) == 1  # an axis leaves only what it cannot take


CROSSING = [  # sizes for two hosts or slices of 8, and the axes that must cross, with how many a line of them spans
    ({"data": 2, "fsdp": 4, "tensor": 2}, {"data": 2}),
    ({"pipe": 2, "data": 2, "context": 2, "tensor": 2}, {"pipe": 2}),
    ({"pipe": 4, "tensor": 4}, {"pipe": 2}),  # partly: two stages in each
    ({"fsdp": 16}, {"fsdp": 2}),
    ({"fsdp": 2, "tensor": 8}, {"fsdp": 2}),
    ({"expert": 2, "context": 4, "tensor": 2}, {"expert": 2}),
]
ABSENT = [replace(gpu, slice_index=0, coords=(gpu.slice_index, 0, gpu.id % 8)) for gpu in gpus(2, 8)]
MACHINES = {
    "gpu": gpus(2, 8),
    "one process a gpu": gpus(2, 8, processes=8),
    "gpu ahead of time": ABSENT,  # of a topology that is not there JAX gives the coordinates only
    "tpu": tpus(2, 4, 2),
}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("sizes", "crossing"), CROSSING, ids=lambda v: "x".join(f"{a}{n}" for a, n in v.items()))
def test_only_the_axes_meant_to_cross_do(machine, sizes, crossing):
    devices = MACHINES[machine]
    mesh = make_mesh(ONE | sizes, random.Random(0).sample(devices, len(devices)))
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == ONE | sizes
    assert crossings(mesh) == crossing
    assert slow_network_warning(mesh) is None
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in devices)


def test_an_outer_axis_that_slices_do_not_divide_stays_within():
    """Three stages over two hosts: in the order of the devices the middle one would lie on both."""
    mesh = make_mesh(ONE | {"pipe": 3, "data": 2, "tensor": 4}, gpus(2, 12))
    assert crossings(mesh) == {"data": 2}


def test_a_torus_keeps_the_innermost_axis_closest():
    mesh = make_mesh(ONE | {"fsdp": 4, "tensor": 4}, tpus(1, 4, 4))
    for line in mesh.devices.reshape(4, 4):  # tensor runs along one dimension of the torus
        assert len({d.coords[0] for d in line}) == 1 or len({d.coords[1] for d in line}) == 1
    assert crossings(mesh) == {}


def test_any_legal_mesh_of_a_pod_is_made():
    """Also those whose axes do not follow the torus: a dimension of it then serves two axes."""
    for sizes in ({"tensor": 8, "data": 4}, {"pipe": 2, "fsdp": 2, "context": 2, "tensor": 4}, {"fsdp": 32}):
        mesh = make_mesh(ONE | sizes, tpus(1, 4, 8))
        assert dict(mesh.shape) == ONE | sizes


def test_tensor_over_hosts_is_made_and_told():
    mesh = make_mesh(ONE | {"fsdp": 2, "tensor": 16}, gpus(4, 8))
    assert crossings(mesh) == {"fsdp": 2, "tensor": 2}
    warning = slow_network_warning(mesh)
    assert warning.startswith("mesh.tensor=16: exchanges of every layer cross the slow network")
    assert "a divisor of 8" in warning
    assert "\n" not in warning


def test_simulated_devices_keep_their_order():
    devices = cpus(4, 2)
    mesh = make_mesh(ONE | {"data": 2, "fsdp": 2, "tensor": 2}, devices)
    assert list(mesh.devices.flat) == devices
    assert crossings(mesh) == {}
    assert list(make_mesh(ONE | {"fsdp": 8}).devices.flat) == jax.devices()


def test_unequal_hosts_are_refused():
    with pytest.raises(ValueError, match="hosts of 8, 4 devices cannot form one mesh"):
        make_mesh(ONE | {"fsdp": 12}, gpus(2, 8)[:12])
