"""What growth costs: python bench/growth.py [--only DIAL ...] [--write].

Each point is a process alone and changes one dial of a base that resembles the preset nano: width, layers, sequence,
batch, simulated devices (at the same global batch). A table of tokens/s, memory of the compiled step (arguments and
temporaries, a device) and compile seconds is printed; --write puts it into bench/RESULTS.md with bench/growth.png.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.peers import machine

ROOT = Path(__file__).parent.parent
RESULTS, PLOT = ROOT / "bench/RESULTS.md", ROOT / "bench/growth.png"
MARKS = "<!-- growth: begin -->", "<!-- growth: end -->"
BASE = ("model=nano", "optimizer=adamw", "train.batch_size=16", "train.seq_len=128", "runtime.platform=cpu")
STEPS = 5


@dataclass(frozen=True)
class Point:
    """One row: the dial, its value, and what that sets. Without steps it is only compiled."""

    dial: str
    value: int
    overrides: tuple[str, ...]
    devices: int = 1
    steps: int = STEPS


def points() -> list[Point]:
    """Every row, dial by dial; each dial goes through the base."""
    wide = lambda width: (f"width={width}", f"heads={width // 32}", f"kv_heads={width // 32}", f"ffn={4 * width}")
    spread = lambda axis, n: ("mesh.fsdp=1", "mesh.data=1", f"mesh.{axis}={n}")
    return [
        *(Point("width", n, tuple(f"model.{part}" for part in wide(n))) for n in (128, 256, 512)),
        *(Point("layers", n, (f"model.layers={n}",)) for n in (2, 4, 8, 16)),
        *(Point("sequence", n, (f"train.seq_len={n}",)) for n in (128, 256, 512, 1024)),
        *(Point("batch", n, (f"train.batch_size={n}",)) for n in (4, 8, 16, 32)),
        *(Point(axis, n, spread(axis, n), n) for axis in ("fsdp", "data") for n in (1, 2, 4, 8)),
        *(Point("scanned layers", n, (f"model.layers={n}", "model.scan_layers=true"), steps=0) for n in (8, 80)),
    ]


# --------------------------------------------------------------------------------------------------- a point's process


def measure(point: Point) -> dict:
    """Compiles the step and times it, in this process."""
    import jax

    from config import compose, layout
    from model.counts import parameter_count
    from parallel.mesh import make_mesh
    from parallel.sharding import put_batch
    from runtime import heap
    from runtime.config import RuntimeConfig
    from runtime.start import start
    from training.job import make_job
    from training.parity import random_batch

    cfg = compose.load([*BASE, *point.overrides])
    start(RuntimeConfig(platform="cpu", cpu_devices=point.devices, compile_cache=None))
    mesh, t = make_mesh(layout.mesh_sizes(cfg, point.devices)), cfg.train
    with jax.set_mesh(mesh):
        job = make_job(cfg, mesh)
        batch = put_batch(mesh, random_batch(cfg, 0, slice(0, t.batch_size)), t.batch_size)
        began = time.perf_counter()
        step = job.compile(job.step, batch)
        compile_s, memory = time.perf_counter() - began, step.memory_analysis()
        state, seconds = job.init(0) if point.steps else None, []
        heap.make_room(memory.temp_size_in_bytes * point.devices)
        for _ in range(point.steps and 2 + point.steps):  # two that do not count
            began = time.perf_counter()
            state, _ = step(state, batch)
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - began)
    speed = t.batch_size * t.seq_len / statistics.median(seconds[2:]) if seconds else None
    return {
        "dial": point.dial,
        "value": point.value,
        "parameters": parameter_count(cfg.model).total,
        "tokens_per_s": speed,
        "step_mib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20,
        "compile_s": compile_s,
    }


def alone(number: int) -> dict:
    """A point, measured in a process of its own."""
    command = [sys.executable, __file__, "--point", str(number)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{points()[number]} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def first_loss() -> dict:
    """Seconds from the start of train.py on nano to its first line of metrics: cold, then with a warm compile cache."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            run = Path(folder, name)
            keys = ["train.steps=2", "train.eval_every=0", "train.log_every=1", "checkpoint.every=0", "sample.tokens=0"]
            own = [f"run.dir={run}", f"runtime.compile_cache={folder}/xla", "wandb.mode=disabled"]
            command = [sys.executable, "train.py", *keys, *own]
            began = time.perf_counter()
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            while not lines_with_a_loss(run / "metrics.jsonl") and process.poll() is None:
                time.sleep(0.02)
            found[name] = time.perf_counter() - began
            if process.wait():
                raise RuntimeError(process.stderr.read().decode()[-2000:])
    return {"dial": "first loss", **found}


