"""One training step compiled for machines that are not here: the child process of planner/compile.py.

Reads {"platform", "topology", "settings", "machine", "memory"} from standard input, and writes one line of JSON, the
fields of planner.compile.Compiled. It runs where the platform's compiler is installed. Exit code 2 with a reason.
"""

import json
import sys
import time
from dataclasses import replace

import jax

from config import compose
from config.layout import mesh_sizes
from config.schema import Config
from parallel.mesh import make_mesh
from performance import hlo
from performance.collectives import collectives, summary
from performance.roofline import MACHINES, kernels
from performance.targets import H200
from runtime.exit_codes import DONE, MISTAKE
from runtime.start import GPU_FLAGS, add_flags, start
from runtime.xla_flags import known
from training.job import abstract_batch, make_job

NOT_THERE = ("--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false")  # nothing to tune on
PRICED = {"H100": "h100", "H200": "h200", "^TPU v5p?$": "v5p"}  # kinds whose kernels have a least time


def devices_of(asked: dict, config: Config) -> list:
    """Devices that programs can be compiled for."""
    if asked["platform"] == "cpu":
        start(replace(config.runtime, platform="cpu", cpu_devices=int(asked["topology"])))
        return jax.devices()
    from jax.experimental import topologies

    if asked["platform"] == "tpu":
        return topologies.get_topology_desc(asked["topology"], platform="tpu").devices
    target = H200.replace("150000000000", str(int(asked["memory"])))
    if asked["machine"] == "H100":
        target = target.replace("4800000000000", "3350000000000").replace("NVIDIA H200", "NVIDIA H100 80GB HBM3")
    return topologies.get_topology_desc(platform="cuda", target_config=target, topology=asked["topology"]).devices


def compiled(asked: dict) -> dict:
    """Compiles it; nothing is allocated. Raises what the compiler raises."""
    if asked["platform"] == "gpu":
        add_flags(known((*GPU_FLAGS, *NOT_THERE)))
    config, began = compose.load(asked["settings"]), time.perf_counter()
    devices = devices_of(asked, config)
    mesh = make_mesh(mesh_sizes(config, len(devices)), devices)
    target = {"gpu": "cuda"}.get(asked["platform"], asked["platform"])
    with jax.set_mesh(mesh):
        job = make_job(config, mesh)
        batch = abstract_batch(config.train, mesh, segments=config.data.segments)
        program = job.step.trace(job.abstract, batch).lower(lowering_platforms=(target,)).compile()
    memory, text = program.memory_analysis(), program.as_text()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "flops": (program.cost_analysis() or {}).get("flops"),
        "collectives": exchanged(text, mesh),
        "largest": largest(text),
        "least_s": least(text, asked["machine"]),
        "seconds": time.perf_counter() - began,
    }


def exchanged(text: str, mesh) -> list[dict]:
    """Collectives by kind and axes, the largest first."""
    found = sorted(summary(collectives(text, mesh)).items(), key=lambda row: -row[1][1])
    apart = lambda kind: f"{kind}-start" in text or "async_collective_fusion_config" in text
    return [
        {"kind": kind, "axes": list(axes), "times": times, "bytes": size, "asynchronous": apart(kind)}
        for (kind, axes), (times, size) in found
    ]


def largest(text: str, count: int = 3) -> list[tuple[str, float]]:
    """The largest arrays that the program's instructions make, parameters apart."""
    sizes = {}
    for computation in hlo.parse(text)[0].values():
        for instruction in computation.values():
            if instruction.opcode in ("parameter", "tuple", "get-tuple-element", "while", "constant", "bitcast"):
                continue
            for array in hlo.arrays(instruction.shape):
                sizes[f"{array.dtype}[{','.join(map(str, array.dims))}]"] = array.bytes
    return sorted(sizes.items(), key=lambda item: -item[1])[:count]


def least(text: str, kind: str) -> float | None:
    """Seconds of all kernels at the machine's rates; None where these are not known."""
    if kind not in PRICED:
        return None
    machine = MACHINES[PRICED[kind]]
    return sum(kernel.seconds(machine) for kernel in kernels(text))


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
