"""A trace's time is conserved and sorted by what the code names; profiling changes no losses and stops no run."""

import gzip
import json
import random
import re
from pathlib import Path

import jax
import pytest
import runs
from jax.profiler import ProfileData

from performance import profile
from performance.profile import ProfiledStep, summary, table
from performance.trace import SCOPES, Event, Program, read_events, scope_of, shares
from training.config import TrainConfig

ROOT = Path(__file__).parents[2]

# A step with a matmul, a loss, a collective, a layout copy, a loop, and a fused matmul that has lost its own name.
TEXT = """HloModule jit_train_step, is_scheduled=true

%fused (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %dot.9 = f32[8,8]{1,0} dot(%p, %p), metadata={op_name="jit(train_step)/jvp()/block/ffn/dot_general"}
}

%body (q: f32[8,8]) -> f32[8,8] {
  %q = f32[8,8]{1,0} parameter(0)
  ROOT %exp.1 = f32[8,8]{1,0} exponential(%q), metadata={op_name="jit(train_step)/jvp()/block/attention/core/exp"}
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0), metadata={op_name="batch"}
  %fusion.1 = f32[8,8]{1,0} fusion(%x), kind=kOutput, calls=%fused
  %while.1 = f32[8,8]{1,0} while(%fusion.1), condition=%cond, body=%body
  %all-reduce-start.1 = f32[8,8]{1,0} all-reduce-start(%while.1), metadata={op_name="jit(train_step)/clip/dot"}
  %log.1 = f32[8,8]{1,0} log(%x), metadata={op_name="jit(train_step)/transpose(jvp(loss))/head/jit(_where)/log"}
  %add.1 = f32[8,8]{1,0} add(%x, %x), metadata={op_name="jit(train_step)/optimizer/add"}
  ROOT %copy.1 = f32[8,8]{0,1} copy(%log.1), metadata={op_name="jit(train_step)/optimizer/div"}
}
"""
PROGRAM = Program(TEXT)
NAMES = ("fusion.1", "exp.1", "all-reduce-start.1", "log.1", "add.1", "copy.1")


def categories(events: list[Event], steps: int = 1) -> dict[str, float]:
    """Milliseconds by category, without zeros; the events' times are given in ms here."""
    events = [Event(e.device, e.name, e.start * 1e6, e.end * 1e6, e.module, e.beside) for e in events]
    rows = summary(shares(events, PROGRAM), PROGRAM, steps)["categories"]
    return {name: pytest.approx(row["ms"]) for name, row in rows.items() if row["ms"]}


# ---------------------------------------------------------------------------------------------------------------------
# Names


def test_scopes_are_what_the_code_names():
    code = "".join(path.read_text() for folder in ("model", "training") for path in (ROOT / folder).glob("*.py"))
    named = {name for call in re.findall(r"named_scope\(([^)\n]*)\)", code) for name in re.findall(r'"(\w+)"', call)}
    assert named == set(SCOPES)


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("jit(train_step)/jvp()/while/body/block/attention/core/BKGTS,BSKH->BTKGH/dot_general", "block/attention/core"),
        ("jit(train_step)/transpose(jvp(loss))/head/jit(_where)/select_n", "loss/head"),
        ("jit(train_step)/transpose(jvp(jit(loss)))/mul", ""),  # a function's name is no scope
        ("jit(train_step)/checkpoint/rematted_computation/block/ffn/mul", "block/ffn"),
        ("jit(train_step)/transpose(jvp())/block/norm/block/norm/checkpoint/reduce_sum", "block/norm"),
        ("state.params['embed']", ""),
        ("jit(train_step)/block/norm/mul;jit(train_step)/block/ffn/mul", "block/norm"),
    ],
)
def test_scope_of(name, scope):
    assert scope_of(name) == scope


@pytest.mark.parametrize(
    ("name", "kind", "category", "scope"),
    [
        ("fusion.1", "matmul", "matmul", "block/ffn"),  # kind and scope from what is fused
        ("exp.1", "elementwise", "attention", "block/attention/core"),
        ("all-reduce-start.1", "collective", "collectives exposed", "clip"),
        ("log.1", "elementwise", "loss", "loss/head"),
        ("add.1", "elementwise", "optimizer", "optimizer"),
        ("copy.1", "copy", "copies", "optimizer"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "collective", "collectives exposed", ""),
        ("MemcpyD2D", "copy", "copies", ""),
        ("sm90_some_kernel", "elementwise", "norms, elementwise", ""),
    ],
)
def test_meaning_of_an_instruction(name, kind, category, scope):
    meaning = PROGRAM.meaning(name)
    assert (meaning.kind, meaning.category, meaning.scope) == (kind, category, scope)


