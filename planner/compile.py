"""The best layouts given to the real compilers, without a device: `python -m planner ... --compile K`.

A process loads the compiler of one platform, and each lives in an environment of its own (.venv-aot-tpu,
.venv-aot-gpu; that for CPUs is everywhere): every layout is compiled in a child process there,
planner/compiled_step.py, which is told what on its standard input and answers on its standard output. No JAX here.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from planner.cost import Planner, Prediction
from planner.machine import torus_dims
from planner.report import command
from runtime.compiler_flags import ENVIRONMENT

ROOT = Path(__file__).parent.parent
GPUS = ("H100", "H200")  # kinds that performance.targets can describe to the compiler
SECONDS = 1800  # that one compilation may take


class Refused(ValueError):
    """A layout that the compiler does not compile, which may be all that one wants to know of it."""


@dataclass(frozen=True)
class Compiled:
    """What a compiler says of one layout; bytes are those of a device."""

    prediction: Prediction
    arguments: float  # state and batch
    temporary: float
    code: float
    flops: float | None  # of a device, loops once; None where the compiler does not say
    collectives: list[dict]  # kind, axes, times, bytes, asynchronous
    largest: list[tuple[str, float]]  # shapes of temporaries and their bytes
    least_s: float  # the least time of all kernels at the data sheet's rates (performance.roofline)
    seconds: float  # of compiling

    @property
    def memory(self) -> float:
        """All that the program needs."""
        return self.arguments + self.temporary + self.code

    @property
    def fits(self) -> bool:
        """Whether the program fits where the planner said that it does."""
        return self.memory <= self.prediction.limit


def topology(planner: Planner) -> str:
    """The compilers' name of the devices: v5e:16x16, hosts x 1 x GPUs, or how many CPUs. Else ValueError."""
    machine, devices = planner.machine, planner.devices
    if machine.platform == "tpu":
        if devices > machine.domain:
            raise ValueError(f"--compile: {devices} chips are more than a slice's {machine.domain}; plan one slice")
        kind = machine.name.removeprefix("TPU ").lower().partition(",")[0]
        dims = torus_dims(devices, machine.torus)
        return f"{kind}:{'x'.join(map(str, dims))}"
    if machine.platform == "gpu" and machine.kind in GPUS:
        hosts = max(devices // machine.domain, 1)
        return f"{hosts}x1x{min(devices, machine.domain)}"
    if machine.platform == "cpu":
        return str(devices)
    raise ValueError(f"--compile: no compiler here knows {machine.name}; it works for TPUs and {', '.join(GPUS)}")


def interpreter(platform: str) -> Path:
    """The Python that has the platform's compiler. Raises ValueError where there is none, with what makes it."""
    if platform == "cpu":
        return Path(sys.executable)
    python = ROOT / f".venv-aot-{platform}" / "bin" / "python"
    if not python.exists():
        size = {"tpu": "1.5 GB", "gpu": "5 GB"}[platform]
        raise ValueError(
            f"--compile needs the compiler for {platform.upper()}s: run `make aot-{platform}` once ({size})"
        )
    return python


def question(planner: Planner, settings: list[str]) -> dict:
    """What planner.compiled_step is asked of a run with these settings. Raises ValueError as `topology`."""
    machine = planner.machine
    asked = {"platform": machine.platform, "topology": topology(planner), "settings": settings}
    rates = {"flops": machine.peak(planner.dtype), "bandwidth": 1e9 * machine.memory_gb_s, "source": machine.source}
    asked |= {"machine": machine.kind, "memory": machine.memory_gib * 2**30}
    return asked | {"rates": {"name": machine.name} | rates}


def compiled(planner: Planner, prediction: Prediction, settings: list[str], text: Path | None = None) -> Compiled:
    """Compiles the real training step of a layout, and writes the program's text where `text` says.

    Raises Refused where the compiler refuses it, with its reason; ValueError where it comes to no answer.
    """
    platform = planner.machine.platform
    asked = question(planner, command(settings, prediction)) | ({"text": str(text)} if text else {})
    named = prediction.layout.told()
    try:
        child = subprocess.run(
            [interpreter(platform), "-m", "planner.compiled_step"],
            input=json.dumps(asked),
            env=os.environ | ENVIRONMENT[platform],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{named}: not compiled after {SECONDS / 60:.0f} minutes, which is all that it may take"
        ) from None
    if child.returncode < 0:
        raise ValueError(
            f"{named}: the compiler was ended by {signal.Signals(-child.returncode).name}; is memory short?"
        )
    if child.returncode:
        last = (child.stderr.strip() or "no reason").splitlines()[-1]
        raise Refused(f"{named}: the compiler refuses it: {last[:600]}")
    return Compiled(prediction, **json.loads(child.stdout.splitlines()[-1]))


def told(found: Compiled) -> str:
    """For people."""
    memory = found.prediction.memory
    predicted = memory.total - memory.fragmentation
    flops = "unknown" if found.flops is None else f"{found.flops / 1e12:,.1f}e12, loops once"
    least = f"{1e3 * found.least_s:,.1f} ms"
    verdict = "fits" if found.fits else "does not fit"
    lines = [
        f"{found.prediction.layout.told()}: {verdict}, compiled in {found.seconds:.0f} s",
        f"  memory      {found.memory / 1e9:.2f} GB a device of {found.prediction.limit / 1e9:.2f} (arguments "
        f"{found.arguments / 1e9:.2f}, temporary {found.temporary / 1e9:.2f}, code {found.code / 1e9:.2f}); predicted "
        f"{predicted / 1e9:.2f}, {predicted / found.memory - 1:+.1%}",
        f"  FLOPs       {flops}; least time by kernels {least}, predicted step {1e3 * found.prediction.step:,.1f} ms",
        "  largest     " + ", ".join(f"{shape} {size / 1e9:.2f} GB" for shape, size in found.largest),
    ]
    for c in found.collectives:
        how = "asynchronous" if c["asynchronous"] else "waited for"
        lines.append(f"  {c['kind']:20} {' '.join(c['axes']):16} {c['times']:>7,} x, {c['bytes'] / 1e9:,.2f} GB, {how}")
    return "\n".join(lines)