def lines_with_a_loss(path: Path) -> int:
    return path.read_text().count('"train/loss"') if path.exists() else 0


# --------------------------------------------------------------------------------------------------------- the results


def base_of(rows: list[dict]) -> dict:
    """The row of a dial that others are relative to: the base's, where tokens/s were measured."""
    values = {"width": 128, "layers": 4, "sequence": 128, "batch": 16, "fsdp": 1, "data": 1, "scanned layers": 8}
    return next((row for row in rows if row["value"] == values[row["dial"]]), rows[0])


def table(rows: list[dict]) -> str:
    """Markdown: a line for each point, with its tokens/s, memory and compile time beside those of the base."""
    lines = [
        "| | | parameters | tokens/s | of base | step MiB | of base | compile s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        base = base_of([other for other in rows if other["dial"] == row["dial"]])
        speed, relative = "", f"{row['compile_s'] / base['compile_s']:.2f}x compile"
        if row["tokens_per_s"]:
            speed, relative = f"{row['tokens_per_s']:,.0f}", f"{row['tokens_per_s'] / base['tokens_per_s']:.2f}"
        memory = f"{row['step_mib']:,.0f} | {row['step_mib'] / base['step_mib']:.2f}"
        size = f"{row['parameters'] / 1e6:.2f}M"
        lines.append(
            f"| {row['dial']} | {row['value']} | {size} | {speed} | {relative} | {memory} | {row['compile_s']:.1f} |"
        )
    return "\n".join(lines)


def section(rows: list[dict], started: dict | None) -> str:
    """The part of RESULTS.md that this program owns."""
    m = machine()
    begun = (
        ""
        if started is None
        else (
            f"\nTime from the start of `train.py` (nano) to its first loss: {started['cold']:.1f} s, "
            f"with a warm compile cache {started['warm']:.1f} s.\n"
        )
    )
    return (
        f"## The cost of growth\n\n`python bench/growth.py --write` on {m['cpu']}, {m['cores']} cores, "
        f"{time.strftime('%Y-%m-%d', time.gmtime())}. Base: `{' '.join(BASE)}`. Memory: arguments and temporaries of "
        f"the compiled step, a device; devices are simulated and share the cores, at the same global batch.\n\n"
        f"{table(rows)}\n{begun}\n![growth](growth.png)\n"
    )


def replaced(text: str, part: str) -> str:
    """The text with `part` between the marks; at its end if it has none."""
    begin, end = MARKS
    before, found, rest = text.partition(begin)
    after = rest.partition(end)[2] if found else "\n"
    return f"{before}{begin}\n{part}{end}{after}"


def plot(rows: list[dict], path: Path) -> None:
    """Tokens/s and memory over each dial, both axes logarithmic. Raises ValueError without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ValueError("--write draws with matplotlib, which is not installed; it is in the extra `dev`") from error
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for dial in dict.fromkeys(row["dial"] for row in rows if row["tokens_per_s"]):
        mine = [row for row in rows if row["dial"] == dial]
        base = base_of(mine)
        x = [row["value"] / base["value"] for row in mine]
        for panel, name in zip(panels, ("tokens_per_s", "step_mib"), strict=True):
            panel.plot(x, [row[name] / base[name] for row in mine], marker="o", label=dial)
    for panel, title in zip(panels, ("tokens/s", "memory of a step, a device"), strict=True):
        panel.set(xscale="log", yscale="log", title=title, xlabel="dial over base", ylabel="over base")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(given: argparse.Namespace) -> None:
    rows, known = [], points()
    dials = list(dict.fromkeys(point.dial for point in known))
    for dial in given.only:
        if dial not in [*dials, "first loss"]:
            raise ValueError(f"--only {dial!r} is unknown; choose of {', '.join([*dials, 'first loss'])}")
    for number, point in enumerate(known):
        if not given.only or point.dial in given.only:
            rows.append(alone(number))
            print(json.dumps(rows[-1]), flush=True)
    started = first_loss() if not given.only or "first loss" in given.only else None
    print("\n".join([*([table(rows)] if rows else []), *([json.dumps(started)] if started else [])]))
    if given.write:
        plot(rows, PLOT)
        before = RESULTS.read_text() if RESULTS.exists() else "# Results of bench/\n\n"
        RESULTS.write_text(replaced(before, section(rows, started)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="DIAL", help="these dials; also 'first loss'")
    parser.add_argument("--write", action="store_true", help="into bench/RESULTS.md and bench/growth.png")
    parser.add_argument("--point", type=int, help=argparse.SUPPRESS)  # in the process of one point
    given = parser.parse_args()
    try:
        print(json.dumps(measure(points()[given.point]))) if given.point is not None else main(given)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
