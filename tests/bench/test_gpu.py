"""bench/gpu.py: a process that runs out of time leaves no child, and what is known is on disk."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.append(str(ROOT / "bench"))

import gpu  # noqa: E402


@pytest.fixture
def bench(tmp_path):
    return gpu.Bench(argparse.Namespace(minutes=1, out=str(tmp_path / "out.jsonl"), platform="cpu", tiny=True))


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet fetched by its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_children_end_with_a_process_that_is_late(bench, tmp_path):
    note = tmp_path / "child"
    late = f"sleep 300 & echo $! > {note}; wait"
    began = time.monotonic()
    (line,) = bench.finish(bench.begin(["bash", "-c", late]), {"kind": "steps"}, time.monotonic() + 1)
    assert line == {"kind": "steps", "failed": "out of time"}
    assert time.monotonic() - began < 30
    child = int(note.read_text())
    for _ in range(100):
        if not alive(child):
            break
        time.sleep(0.05)
    assert not alive(child)


def test_what_a_late_process_had_said_is_kept(bench):
    said = bench.finish(
        bench.begin(["bash", "-c", "echo '{\"a\": 1}'; sleep 300"]), {"kind": "check"}, time.monotonic()
    )
    assert said == [{"kind": "check", "a": 1}, {"kind": "check", "failed": "out of time"}]


@pytest.mark.parametrize(("words", "failed"), [("CUDA out of memory. Tried", "out of memory"), ("no GPU", "no GPU")])
def test_a_failure_has_its_reason(bench, words, failed):
    process = bench.begin(["bash", "-c", f"echo '{words}' >&2; exit 1"])
    (line,) = bench.finish(process, {}, time.monotonic() + 20)
    assert line["failed"] == failed


def test_lines_are_on_disk_when_known(bench):
    for number in range(2):
        bench.write({"kind": "check", "number": number})
        lines = Path(bench.given.out).read_text().splitlines()
        assert [json.loads(line)["number"] for line in lines] == list(range(number + 1))


def test_kernels_of_both_sides_are_told_apart():
    kernels = {
        "nvjet_sm90_tst_128x128_64x6_2x1_v_bz_TNT": 5.0,
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26": 4.0,
        "void cudnn::fusion::compute_dot_do_o_specialized<true, 64>": 1.0,
        "triton_poi_fused_gelu_view_9": 2.0,
        "memcpy128": 3.0,
    }
    assert gpu.kinds(kernels) == {"matmul": 5.0, "attention": 5.0, "copies": 3.0, "everything else": 2.0, "all": 15.0}
    assert gpu.dearest(kernels, 2)[0][1] == 5.0


def test_unknown_works_are_refused():
    command = [sys.executable, str(ROOT / "bench/gpu.py"), "--only", "nope"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 2
    assert "choose from gpt2_124m" in done.stderr
