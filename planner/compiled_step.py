"""One training step compiled for machines that are not here: the child process of planner/compile.py.

Reads {"platform", "topology", "settings", "machine", "memory"} from standard input, and writes one line of JSON, the
fields of planner.compile.Compiled. It runs where the platform's compiler is installed. Exit code 2 with a reason.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax

from config import compose
from config.layout import mesh_sizes
from config.schema import Config
from parallel.mesh import make_mesh
from performance import hlo
from performance.collectives import collectives, summary
from performance.roofline import Machine, kernels
from performance.targets import gpus, tpus
from runtime import compiler_flags
from runtime.exit_codes import DONE, MISTAKE
from runtime.files import replace_text
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
        "temporary": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "flops": (program.cost_analysis() or {}).get("flops"),
        "collectives": exchanged(text, mesh),
        "largest": largest(text),
        "least_s": least(text, asked["rates"]),
        "seconds": time.perf_counter() - began,
    }


def exchanged(text: str, mesh) -> list[dict]:
    """Collectives by kind, axes and whether they are waited for at once, the largest first."""
    found = collectives(text, mesh)
    rows = [
        {"kind": kind, "axes": list(axes), "times": times, "bytes": size, "asynchronous": apart}
        for apart in (True, False)
        for (kind, axes), (times, size) in summary([c for c in found if c.asynchronous == apart]).items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


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


def least(text: str, rates: dict) -> float:
    """Seconds of all kernels at the machine's rates: collectives count with their memory traffic alone."""
    return sum(kernel.seconds(Machine(**rates)) for kernel in kernels(text))


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
