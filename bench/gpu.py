"""Training on NVIDIA GPUs beside PyTorch: python bench/gpu.py --all --minutes 9 --torch-python PYTHON --out FILE.

`--all` is for whoever has a GPU for some minutes: correctness first (bench/gpu_checks.py), then each work on both sides
with the settings known to be best, and the dearest kernels of both; with several GPUs also fsdp, data and tensor. While
one process runs, the next compiles, and nothing compiles while something is timed. Every line is on disk at once.

Without `--all`, the best settings are searched: python bench/gpu.py [--only gpt2_124m] [--quick] [--out FILE].

For each work, isomesh and its PyTorch twin (bench/torch_twin.py) first try a few batch sizes and remat policies, each
in a process of its own, so that running out of memory costs one try only; then the fastest of each side run in turns
(A B A B), each process alone. Printed, and appended to --out, is one JSON line a process, and one for each work:
medians, their ratio, MFU against a measured matmul and against the data sheet, and whether the marks are passed.

isomesh uses every visible GPU, the twin one, and figures are per GPU: CUDA_VISIBLE_DEVICES=0 compares like with like.
Nothing is downloaded. isomesh runs in the Python that runs this script, which needs jax[cuda13], flax, optax, orbax and
hydra-core (`make setup EXTRAS=cuda`); the twin in that of --torch-python, which needs PyTorch 2.10 for CUDA; they may
be the same. A work stops at its share of --minutes: give --only where a command may run for ten minutes only.

    python bench/gpu.py --platform cpu --tiny --torch-python PATH    # all the way through on a machine without a GPU
"""

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from gpu_steps import WORKS, Try, overrides_of

from config import compose
from model.config import ModelConfig
from model.counts import flops_per_token

TWIN = Path(__file__).with_name("torch_twin.py")
CHECKS = Path(__file__).with_name("gpu_checks.py")
STEPS = Path(__file__).with_name("gpu_steps.py")
DATA_SHEET = 989.4e12  # FLOP/s of an H100 or H200 SXM in bfloat16, dense


# ------------------------------------------------------------------------------------------- the process above them all


