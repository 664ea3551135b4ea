"""Where a step's time goes: traces some steps of a run, and tells it by kind of work, by scope, and by operation.

Reading it: docs/profiling.md.
"""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Protocol

import jax

from performance.throughput import Throughput
from performance.trace import UNKNOWN, Program, Shares, read_events, shares
from training.config import profiled_steps

CATEGORIES = (
    *("matmul", "attention", "loss", "optimizer", "norms, elementwise", "copies", "collectives exposed"),
    *("other programs", "idle"),
)
LONGEST = 10  # operations that the summary lists


def summary(total: Shares, program: Program, steps: int) -> dict:
    """Plain numbers: milliseconds a step of a device, and shares of its time."""
    scale, whole = 1e-6 / (steps * total.devices), total.window * total.devices
    row = lambda time: {"ms": time * scale, "share": time / whole}
    categories, matmuls, scopes = Counter(), Counter(), defaultdict(Counter)
    for name, time in total.operations.items():
        meaning = UNKNOWN if name is None else program.meaning(name)
        category = "other programs" if name is None else meaning.category
        categories[category] += time
        if name is not None:
            scopes[meaning.scope or "none"].update({"all": time, meaning.kind: time})
            matmuls[category] += time if meaning.kind == "matmul" else 0
    categories["idle"] = total.idle
    longest = [(name, time) for name, time in total.operations.most_common() if name is not None][:LONGEST]
    operations = [
        {"name": name, "scope": m.scope, "source": m.source, "kind": m.kind, **row(time)}
        | {"times_a_step": total.counts[name] / (steps * total.devices)}
        for name, time in longest
        for m in [program.meaning(name)]
    ]
    return {
        "step_ms": total.window * 1e-6 / steps,
        "categories": {c: row(categories[c]) | {"matmul_ms": matmuls[c] * scale} for c in CATEGORIES},
        "collectives_overlapped": row(total.overlapped),
        "scopes": {
            scope: row(kinds["all"]) | {f"{kind}_ms": kinds[kind] * scale for kind in ("matmul", "collective")}
            for scope, kinds in sorted(scopes.items(), key=lambda item: -item[1]["all"])
        },
        "operations": operations,
    }


def table(found: dict) -> str:
    """What was found in a trace as lines for the terminal: categories, scopes, longest operations, in ms a step."""
    lines = [found["title"], f"{'':24}{'ms a step':>12}{'share':>9}{'of it matmul':>15}"]
    for name, row in found["categories"].items():
        if row["ms"] or name not in ("other programs", "collectives exposed"):
            lines.append(f"{name:24}{row['ms']:12.2f}{row['share']:9.1%}{row['matmul_ms']:15.2f}")
    lines.append(f"{'a step':24}{found['step_ms']:12.2f}{1:9.1%}")
    hidden = found["collectives_overlapped"]
    if hidden["ms"]:
        lines.append(f"{'collectives overlapped':24}{hidden['ms']:12.2f}{hidden['share']:9.1%}  behind compute above")
    lines += ["", f"{'scope':24}{'ms a step':>12}{'share':>9}{'of it matmul':>15}{'collectives':>13}"]
    for name, row in found["scopes"].items():
        lines.append(
            f"{name:24}{row['ms']:12.2f}{row['share']:9.1%}{row['matmul_ms']:15.2f}{row['collective_ms']:13.2f}"
        )
    lines += ["", f"{'longest operations':32}{'ms a step':>12}{'share':>9}{'times':>7}  scope/source"]
    for row in found["operations"]:
        where = "/".join(filter(None, (row["scope"], row["source"])))
        lines.append(f"{row['name']:32}{row['ms']:12.2f}{row['share']:9.1%}{row['times_a_step']:7.1f}  {where}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# In the loop


class Notes(Protocol):
    """Who tells the user: a tracking.console.Console."""

    def note(self, text: str) -> None:
        """Says one line of information."""

    def warn(self, text: str) -> None:
        """Says one line that the user should act on; the run goes on."""


class ProfiledStep:
    """The compiled step, of which the calls that `train.profile` names are traced.

    `first` is the number of the last step that is behind. Each process traces its own devices into `directory`, the
    primary one directly, others in process_001 and so on. Nothing that goes wrong here stops the run.
    """

    def __init__(
        self, step: jax.stages.Compiled, steps: str, first: int, directory: Path, meter: Throughput, console: Notes
    ):
        self.step, self.number, self.meter, self.console = step, first, meter, console
        self.directory = directory / f"process_{jax.process_index():03d}" if jax.process_index() else directory
        self.begin, self.end = profiled_steps(steps) or (0, 0)
        self.begin = max(self.begin, first + 1)
        self.tracing = False
        if steps and self.begin > self.end:
            console.warn(f"train.profile={steps}: the run goes on after step {first}, nothing to trace")

    def __call__(self, state, batch):
        self.number += 1
        if self.number == self.begin <= self.end:
            jax.block_until_ready(state)  # the steps before are not part of it
            self._start()
        elif self.number == self.end + 1:
            jax.block_until_ready(state)
            self.close()
        if not self.tracing:
            return self.step(state, batch)
        with jax.profiler.StepTraceAnnotation("train", step_num=self.number):
            return self.step(state, batch)

    def close(self) -> None:
        """Ends the trace, if one is under way, and reports on it; the steps must be done."""
        if self.tracing:
            self.tracing = False
            with self.meter.pause():
                self._stop()

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would cost more than the step itself
        with self.meter.pause():
            try:
                jax.profiler.start_trace(self.directory, create_perfetto_trace=True, profiler_options=options)
                self.tracing = True
            except Exception as error:
                self.console.warn(f"no profile: {_reason(error)}")

    def _stop(self) -> None:
        try:
            jax.profiler.stop_trace()
            self.console.note(f"{self._write()}\nwrote profile: {self.directory}")
        except Exception as error:
            self.console.warn(f"the profile in {self.directory} is incomplete: {_reason(error)}")

    def _write(self) -> str:
        newest = max(self.directory.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        program = Program(self.step.as_text())
        total = shares(read_events(newest), program)
        devices = f"{total.devices} x {jax.local_devices()[0].device_kind}"
        where = f" of process {jax.process_index()}" if jax.process_count() > 1 else ""
        last = min(self.number, self.end)  # the run may have ended before
        found = {"title": f"profile of steps {self.begin} to {last}, {devices}{where}"}
        found |= summary(total, program, last - self.begin + 1)
        text = table(found)
        if set(found["scopes"]) == {"none"}:
            text += "\nno scopes: the step comes from a compile cache of older code (runtime.compile_cache): delete it"
        (self.directory / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
        (self.directory / "summary.txt").write_text(text + "\n")
        return text


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
