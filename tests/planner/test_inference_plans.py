"""Plans of serving against what follows from bandwidth and sizes alone."""

import pytest

from config.compose import load
from planner.__main__ import main
from planner.inference import cache_bytes, serving_plans
from planner.machine import open_machine
from planner.software import program

WORDS = ["model=llama3_8b"]


def plans(machine: str = "h200", devices: int = 8, **sizes):
    """All plans of an 8B model."""
    sizes = {"prompt": 1024, "answer": 256} | sizes
    m = open_machine(machine, calibrated=False)
    return serving_plans(load(WORDS), m, devices, program("isomesh", m.platform), **sizes)


def test_the_cache_of_a_token():
    model = load(WORDS).model
    assert cache_bytes(model, 1) == 2 * 32 * 8 * 128 * 2  # keys and values, layers, kv heads, head width, bytes
    local = load(["model=gemma2_2b"]).model
    assert cache_bytes(local, 100_000) < 0.6 * 100_000 * cache_bytes(local, 1)  # half of its layers keep a window


def test_one_sequence_waits_for_all_weights():
    machine = open_machine("h200", calibrated=False)
    one = next(p for p in plans(devices=1) if p.batch == 1)
    read = 8.03e9 * 2 / (machine.memory_gb_s * 1e9 * machine.sustained.memory)
    assert read < one.next_s < 1.5 * read


def test_shards_shorten_times_and_batches_raise_throughput():
    found = {(p.tensor, p.batch): p for p in plans()}
    assert found[8, 1].next_s < found[1, 1].next_s
    assert found[8, 1].first_s < found[1, 1].first_s
    assert found[1, 64].tokens_per_s > 5 * found[1, 1].tokens_per_s
    assert found[1, 64].memory - found[1, 32].memory == pytest.approx(32 * cache_bytes(load(WORDS).model, 1280))


def test_fewer_bits_take_less_memory_and_time():
    wide, narrow = (next(p for p in plans(devices=1, weight_bytes=b) if p.batch == 1) for b in (2.0, 0.5))
    assert narrow.memory < wide.memory - 11e9
    assert narrow.next_s < 0.5 * wide.next_s


def test_the_command(capsys):
    assert main(["inference", *WORDS, "--devices", "2", "--next-ms", "20"]) == 0
    said = capsys.readouterr().out
    assert "mesh.tensor=" in said
    assert main(["inference", "model=llama3_70b", "--hardware", "v5e", "--devices", "4"]) == 2
    assert capsys.readouterr().err.startswith("error: nothing serves this")