# ---------------------------------------------------------------------------------------------------------------------
# Time


@pytest.mark.parametrize("seed", range(20))
def test_time_is_conserved(seed):
    draw = random.Random(seed)
    events = []
    for _ in range(60):
        start, module = draw.uniform(0, 100), draw.choice(["jit_train_step"] * 4 + ["jit_eval", ""])
        beside = draw.choice(("", "", "threads", "engine"))
        name, end = draw.choice(NAMES), start + draw.expovariate(0.3)
        event = Event(f"d{draw.randrange(3)}", name, start, end, module, beside)
        events.append(event)
    total = shares(events, PROGRAM)
    found = summary(total, PROGRAM, steps=4)
    assert sum(total.operations.values()) + total.idle == pytest.approx(total.window * total.devices)
    for part in ("categories", "scopes"):
        assert all(row["ms"] >= 0 for row in found[part].values())
    assert sum(row["share"] for row in found["categories"].values()) == pytest.approx(1)
    assert sum(row["ms"] for row in found["categories"].values()) == pytest.approx(found["step_ms"])
    rest = found["categories"]["idle"]["ms"] + found["categories"]["other programs"]["ms"]
    assert sum(row["ms"] for row in found["scopes"].values()) == pytest.approx(found["step_ms"] - rest)
    assert 0 <= total.overlapped <= total.window * total.devices - total.idle
    assert all(f"{name:24}" in table({"title": "t", **found}) for name in found["scopes"])


def test_a_collective_behind_compute_is_overlapped_and_only_the_rest_is_exposed():
    events = [Event("d", "fusion.1", 0, 6), Event("d", "all-reduce-start.1", 4, 10), Event("d", "add.1", 12, 13)]
    assert categories(events) == {"matmul": 6, "collectives exposed": 4, "idle": 2, "optimizer": 1}
    assert shares(events, PROGRAM).overlapped == 2


def test_operations_that_run_together_share_their_time():
    assert categories([Event("d", "fusion.1", 0, 4), Event("d", "add.1", 2, 8)]) == {"matmul": 3, "optimizer": 5}


def test_what_runs_on_in_threads_shares_with_compute_and_hides_no_collective():
    events = [Event("d", "fusion.1", 0, 1), Event("d", "fusion.1", 1, 9, beside="threads")]
    events += [Event("d", "add.1", 3, 5), Event("d", "all-reduce-start.1", 6, 8)]
    assert categories(events) == {"matmul": 6, "optimizer": 1, "collectives exposed": 2}
    assert shares(events, PROGRAM).overlapped == 0
    assert shares(events, PROGRAM).counts["fusion.1"] == 1


def test_what_has_an_engine_of_its_own_counts_where_nothing_else_runs():
    events = [Event("d", "fusion.1", 0, 4), Event("d", "copy.1", 2, 7, beside="engine"), Event("d", "add.1", 8, 9)]
    assert categories(events) == {"matmul": 4, "copies": 3, "idle": 1, "optimizer": 1}


def test_a_loop_counts_only_through_what_it_contains():
    events = [Event("d", "while.1", 0, 10), Event("d", "exp.1", 2, 4), Event("d", "add.1", 10, 11)]
    assert categories(events) == {"attention": 2, "optimizer": 1, "idle": 8}
    assert categories([events[0], events[2]]) == {"norms, elementwise": 10, "optimizer": 1}


def test_other_programs_have_a_row_of_their_own_and_steps_divide():
    events = [Event("d", "fusion.1", 0, 2, "jit_train_step"), Event("d", "fusion.1", 2, 5, "jit_evaluate")]
    events += [Event("d", "fusion.1", 6, 8, "jit_train_step"), Event("d", "fusion.1", 8, 99, "jit_evaluate")]
    assert categories(events, steps=2) == {"matmul": 2, "other programs": 1.5, "idle": 0.5}
    with pytest.raises(ValueError, match="no operation of jit_train_step"):
        shares([Event("d", "fusion.1", 0, 2, "jit_evaluate")], PROGRAM)


# ---------------------------------------------------------------------------------------------------------------------
# Traces of each platform


