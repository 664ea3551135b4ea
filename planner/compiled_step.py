"""One training step compiled for machines that are not here: the child process of planner/compile.py.

Reads {"platform", "topology", "settings", "machine", "memory"} from standard input, and writes one line of JSON, the
fields of planner.compile.Compiled. It runs where the platform's compiler is installed. Exit code 2 with a reason.
"""

import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax

from config import compose
from config.layout import mesh_sizes
from config.schema import Config
from parallel.mesh import make_mesh
from parallel.pipeline.buffers import AT_MOST_ONCE, OPS, allocate
from parallel.pipeline.schedules import PipelineSchedule
from performance import hlo
from performance.collectives import Collective, collectives, summary
from performance.roofline import Machine, kernels
from performance.targets import gpus, tpus
from runtime import compiler_flags
from runtime.exit_codes import DONE, MISTAKE
from runtime.files import replace_text
from runtime.memory import temporary_bytes
from runtime.start import start
from training.job import abstract_batch, make_job

CONTROL = ("while", "conditional", "call", "async-start")  # what these call has kernels of its own
NO_ARRAY = ("parameter", "tuple", "get-tuple-element", "while", "conditional", "call", "constant", "bitcast")


def devices_of(asked: dict, config: Config) -> list:
    """Devices that programs can be compiled for."""
    if asked["platform"] == "cpu":
        start(replace(config.runtime, platform="cpu", cpu_devices=int(asked["topology"])))
        return jax.devices()
    if asked["platform"] == "tpu":
        return tpus(asked["topology"])
    hosts, _, each = asked["topology"].split("x")
    return gpus(asked["machine"].lower(), int(hosts), int(each), memory=asked["memory"])


def compiled(asked: dict) -> dict:
    """Compiles it; nothing is allocated. Raises what the compiler raises."""
    if asked["platform"] != "cpu":
        compiler_flags.add(asked["platform"], devices=False)
    config, began = compose.load(asked["settings"]), time.perf_counter()
    devices = devices_of(asked, config)
    mesh = make_mesh(mesh_sizes(config, len(devices)), devices)
    target = {"gpu": "cuda"}.get(asked["platform"], asked["platform"])
    with jax.set_mesh(mesh):
        job = make_job(config, mesh)
        batch = abstract_batch(config.train, mesh, segments=config.data.segments)
        program = job.step.trace(job.abstract, batch).lower(lowering_platforms=(target,)).compile()
    memory, text = program.memory_analysis(), program.as_text()
    if asked.get("text"):
        Path(asked["text"]).parent.mkdir(parents=True, exist_ok=True)
        replace_text(Path(asked["text"]), text)
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporary": temporary_bytes(memory, asked["platform"]),
        "code": memory.generated_code_size_in_bytes,
        "flops": (program.cost_analysis() or {}).get("flops"),
        "collectives": exchanged(text, mesh, job.schedule),
        "largest": largest(text),
        "least_s": least(text, asked["rates"], job.schedule),
        "seconds": time.perf_counter() - began,
    }


def exchanged(text: str, mesh, schedule: PipelineSchedule | None = None) -> list[dict]:
    """Collectives by kind, axes and whether they are waited for at once, the largest first."""
    found = collectives(text, mesh)
    if schedule is not None:
        found = [as_often_as_run(c, schedule) for c in found]
    rows = [
        {"kind": kind, "axes": list(axes), "times": times, "bytes": size, "asynchronous": apart}
        for apart in (True, False)
        for (kind, axes), (times, size) in summary([c for c in found if c.asynchronous == apart]).items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def as_often_as_run(c: Collective, schedule: PipelineSchedule) -> Collective:
    """A collective of a pipeline, which the text has once a tick, as often as the fullest stage comes to it."""
    ticks = allocate(schedule).ticks
    if c.times % schedule.ticks:
        return c
    if operation := re.search(rf"{AT_MOST_ONCE}\.(\w+)", c.scope):
        name = operation[1]
        if name in OPS:
            stages = [stage for _, stage, op in schedule.operations() if op.kind == name]
            runs = max(map(stages.count, range(schedule.stages)))
        elif name in ("loss", "embed_gradient"):
            runs = int((getattr(ticks, name) >= 0).sum())
        else:
            return c
    elif pattern := re.search(r"/send/cond/branch_(\d+)_fun", c.scope):
        runs = int((ticks.pattern == int(pattern[1])).sum())
    elif re.search(r"/cond/branch_1_fun/embed\b", c.scope):
        runs = int((ticks.embed >= 0).sum())
    else:
        return c
    return replace(c, times=c.times // schedule.ticks * runs)


def largest(text: str, count: int = 3) -> list[tuple[str, float]]:
    """The largest arrays that lie in memory, parameters apart: results of kernels, and not what is inside of them."""
    sizes, computations = {}, hlo.parse(text)[0]
    inside = {
        name
        for computation in computations.values()
        for instruction in computation.values()
        if instruction.opcode not in CONTROL
        for name in instruction.called("calls", "to_apply")
    }
    for name, computation in computations.items():
        for instruction in computation.values() if name not in inside else ():
            if instruction.opcode not in NO_ARRAY:
                for array in hlo.arrays(instruction.shape):
                    sizes[f"{array.dtype}[{','.join(map(str, array.dims))}]"] = array.bytes
    return sorted(sizes.items(), key=lambda item: -item[1])[:count]


def least(text: str, rates: dict, schedule: PipelineSchedule | None = None) -> float:
    """Seconds of all kernels at the machine's rates: collectives count with their memory traffic alone.

    What a pipeline's text has once a tick counts as often as a stage has microbatches and chunks.
    """
    ticks, runs = (schedule.ticks, schedule.microbatches * schedule.chunks) if schedule else (1, 1)
    share = lambda kernel: runs / ticks if kernel.times % ticks == 0 else 1.0
    return sum(share(kernel) * kernel.seconds(Machine(**rates)) for kernel in kernels(text))


def main() -> int:
    """Answers one question."""
    try:
        found = compiled(json.loads(sys.stdin.read()))
    except Exception as error:  # whatever a compiler raises is its reason
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return MISTAKE
    print(json.dumps(found))
    return DONE


if __name__ == "__main__":
    sys.exit(main())
