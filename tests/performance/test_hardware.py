"""The peak table against data sheets, and the measured CPU peak with its record on disk."""

import dataclasses
import json
import math
import stat

import jax
import numpy as np
import pytest

from performance import hardware
from performance.hardware import CHIPS, peak_flops
from training.config import TrainConfig
from training.step import in_float32_matmuls


@dataclasses.dataclass(frozen=True)
class Device:
    device_kind: str
    platform: str = "gpu"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    root = tmp_path / "cache" / "isomesh"
    monkeypatch.setenv("ISOMESH_CACHE", str(root))
    return root


@pytest.mark.parametrize(
    ("kind", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA H200", "float8_e4m3fn", 1978.9),
        ("NVIDIA GH200 480GB", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H100 NVL", "bfloat16", 835.5),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100 80GB PCIe", "tf32", 156),
        ("NVIDIA A10", "bfloat16", 125),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", 362.05),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("NVIDIA B200", "float8", 4500),
        ("NVIDIA B300 SXM6 AC", "bfloat16", 2250),
        ("NVIDIA GB200", "bfloat16", 2500),
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("AMD Instinct MI250X", "bfloat16", 191.5),
        ("AMD Instinct MI300X", "float8", 2614.9),
        ("TPU v2", "bfloat16", 23),
        ("TPU v3", "bfloat16", 61.5),
        ("TPU v4", "bfloat16", 275),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5e", "bfloat16", 197),
        ("TPU v5", "bfloat16", 459),
        ("TPU v5p", "bfloat16", 459),
        ("TPU v6 lite", "bfloat16", 918),
        ("TPU v6e", "bfloat16", 918),
        ("TPU7x", "bfloat16", 1153.5),
        ("TPU7x", "float8", 2307),
    ],
)
def test_known_kinds_have_their_data_sheet_peak(kind, dtype, tflops):
    peak = peak_flops(dtype, [Device(kind)] * 8)
    assert peak.flops == pytest.approx(tflops * 1e12)
    assert kind in peak.name
    assert peak.source


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("NVIDIA Imaginary 9000", "bfloat16"),
        ("NVIDIA A10G", "bfloat16"),
        ("NVIDIA L40", "bfloat16"),
        ("NVIDIA H20", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16"),
        ("Tesla V100-SXM2-16GB", "bfloat16"),
        ("NVIDIA A100-SXM4-40GB", "float8"),
        ("TPU v4 lite", "bfloat16"),
    ],
)
def test_unknown_kinds_and_missing_units_have_no_peak_and_say_so(kind, dtype):
    peak = peak_flops(dtype, [Device(kind)])
    assert math.isnan(peak.flops)
    assert "no peak known" in peak.name
    assert kind in peak.name


def test_mixed_devices_have_no_common_peak():
    peak = peak_flops("bfloat16", [Device("NVIDIA H200"), Device("NVIDIA B200")])
    assert math.isnan(peak.flops)
    assert "NVIDIA B200 + NVIDIA H200" in peak.name


def test_unknown_dtype_names_the_choices():
    with pytest.raises(ValueError, match=r"int7.*bfloat16"):
        peak_flops("int7", [Device("NVIDIA H200")])


def test_float32_is_what_training_computes_it_in_and_not_tf32():
    assert peak_flops("float32", [Device("NVIDIA H200")]).flops == pytest.approx(66.9e12)
    assert peak_flops("tf32", [Device("NVIDIA H200")]).flops == pytest.approx(494.7e12)
    assert peak_flops("float32", [Device("Tesla V100-SXM2-16GB")]).flops == pytest.approx(15.7e12)
    assert math.isnan(peak_flops("float32", [Device("TPU v4", "tpu")]).flops)

    traced = jax.make_jaxpr(in_float32_matmuls(lambda x: x @ x, TrainConfig()))(np.ones((2, 2), np.float32))
    (matmul,) = [eqn for eqn in traced.eqns if eqn.primitive.name == "dot_general"]
    assert matmul.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.kind)
def test_rows_are_dense_and_ordered_by_width(chip):
    peaks = [p for p in (chip.float8, chip.bfloat16 or chip.float16, chip.tf32, chip.float32) if p is not None]
    assert peaks == sorted(peaks, reverse=True)
    assert chip.source
    if chip.float8 and chip.bfloat16:  # a ratio of 4 would be a sparse figure beside a dense one
        assert chip.float8 / chip.bfloat16 <= 2.1


def test_cpu_peak_is_measured_shared_and_remembered(cache, monkeypatch):
    devices = jax.devices("cpu")
    monkeypatch.setattr(
        hardware,
        "_measure_matmul",
        measured := Measured([8e10, True], [6e10, False], *[[7e10, False]] * 2, [9e10, False]),
    )
    first = peak_flops("float32", devices)
    assert first.flops == pytest.approx(8e10 / len(devices))
    assert "while other work ran" in first.name
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    second = peak_flops("float32", devices)  # until an idle machine has confirmed it, the best is kept
    assert second.flops == first.flops
    assert "while other work ran" not in second.name
    assert [peak_flops("float32", devices) for _ in range(4)] == [second] * 4
    assert measured.calls == 4
    assert measured.budgets == [hardware.FIRST_S] + [hardware.AGAIN_S] * 3
    assert peak_flops("bfloat16", devices).flops == pytest.approx(9e10 / len(devices))  # another dtype: from anew
    assert measured.calls == 5
    assert not [path for path in cache.iterdir() if path.suffix not in (".json", ".lock")]


class Measured:
    """Stands in for the measurement: gives the listed results in turn and counts."""

    def __init__(self, *results):
        self.results, self.calls, self.budgets = results, 0, []

    def __call__(self, dtype, device, cores, budget_s):
        self.calls += 1
        self.budgets.append(budget_s)
        return tuple(self.results[self.calls - 1])


@pytest.mark.parametrize("damage", ["", "[]", "{", json.dumps({"flops": "many"}), json.dumps({"flops": -1})])
def test_damaged_record_is_measured_again(cache, monkeypatch, damage):
    monkeypatch.setattr(hardware, "_measure_matmul", measured := Measured([8e10, False], [7e10, False]))
    peak_flops("float32", jax.devices("cpu"))
    (record,) = cache.glob("*.json")
    record.write_text(damage)
    assert peak_flops("float32", jax.devices("cpu")).flops == pytest.approx(7e10 / len(jax.devices("cpu")))
    assert measured.calls == 2


def test_unwritable_cache_only_costs_the_memory(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ISOMESH_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(hardware, "_measure_matmul", Measured([8e10, False]))
    assert peak_flops("float32", jax.devices("cpu")).flops > 0


def test_matmul_measurement_is_plausible_and_the_best_of_all_ways():
    flops, busy = hardware._measure_matmul("bfloat16", jax.devices("cpu")[0], cores=2, budget_s=0.0)
    assert 1e9 < flops < 1e15
    assert isinstance(busy, bool)
    kinds = {("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32")}
    assert set(hardware._ways("bfloat16")) == kinds
    assert hardware._ways("float32") == (("float32", "float32"),)