def trace(path: Path, plane: str, lines: dict[str, list[tuple]]) -> Path:
    """Writes a profiler's file: events (name, start and length in us, stats) by line."""
    names = sorted({name for events in lines.values() for name, *_ in events})
    stats = sorted({key for events in lines.values() for *_, values in events for key in values})

    def stat(key, value):
        field = f'str_value: "{value}"' if isinstance(value, str) else f"uint64_value: {value}"
        return f"stats {{ metadata_id: {stats.index(key) + 1} {field} }}"

    text = f'planes {{ name: "{plane}"\n'
    for line, events in lines.items():
        text += f'lines {{ name: "{line}" timestamp_ns: 0\n'
        for name, start, length, values in events:
            told = " ".join(stat(*item) for item in values.items())
            picoseconds = f"offset_ps: {start * 10**6} duration_ps: {length * 10**6}"
            text += f"events {{ metadata_id: {names.index(name) + 1} {picoseconds} {told} }}\n"
        text += "}\n"
    for kind, known in (("event", names), ("stat", stats)):
        for i, name in enumerate(known, 1):
            text += f'{kind}_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}\n'
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace(text + "}"))
    return path


def spans(events: list[Event]) -> set[tuple]:
    return {(e.device, e.name, round(e.start / 1e3), round(e.end / 1e3), e.module, e.beside) for e in events}


def test_cpu_operations_end_where_their_last_thread_ends(tmp_path):
    def of(op, number):
        return {"hlo_op": op, "hlo_module": "m", "device_ordinal": number, "_p": 7 + number}

    lines = {
        "tf_XLAEigen/1": [("dot.1", 0, 1, of("dot.1", 0)), ("add.1", 3, 2, of("add.1", 1)), ("Rendezvous", 0, 9, {})],
        "tf_XLAEigen/2": [("end: dot.1", 5, 1, {"_c": 7}), ("end: add.1", 4, 1, {"_c": 8})],
    }
    events = read_events(trace(tmp_path / "x.pb", "/host:CPU", lines))
    called = {("CPU:0", "dot.1", 0, 1, "m", ""), ("CPU:1", "add.1", 3, 5, "m", "")}
    assert spans(events) == called | {("CPU:0", "dot.1", 1, 5, "m", "threads")}


def test_gpu_streams_with_nccl_beside_compute(tmp_path):
    of = lambda op: {"hlo_op": op, "hlo_module": "jit_train_step"}
    lines = {
        "Stream #13(Compute)": [("gemm_kernel", 0, 10, of("fusion.1")), ("loop_add", 14, 2, of("add.1"))],
        "Stream #20(Collective)": [("ncclDevKernel_AllReduce", 6, 7, of("all-reduce-start.1"))],
        "Stream #21(MemcpyD2D)": [("MemcpyD2D", 9, 5, {})],
        "XLA Ops": [("fusion.1", 0, 10, {})],  # drawn from the streams
    }
    path = trace(tmp_path / "x.pb", "/device:GPU:0", lines)
    events = [Event(e.device, e.name, e.start / 1e3, e.end / 1e3, e.module, e.beside) for e in read_events(path)]
    assert categories(events) == {"matmul": 10, "collectives exposed": 3, "copies": 1, "optimizer": 2}
    assert shares(events, PROGRAM).overlapped == 4


@pytest.mark.parametrize("told", [{}, {"hlo_op": "command_buffer.1"}, {"hlo_op": "command_buffer", "hlo_module": "M"}])
def test_gpu_kernels_of_command_buffers(tmp_path, told):
    """They say nothing of what they belong to, or the whole buffer's name: XLA's have names, the libraries' a kind."""
    told = {key: value.replace("M", "jit_train_step") for key, value in told.items()}
    lines = {
        "Stream #13(Compute)": [
            ("fusion_1", 0, 10, told),
            ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_TNN", 10, 5, told),
            ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", 15, 3, told),
            ("add_1", 18, 2, told),
            ("exp_1", 20, 1, {"hlo_op": "exp.1", "hlo_module": "jit_train_step"}),  # not in a buffer
        ],
        "Stream #21(MemcpyD2D)": [("MemcpyD2D", 19, 5, {})],
    }
    path = trace(tmp_path / "x.pb", "/device:GPU:0", lines)
    events = [Event(e.device, e.name, e.start / 1e3, e.end / 1e3, e.module, e.beside) for e in read_events(path)]
    assert categories(events) == {"matmul": 15, "attention": 4, "optimizer": 2}
    scopes = summary(shares(events, PROGRAM), PROGRAM, 1)["scopes"]
    assert {"block/ffn", "attention/core", "optimizer", "block/attention/core", "none"} == set(scopes)


