"""Drawings of schedule tables, in the terminal and as PNG or SVG. Pure Python."""

from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from rich.text import Text

from parallel.pipeline.schedules import (
    BACKWARD,
    FORWARD,
    WEIGHT,
    Op,
    PipelineSchedule,
)

COLORS = {FORWARD: (118, 178, 230), BACKWARD: (245, 166, 91), WEIGHT: (133, 200, 138)}
TERMINAL_COLORS = {FORWARD: "cyan", BACKWARD: "yellow", WEIGHT: "green"}  # that every terminal has
IDLE, INK, PAPER = "#eeeeee", "#1a1a1a", "#ffffff"


# ------------------------------------------------------------------------------------------------------------- in words


def title(schedule: PipelineSchedule) -> str:
    """The schedule's name and sizes."""
    chunks = f", {schedule.chunks} chunks a stage" if schedule.chunks > 1 else ""
    return f"{schedule.name}: {schedule.stages} stages, {schedule.microbatches} microbatches{chunks}"


def label(op: Op, chunks: int) -> str:
    """Text of an operation's cell: F3 is the forward of microbatch 3, F3.1 that of chunk 1."""
    return f"{op.kind}{op.microbatch}" + (f".{op.chunk}" if chunks > 1 else "")


def facts(schedule: PipelineSchedule) -> list[str]:
    """What the letters mean, ticks, peak in flight and bubble."""
    backward = "B backward for inputs, W backward for weights" if schedule.split else "B backward"
    chunk = ", F3.1: microbatch 3, chunk 1" if schedule.chunks > 1 else ""
    held = ", ".join(map(str, schedule.peak_in_flight()))
    unit = "(chunk, microbatch) pairs" if schedule.chunks > 1 else "microbatches"
    costs = "F = B = W = 1" if schedule.split else "F = 1, B = 2"
    return [
        f"F forward, {backward}{chunk}",
        f"ticks: {schedule.ticks}",
        f"peak in flight of stages 0..{schedule.stages - 1}: {held} {unit}",
        f"bubble: {schedule.bubble():.1%} predicted with {costs}; "
        f"{schedule.lockstep_bubble():.1%} if stages wait for each other in every tick",
    ]


def _shade(op: Op, chunks: int) -> str:
    """A color by kind, paler for later chunks."""
    pale = 0.65 * op.chunk / max(1, chunks - 1)
    return "#" + "".join(f"{round(part + (255 - part) * pale):02x}" for part in COLORS[op.kind])


# ------------------------------------------------------------------------------------------------------ in the terminal


def terminal(schedule: PipelineSchedule, width: int) -> list[Text]:
    """One row a stage, one column a tick, in blocks that fit `width` characters."""
    cell = 1 + max(len(label(op, schedule.chunks)) for _, _, op in schedule.operations())
    cell = max(cell, 1 + len(str(schedule.ticks - 1)))
    margin = len(f"stage {schedule.stages - 1}")
    block = max(1, (width - margin) // cell)
    lines = [Text(title(schedule), "bold")]
    for start in range(0, schedule.ticks, block):
        ticks = range(start, min(start + block, schedule.ticks))
        lines.append(Text("tick".ljust(margin) + "".join(f"{tick:{cell}}" for tick in ticks), "dim"))
        for stage in range(schedule.stages):
            line = Text(f"stage {stage}".ljust(margin))
            for tick in ticks:
                op = schedule.table[tick][stage]
                text, style = (".", "dim") if op is None else (label(op, schedule.chunks), _style(op))
                line.append(" " * (cell - len(text))).append(text, style)
            lines.append(line)
        lines.append(Text())
    return lines


def _style(op: Op) -> str:
    return f"black on {'bright_' if op.chunk % 2 else ''}{TERMINAL_COLORS[op.kind]}"


# --------------------------------------------------------------------------------------------------------- as a picture

ROW, BLOCK, FONT = 24, 50, 12  # pixels; ticks a band; pixels


@dataclass(frozen=True)
class Box:
    """A rectangle with a text in it: centered where it is filled, else from the left."""

    x: int
    y: int
    width: int
    text: str
    fill: str | None = None


def boxes(schedule: PipelineSchedule) -> tuple[int, int, list[Box]]:
    """Width, height and boxes of the picture: bands of ticks below each other, then the facts."""
    longest = max(len(label(op, schedule.chunks)) for _, _, op in schedule.operations())
    cell, margin = 8 * longest + 8, 64
    found = [Box(8, 8, 0, title(schedule))]
    top = 8 + ROW
    for start in range(0, schedule.ticks, BLOCK):
        ticks = range(start, min(start + BLOCK, schedule.ticks))
        at = lambda tick, start=start: margin + 8 + (tick - start) * cell
        found += [Box(at(tick), top, 0, str(tick)) for tick in ticks if tick % 5 == 0]
        for stage in range(schedule.stages):
            y = top + (stage + 1) * ROW
            found.append(Box(8, y, 0, f"stage {stage}"))
            for tick in ticks:
                op = schedule.table[tick][stage]
                text, fill = ("", IDLE) if op is None else (label(op, schedule.chunks), _shade(op, schedule.chunks))
                found.append(Box(at(tick), y, cell, text, fill))
        top += (schedule.stages + 1) * ROW + ROW // 2
    notes = facts(schedule)
    found += [Box(8, top + row * ROW, 0, note) for row, note in enumerate(notes)]
    right = margin + 16 + min(BLOCK, schedule.ticks) * cell
    return max(right, 16 + 7 * max(map(len, notes))), top + len(notes) * ROW + 8, found


def write_svg(schedule: PipelineSchedule, path: Path) -> None:
    """Writes the picture as SVG. Raises OSError."""
    width, height, found = boxes(schedule)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="{FONT}" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
    ]
    for box in found:
        x, anchor = (box.x + box.width // 2, "middle") if box.fill else (box.x, "start")
        if box.fill:
            size = f'x="{box.x}" y="{box.y}" width="{box.width}" height="{ROW}"'
            lines.append(f'<rect {size} fill="{box.fill}" stroke="{PAPER}"/>')
        if box.text:
            lines.append(f'<text x="{x}" y="{box.y + ROW // 2 + 4}" text-anchor="{anchor}">{escape(box.text)}</text>')
    path.write_text("\n".join([*lines, "</svg>", ""]), encoding="utf-8")


def write_png(schedule: PipelineSchedule, path: Path) -> None:
    """Writes the picture as PNG. Raises OSError, and ValueError without pillow."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise ValueError(f"--out {path}: PNG needs pillow, which is not installed; use .svg") from error
    width, height, found = boxes(schedule)
    image = Image.new("RGB", (width, height), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(FONT)
    for box in found:
        middle = box.y + ROW // 2
        if box.fill:
            draw.rectangle((box.x, box.y, box.x + box.width, box.y + ROW), box.fill, PAPER)
            draw.text((box.x + box.width / 2, middle), box.text, INK, font, anchor="mm")
        else:
            draw.text((box.x, middle), box.text, INK, font, anchor="lm")
    image.save(path)


WRITERS = {".png": write_png, ".svg": write_svg}
