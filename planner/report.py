"""A plan as a page of text, as JSON, and as a picture."""

import io
import json
import shlex
from dataclasses import asdict
from pathlib import Path

from model.counts import parameter_count
from planner import explain
from planner.cost import Planner, Prediction
from planner.machine import written
from planner.search import Found, Weighed

COLORS = (
    "#4477aa",
    "#66ccee",
    "#228833",
    "#ccbb44",
    "#ee6677",
    "#aa3377",
    "#bbbbbb",
    "#222222",
    "#88ccaa",
    "#dd9944",
    "#7755bb",
    "#5599bb",
)


def text(planner: Planner, found: Found, settings: list[str], top: int, tokens: float) -> str:
    """What a person reads: table, the line to paste, and explanations."""
    ranked = found.meshes()[:top]
    best, count = planner.predict(ranked[0].layout), parameter_count(planner.model)
    train = planner.config.train
    cut = " ".join(shlex.quote(word) for word in command(settings, best))
    lines = [
        f"{count.total / 1e9:,.2f}e9 parameters on {planner.devices:,} x {planner.machine.name}, trained by "
        f"{planner.software.name}{f' ({planner.machine.calibrated})' if planner.machine.calibrated else ''}",
        f"a step of {train.batch_size:,} x {train.seq_len:,} tokens in {planner.dtype}; {found.considered:,} layouts "
        f"weighed in {found.seconds:.1f} s, {len(found.fitting):,} fit; the best of each mesh:",
        "",
        explain.table(planner, ranked),
        "",
        f"paste     python train.py {cut}",
    ]
    second = (
        f"{explain.why_second(best, planner.predict(ranked[1].layout))}" if len(ranked) > 1 else "no other mesh fits"
    )
    section = lambda name, told: [f"{name:10}{told[0]}", *(f"{'':10}{line}" for line in told[1:])] if told else []
    lines += section("second", [second])
    lines += section("binds", explain.what_binds(planner, best, found))
    lines += section("roofline", [explain.roofline(planner, best)])
    lines += section("memory", [explain.memory_told(best)])
    lines += section("exchanges", explain.exchanges_told(planner, best))
    lines += section("cost", explain.cost_told(planner, best, tokens))
    return "\n".join(lines)


def command(settings: list[str], best: Prediction) -> list[str]:
    """The overrides of a run with this layout: those of the user that it does not set, and its own."""
    ours = best.layout.overrides()
    keys = {word.partition("=")[0] for word in ours} | {f"mesh.{axis}" for axis in best.layout.sizes} | {"mesh"}
    return [word for word in settings if word.partition("=")[0] not in keys] + ours


def as_json(planner: Planner, found: Found, settings: list[str], top: int) -> dict:
    """All layouts, those of `top` meshes with all that is known of them."""
    detailed = [full(planner, planner.predict(w.layout), settings) for w in found.meshes()[:top]]
    brief = lambda w: asdict(w.layout) | {"step_s": w.step, "memory_bytes": w.memory}
    return {
        "machine": {"name": planner.machine.name, "source": planner.machine.source, "devices": planner.devices},
        "program": planner.software.name,
        "settings": settings,
        "parameters": parameter_count(planner.model).total,
        "flops_a_step": planner.flops,
        "search_s": found.seconds,
        "best": detailed,
        "fitting": [brief(w) for w in found.fitting],
        "too_large": [brief(w) for w in found.too_large],
    }


def full(planner: Planner, p: Prediction, settings: list[str]) -> dict:
    """All that is predicted of one layout."""
    return {
        "layout": asdict(p.layout),
        "overrides": command(settings, p),
        "step_s": p.step,
        "tokens_per_s": p.tokens_per_s,
        "tokens_per_s_per_device": p.tokens_per_s / planner.devices,
        "mfu": p.mfu,
        "hfu": p.hfu,
        "fits": p.fits,
        "seconds": p.seconds,
        "hidden_s": p.hidden,
        "memory_bytes": p.memory.parts() | {"total": p.memory.total, "limit": p.limit},
        "exchanges": [asdict(e) for e in p.exchanges],
    }


def write_json(path: Path, value: dict) -> None:
    """Raises OSError, and then leaves what was there."""
    written(path, json.dumps(value).encode())


def picture(planner: Planner, ranked: list[Weighed], path: Path) -> None:
    """The parts of a step and of memory of some layouts, as stacked bars. Raises ValueError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--picture needs matplotlib, which is among the extras of `make setup` (dev)") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = [planner.predict(w.layout) for w in ranked]
    names = [p.layout.told() for p in found]
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 1.9 + 0.42 * len(found)), sharey=True)
    _bars(left, names, [{explain.word(k): v for k, v in p.seconds.items()} for p in found], "seconds of a step")
    _bars(right, names, [{k: v / 1e9 for k, v in p.memory.parts().items()} for p in found], "GB a device")
    right.axvline(found[0].limit / 1e9, color="black", linestyle=":", linewidth=1)
    left.invert_yaxis()
    figure.suptitle(f"{planner.devices:,} x {planner.machine.name}", x=0.01, ha="left", fontsize=10)
    figure.tight_layout()
    kind = path.suffix.removeprefix(".") or "png"
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind, dpi=120)
    written(path, drawn.getvalue())
    plt.close(figure)


def _bars(axes, names: list[str], stacks: list[dict[str, float]], label: str) -> None:
    keys = list(dict.fromkeys(key for stack in stacks for key in stack))
    start = [0.0] * len(names)
    for number, key in enumerate(keys):
        lengths = [stack.get(key, 0.0) for stack in stacks]
        axes.barh(names, lengths, left=start, label=key, color=COLORS[number % len(COLORS)])
        start = [a + b for a, b in zip(start, lengths, strict=True)]
    axes.set_xlabel(label)
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(fontsize=6, loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False)