class Bench:
    """Runs processes one after the other within a time limit, and writes down what each says."""

    def __init__(self, given: argparse.Namespace):
        self.given, self.ends = given, time.monotonic() + 60 * given.minutes
        self.machine = f"{platform.node()}, {os.cpu_count()} cores"

    def write(self, record: dict) -> dict:
        """Prints a line and appends it to the results."""
        record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "machine": self.machine, **record}
        print(json.dumps(record), flush=True)
        if self.given.out:
            with open(self.given.out, "a") as file:
                file.write(json.dumps(record) + "\n")
        return record

    def begin(self, command: list[str], **environment: str) -> subprocess.Popen:
        """Starts a process, the head of a group of its own, whose output goes to files."""
        out, err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115 (closed in finish)
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=err, text=True,
            start_new_session=True, env=os.environ | environment,
        )  # fmt: skip
        process.out, process.err = out, err
        return process

    def finish(self, process: subprocess.Popen, record: dict, until: float) -> list[dict]:
        """What a process says, one record a line; `failed` is why it says nothing: out of memory, out of time, or its
        last words. It is ended with its children where it takes too long.
        """
        with contextlib.suppress(OSError):
            process.stdin.write("go\n")
            process.stdin.close()
        late = False
        try:
            process.wait(max(until - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            late = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # children, too: one that is left would hold the memory
        process.wait()
        said = []
        for file in (process.out, process.err):
            file.seek(0)
            said.append(file.read())
            file.close()
        found = [record | json.loads(line) for line in said[0].splitlines() if line.startswith("{")]
        if late:
            return [*found, record | {"failed": "out of time"}]
        if process.returncode or not found:
            memory = re.search(r"RESOURCE_EXHAUSTED|out of memory|OutOfMemory", said[1], re.IGNORECASE)
            last = (said[1].strip().splitlines() or [f"exit code {process.returncode}"])[-1][:300]
            return [*found, record | {"failed": "out of memory" if memory else last}]
        return found

    def process(self, kind: str, record: dict, command: list[str], until: float) -> dict:
        """The last that a process says."""
        return self.finish(self.begin(command), {"kind": kind, **record}, until)[-1]

    def attempt(self, name: str, who: str, attempt: Try, seconds: float, until: float) -> dict:
        """One process of isomesh or of the twin; its line has tokens/s for each GPU."""
        command, record = self.command(name, who, attempt, seconds)
        return self.steps(self.finish(self.begin(command), record, until)[-1])

    def command(self, name: str, who: str, attempt: Try, seconds: float, **more) -> tuple[list[str], dict]:
        """How a process is started, and what its line begins with."""
        work, model, seq_len = WORKS[name], *self.model(name)
        told = {"work": name, **asdict(attempt), "platform": self.given.platform, "tiny": self.given.tiny, **more}
        told |= {
            "seconds": seconds,
            "window": 1 if self.given.tiny else max(1, 5 * 1024 // seq_len),
            "seq_len": seq_len,
        }
        if who == "isomesh":
            command = [sys.executable, str(STEPS), json.dumps(told)]
        else:
            told |= {"model": asdict(model), "param_dtype": work.twin_param_dtype}
            command = [self.given.torch_python, str(TWIN), json.dumps(told)]
        dtype = work.twin_param_dtype if who == "torch" else "float32"
        record = {
            "kind": "steps",
            "work": name,
            "who": who,
            **asdict(attempt),
            "seq_len": seq_len,
            "param_dtype": dtype,
        }
        return command, record

    def steps(self, line: dict) -> dict:
        """Writes the line of a process that trained, and what its kernels were."""
        if kernels := line.pop("kernels", None):
            line |= {"kernels_ms": kinds(kernels), "dearest": dearest(kernels)}
        if "step_s" in line:
            line["tokens_per_s"] = line["batch"] * line["seq_len"] / statistics.median(line["step_s"])
            line["step_s"] = [round(s, 6) for s in line["step_s"]]
        return self.write(line)

    def model(self, name: str) -> tuple[ModelConfig, int]:
        """A work's model, and the length of its sequences."""
        cfg = compose.load(overrides_of(WORKS[name], Try(1), 1, self.given.tiny))
        return cfg.model, cfg.train.seq_len

    def best(self, name: str, who: str, until: float) -> Try | None:
        """The fastest of a side's tries; None where all failed."""
        work = WORKS[name]
        tries = work.ours if who == "isomesh" else work.twin
        if self.given.quick:
            return tries[0]
        speeds: dict[Try, float] = {}
        for attempt in tries:
            speeds[attempt] = self.attempt(name, who, attempt, self.given.seconds / 4, until).get("tokens_per_s", 0)
        fastest = max(speeds, key=speeds.get)
        return fastest if speeds[fastest] else None

    def compare(self, name: str, peak: float | None, until: float) -> dict:
        """Searches, then runs the two sides in turns; the line that a reader looks for."""
        sides = ["isomesh", *(["torch"] if self.given.torch_python else [])]
        searched = time.monotonic() + 0.6 * (until - time.monotonic())
        best = {}
        for number, who in enumerate(sides, 1):  # a slow compiler may not take the other side's time
            left = searched - time.monotonic()
            best[who] = self.best(name, who, time.monotonic() + left / (len(sides) - number + 1))
        speeds = {who: [] for who in sides if best[who]}
        for _ in range(1 if self.given.quick else self.given.rounds):
            for who in speeds:
                line = self.attempt(name, who, best[who], self.given.seconds, until)
                speeds[who] += [line["tokens_per_s"]] if "tokens_per_s" in line else []
        medians = {who: statistics.median(found) for who, found in speeds.items() if found}
        return self.write(self.verdict(name, best, medians, peak))

    def verdict(self, name: str, best: dict[str, Try | None], medians: dict[str, float], peak: float | None) -> dict:
        """Figures of both sides and whether the marks are passed."""
        work, model, seq_len = WORKS[name], *self.model(name)
        flops = flops_per_token(model, seq_len)
        record = {"kind": "result", "work": name, "tokens_per_s": medians, "mark": work.mark, "aim": work.aim}
        record["best"] = {who: asdict(attempt) for who, attempt in best.items() if attempt}
        record["mfu_of_989"] = {who: speed * flops / DATA_SHEET for who, speed in medians.items()}
        record["mfu_of_989_full_attention"] = {
            who: speed * flops_per_token(model, seq_len, full_attention=True) / DATA_SHEET
            for who, speed in medians.items()
        }
        if peak:
            record["mfu_of_matmul"] = {who: speed * flops / peak for who, speed in medians.items()}
        ours, twin = medians.get("isomesh"), medians.get("torch")
        if ours and twin:
            record |= {"ratio": ours / twin, "ahead_of_twin": ours > twin}
        if ours and work.mark:
            record |= {"mark_passed": ours >= work.mark}
        return record


# --------------------------------------------------------------------------------------------------- all in one command


def kinds(kernels: dict[str, float]) -> dict[str, float]:
    """Milliseconds a step by kind of kernel, of either side."""
    found = Counter()
    for name, ms in kernels.items():
        lower = name.lower()
        attention = re.search(r"sdpa|fmha|flash|dot_do_o|convert_dq", lower)
        multiply = re.search(r"nvjet|gemm|cutlass|cublas|splitk|matmul|grouped_mm", lower)
        copy = re.search(r"memcpy|memset|copy", lower)
        found["attention" if attention else "matmul" if multiply else "copies" if copy else "everything else"] += ms
    return {kind: round(ms, 3) for kind, ms in found.most_common()} | {"all": round(sum(kernels.values()), 3)}


def dearest(kernels: dict[str, float], count: int = 10) -> list[list]:
    """The ten kernels that cost most."""
    return [[name[:90], round(ms, 3)] for name, ms in sorted(kernels.items(), key=lambda item: -item[1])[:count]]


def everything(bench: Bench) -> None:
    """Correctness, then every work on both sides; while one process is timed the next waits, having compiled."""
    given, lock = bench.given, tempfile.NamedTemporaryFile()  # noqa: SIM115 (as long as the process)
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # processes that compile ahead leave the others their memory
    told = {"platform": given.platform, "tiny": given.tiny, "lock": lock.name, "overrides": []}
    checks = {}
    for kind in ("starts", "numbers", "resume"):
        command = [sys.executable, str(CHECKS), json.dumps({**told, "kind": kind})]
        checks[kind] = bench.begin(command, **({} if kind == "starts" else shared))
        if kind == "starts":
            for line in bench.finish(checks.pop(kind), {"kind": "check"}, bench.ends):
                bench.write(line)
    names = given.only.split(",")
    sides = [("isomesh", WORKS[n].ours[0]) for n in names]
    ahead = {}

    def compile_ahead(number: int) -> None:
        if number < len(names):
            command, record = bench.command(names[number], *sides[number], given.seconds, lock=lock.name, profile=True)
            ahead[number] = bench.begin(command, **shared), record

    compile_ahead(0)
    for kind, process in checks.items():
        for line in bench.finish(process, {"kind": "check", "group": kind}, bench.ends):
            bench.write(line)
    for number, name in enumerate(names):
        process, record = ahead.pop(number)
        ours = bench.steps(bench.finish(process, record, bench.ends)[-1])
        twin = None
        compile_ahead(number + 1)
        if given.torch_python:
            command, record = bench.command(
                name, "torch", WORKS[name].twin[0], given.seconds, lock=lock.name, profile=True
            )
            twin = bench.steps(bench.finish(bench.begin(command), record, bench.ends)[-1])
        speeds = {line["who"]: line["tokens_per_s"] for line in (ours, twin) if line and "tokens_per_s" in line}
        best = {"isomesh": WORKS[name].ours[0], "torch": WORKS[name].twin[0]}
        verdict = bench.verdict(name, best, speeds, None)
        bench.write(
            verdict | {"memory_bytes": {side["who"]: side.get("memory_bytes") for side in (ours, twin) if side}}
        )
    meshes(bench, names[0])


def meshes(bench: Bench, name: str) -> None:
    """With several GPUs, the first work split in each way."""
    count = "import jax; print(len(jax.devices('gpu')))"
    found = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True).stdout.strip()
    if not found.isdigit() or int(found) < 2:
        return
    attempt = WORKS[name].ours[0]
    for axis in ("fsdp", "data", "tensor"):
        mesh = ("mesh.fsdp=1", f"mesh.{axis}=-1")
        split = Try(attempt.batch, attempt.remat, (*attempt.overrides, *mesh))
        bench.attempt(name, "isomesh", split, bench.given.seconds, bench.ends)


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="correctness, then every work on both sides, once")
    parser.add_argument("--only", default=",".join(WORKS), help="works, separated by commas")
    parser.add_argument("--torch-python", help="the Python that has PyTorch; without it no twin runs")
    parser.add_argument("--out", help="file to append JSON lines to")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all works together")
    parser.add_argument("--seconds", type=float, default=20.0, help="that a measured process trains for")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side")
    parser.add_argument("--quick", action="store_true", help="the first try of each side, one turn")
    parser.add_argument("--platform", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--tiny", action="store_true", help="small models, to check the script itself")
    given = parser.parse_args()
    if unknown := set(given.only.split(",")) - WORKS.keys():
        parser.error(f"--only: {', '.join(sorted(unknown))} unknown; choose from {', '.join(WORKS)}")
    return given


def main() -> None:
    given = arguments()
    bench, names = Bench(given), given.only.split(",")
    if given.all:
        everything(bench)
        return
    told = json.dumps({"platform": given.platform, "tiny": given.tiny})
    peak = bench.write(bench.process("matmul", {}, [sys.executable, str(STEPS), told], bench.ends)).get("flops")
    for number, name in enumerate(names):
        now = time.monotonic()
        bench.compare(name, peak, now + (bench.ends - now) / (len(names) - number))


if __name__ == "__main__":
    main()
