"""Compiles the training step for machines that are not here, and checks what the compiler says.

    make test-aot                         # all products, each platform's in an environment of its own
    make test-aot-tpu ONLY="context pipe" # some of them

For each product of tests/aot/machines.py: memory a device, FLOPs, compile time and collectives are printed; it must fit
into the device's memory, its arguments must be the size that arithmetic gives, the compiler must not have had to copy a
whole array to every device to change its layout, only the axes meant to cross the slow network may do so, and attention
must run in its fused kernel unless a ring or the product says otherwise. A process loads the compiler of one platform.
Exit code 1 if a product fails.
"""

import contextlib
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

from runtime import compiler_flags

if __name__ == "__main__":
    if sys.argv[1:2] not in (["gpu"], ["tpu"]):
        print("error: python -m tests.aot.check gpu|tpu [PRODUCT ...]", file=sys.stderr)
        sys.exit(2)
    compiler_flags.without_devices(sys.argv[1])

import jax

from config import compose, layout, schema
from model.counts import flops_per_token, parameter_count
from parallel.mesh import AXES, crossings, make_mesh, slow_network_warning
from performance.collectives import Collective, collectives, describe
from runtime.memory import temporary_bytes
from tests.aot.machines import COMMON, MACHINES, PRODUCTS, Machine, Product
from training.job import Job, abstract_batch, make_job

KERNELS = r"splash_mha_(?:fwd|dq|dkv)|__cudnn\$fmha\w+"  # of attention, in a program's text
INVOLUNTARY = "nvoluntary full rematerialization"  # what XLA's partitioner warns of: an array is gathered whole


@dataclass(frozen=True)
class Program:
    """A training step, compiled."""

    config: schema.Config
    job: Job
    compiled: jax.stages.Compiled
    lower_s: float
    compile_s: float
    said: list[str]  # by the compiler, on stderr
    found: list[Collective]
    kernels: set[str]  # of fused attention


def build(product: Product, machine: Machine) -> Program:
    """Compiles the step of a product. Nothing is allocated."""
    devices, began = machine.devices(), time.perf_counter()
    sizes = dict.fromkeys(AXES, 1) | product.mesh
    rows = len(devices) // (sizes["context"] * sizes["tensor"])  # as many sequences as devices that share none
    chosen = [f"model={product.model}", f"train.batch_size={rows}", *(f"mesh.{a}={n}" for a, n in sizes.items())]
    cfg = compose.load([*chosen, *COMMON, *product.overrides])
    mesh = make_mesh(layout.mesh_sizes(cfg, len(devices)), devices)
    with jax.set_mesh(mesh):
        job = make_job(cfg, mesh)
        batch = abstract_batch(cfg.train, mesh, segments=cfg.data.segments)
        target = {"gpu": "cuda"}.get(machine.platform, machine.platform)
        lowered = job.step.trace(job.abstract, batch).lower(lowering_platforms=(target,))
    lowered_at = time.perf_counter()
    with captured_stderr() as said:
        compiled = lowered.compile()
    compile_s = time.perf_counter() - lowered_at
    text = compiled.as_text()
    found, kernels = collectives(text, mesh), set(re.findall(KERNELS, text))
    return Program(cfg, job, compiled, lowered_at - began, compile_s, said, found, kernels)


@contextlib.contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Collects the lines that compilers, which are C++, write to file descriptor 2."""
    lines: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().splitlines()


def state_bytes(job: Job) -> int:
    """Bytes of a device's share of parameters, moments and the rest of the state."""
    leaves = jax.tree.leaves(job.abstract)
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)


def report(name: str, product: Product, program: Program) -> str:
    """What there is to know of a program, for a reader."""
    cfg, memory, mesh = program.config, program.compiled.memory_analysis(), program.job.mesh
    tokens, parameters = cfg.train.batch_size * cfg.train.seq_len, parameter_count(cfg.model).total
    model_flops = flops_per_token(cfg.model, cfg.train.seq_len) * tokens / mesh.size
    counted = (program.compiled.cost_analysis() or {}).get("flops")  # GPU: none; TPU: the body of a loop counts once
    flops = f"{counted / 1e12:.1f}e12 by the compiler, loops once" if counted else "unknown to the compiler"
    needed = temporary_bytes(memory, MACHINES[product.machine].platform)
    size = memory.argument_size_in_bytes, state_bytes(program.job), needed
    arguments, arithmetic, temporaries = (f"{n / 1e9:.2f}" for n in size)
    crossing = ", ".join(f"{axis} ({n} slices or hosts)" for axis, n in crossings(mesh).items())
    lines = [
        f"\n=== {name}: {product.model}, {parameters / 1e9:.2f}e9 parameters, on {product.machine}",
        "mesh        " + " ".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1),
        f"a step      {tokens:,} tokens, {cfg.train.batch_size} x {cfg.train.seq_len}",
        f"arguments   {arguments} GB a device, {arithmetic} by arithmetic",
        f"temporaries {temporaries} GB, code {memory.generated_code_size_in_bytes / 1e9:.2f} GB",
        f"FLOPs       {model_flops / 1e12:.1f}e12 a device of the model, {flops}",
        f"seconds     {program.lower_s:.1f} to lower, {program.compile_s:.1f} to compile",
        f"crossing    {crossing or 'nothing'}",
        f"attention   {' '.join(sorted(program.kernels)) or 'plain'}",
        describe(program.found),
    ]
    return "\n".join(lines)


def problems(product: Product, machine: Machine, program: Program) -> list[str]:
    """What is wrong with a program."""
    memory, mesh, wrong = program.compiled.memory_analysis(), program.job.mesh, []
    used = (
        memory.argument_size_in_bytes + temporary_bytes(memory, machine.platform) + memory.generated_code_size_in_bytes
    )
    if used > machine.memory:
        wrong.append(f"needs {used / 1e9:.2f} GB a device of {machine.memory / 1e9:.2f}")
    if not 0.98 < memory.argument_size_in_bytes / state_bytes(program.job) < 1.02:
        wrong.append(f"arguments are {memory.argument_size_in_bytes} bytes, {state_bytes(program.job)} by arithmetic")
    if involuntary := [line for line in program.said if INVOLUNTARY in line]:
        wrong.append(f"{len(involuntary)} arrays gathered whole, the first: {involuntary[0][:400]}")
    plain = program.config.model.attention_kernel == "plain" or mesh.shape["context"] > 1
    if not plain and not program.kernels:
        wrong.append("attention has no fused kernel")
    crossed = {axis for c in program.found for axis in c.axes} & crossings(mesh).keys()
    if crossed - product.crossing or slow_network_warning(mesh):
        wrong.append(f"{' '.join(sorted(crossed))} cross, meant to: {' '.join(sorted(product.crossing)) or 'nothing'}")
    return wrong


def main(platform: str, *names: str) -> int:
    """Checks the named products, or all of a platform; returns the exit code."""
    ours = {name: product for name, product in PRODUCTS.items() if MACHINES[product.machine].platform == platform}
    if unknown := set(names) - ours.keys():
        print(f"error: unknown products {' '.join(unknown)}; {platform} has {' '.join(ours)}", file=sys.stderr)
        return 2
    failures, chosen = [], names or ours
    for name in chosen:
        product, machine = ours[name], MACHINES[ours[name].machine]
        program = build(product, machine)
        print(report(name, product, program), flush=True)
        failures += [f"FAILED {name}: {problem}" for problem in problems(product, machine, program)]
    print("\n".join(["", *failures, f"{len(chosen)} products compiled, {len(failures)} problems"]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