def test_tpu_lines(tmp_path):
    whole = lambda name: (f"%{name} = f32[8,8] op(...)",)
    lines = {
        "XLA Modules": [("jit_train_step(123)", 0, 20, {}), ("jit_evaluate(5)", 30, 9, {})],
        "XLA Ops": [(*whole("fusion.1"), 0, 10, {}), (*whole("fusion.1"), 30, 9, {}), (*whole("add.1"), 13, 2, {})],
        "Async XLA Ops": [(*whole("all-reduce-start.1"), 4, 8, {})],
        "Steps": [("0", 0, 20, {})],
    }
    path = trace(tmp_path / "x.pb", "/device:TPU:0", lines)
    events = [Event(e.device, e.name, e.start / 1e3, e.end / 1e3, e.module, e.beside) for e in read_events(path)]
    assert {e.module for e in events} == {"jit_train_step", "jit_evaluate"}
    assert categories(events) == {"matmul": 10, "collectives exposed": 2, "idle": 1, "optimizer": 2}


# ---------------------------------------------------------------------------------------------------------------------
# In a run


@pytest.mark.parametrize("text", ["3", "3:", "3:3", "5:3", "0:2", "a:b", "-1:2", "1:2:3", "8:11"])
def test_mistakes_are_told(text):
    with pytest.raises(ValueError, match=f"train.profile={text} "):
        TrainConfig(steps=10, profile=text)
    assert TrainConfig(steps=10, profile="1:10").profile == "1:10"


class Told(list):
    """A console and a meter of no run in particular."""

    note = warn = list.append

    def pause(self):
        return jax.named_scope("nothing")


@pytest.mark.parametrize("broken", ["start_trace", "stop_trace"])
def test_a_profiler_that_fails_is_one_line(monkeypatch, tmp_path, broken):
    def fail(*_, **__):
        raise RuntimeError("no\nprofiler")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)  # leaves nothing to read
    if broken == "start_trace":
        monkeypatch.setattr(jax.profiler, broken, fail)
    told = Told()
    step = ProfiledStep(lambda state, batch: state + batch, "3:4", 0, tmp_path, told, told)
    assert [step(number, 1) for number in range(6)] == [1, 2, 3, 4, 5, 6]
    assert len(told) == 1, told
    assert "\n" not in told[0]


def test_a_resumed_run_traces_what_is_left(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: calls.append(step.number))
    monkeypatch.setattr(ProfiledStep, "_stop", lambda self: calls.append(self.number))
    for first, expected in ((0, [3, 6]), (3, [4, 6]), (5, []), (9, [])):
        calls.clear()
        step = ProfiledStep(lambda state, batch: state, "3:5", first, tmp_path, told := Told(), told)
        for _ in range(6):
            step(0, 0)
        assert calls == expected
        assert len(told) == (first >= 5)
    step = ProfiledStep(lambda state, batch: state, "3:5", 0, tmp_path, told, told)
    for _ in range(4):
        step(0, 0)
    step.close()  # the run ended early
    assert calls == [3, 4]


def test_a_run_profiles_itself_and_loses_nothing(tmp_path):
    text = runs.corpus(tmp_path / "text")
    more = ("train.steps=5", "train.eval_every=0", "checkpoint.every=0", "mesh.fsdp=2", "mesh.tensor=2")
    before = jax.config.jax_compilation_cache_include_metadata_in_key
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)  # a cached step may have other names
    try:
        for name, key in (("plain", ""), ("traced", "train.profile=3:4")):
            assert runs.run(runs.overrides(text, tmp_path / name, *more, *filter(None, [key])), devices=4) == 0
    finally:
        jax.config.update("jax_compilation_cache_include_metadata_in_key", before)
    assert runs.losses(tmp_path / "traced") == runs.losses(tmp_path / "plain")
    folder = tmp_path / "traced" / "profile"
    found = json.loads((folder / "summary.json").read_text())
    assert found["title"].startswith("profile of steps 3 to 4, 4 x ")
    share = {name: row["share"] for name, row in found["categories"].items()}
    assert sum(share.values()) == pytest.approx(1)
    for name in ("matmul", "attention", "loss", "optimizer", "collectives exposed"):
        assert share[name] > 0, (name, share)
    assert share["other programs"] == 0
    assert {"block/ffn", "block/attention", "block/norm", "embed", "optimizer"} <= found["scopes"].keys()
    assert sum(row["share"] for name, row in found["scopes"].items() if name == "none") < 0.3
    assert len(found["operations"]) == profile.LONGEST
    assert (folder / "summary.txt").read_text() == f"{table(found)}\n"
    assert (folder / "summary.txt").read_text().splitlines()[0] in (tmp_path / "traced" / "run.log").read_text()
    (perfetto,) = folder.glob("plugins/profile/*/perfetto_trace.json.gz")
    assert json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]
    assert not (tmp_path / "plain" / "profile").exists()
