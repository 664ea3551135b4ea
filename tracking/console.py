"""What a person sees of a run: a header, a live bar, evaluations, samples; plain lines where no terminal is attached.

Everything goes through the standard logger `isomesh`, so `logging.getLogger("isomesh.data").warning(...)` of any module
appears above the bar and in run.log too.
"""

import contextlib
import logging
import math
import os
import sys
import textwrap
from pathlib import Path

from rich.console import Console as RichConsole
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

LOGGER = logging.getLogger("isomesh")

# ---------------------------------------------------------------------------------------------------------------------
# Numbers for people


def human(n: float) -> str:
    """A count in three or four digits: 999, 12.4k, 1.3M, 8.0B, 2.5T."""
    return _scaled(n, 1000, ("", "k", "M", "B", "T"), "")


def bytes_text(n: float) -> str:
    """A number of bytes in binary units: 512 B, 1.5 GiB."""
    return _scaled(n, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"), " ")


def _scaled(n: float, base: int, units: tuple[str, ...], space: str) -> str:
    if not math.isfinite(n):
        return "unknown"
    power = 0
    # 999.95 would print as 1000.0: it belongs to the next unit.
    while abs(n) >= base - 0.05 and power < len(units) - 1:
        n, power = n / base, power + 1
    if abs(n) >= base:
        return f"{n:.2e}{space}{units[power]}"
    return f"{n:.0f}{space}{units[0]}" if power == 0 and n == int(n) else f"{n:.1f}{space}{units[power]}"


def duration(seconds: float) -> str:
    """A time span in its two largest units: 85 ms, 3.2 s, 47 s, 2 min 05 s, 3 h 07 min, 2 d 04 h."""
    if not math.isfinite(seconds):
        return "unknown"
    if 0 < seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if 0 < seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h:02d} h"
    if hours:
        return f"{hours} h {m:02d} min"
    return f"{minutes} min {s:02d} s" if minutes else f"{s} s"


def sparkline(values: list[float]) -> str:
    """The finite values as a row of bars between their minimum and their maximum."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    span = (high - low) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * (value - low) / span))] for value in finite)


def printable(text: str) -> str:
    """The text without control characters: what a model wrote must not drive the terminal or forge log lines."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


# ---------------------------------------------------------------------------------------------------------------------
# Where lines go: run.log and the screen, both as handlers of the logger


class _LogFile(logging.FileHandler):
    """run.log: every line with the time. The first failure to write is told once, and the run goes on."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(path, mode="a", encoding="utf-8", errors="replace")
        self.failed = False

    def format(self, record: logging.LogRecord) -> str:
        stamp = logging.Formatter().formatTime(record, "%Y-%m-%d %H:%M:%S")
        return "\n".join(f"{stamp} {line}" for line in _plain(record).splitlines() or [""])

    def emit(self, record: logging.LogRecord) -> None:
        if not self.failed:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        self.failed = True
        LOGGER.warning("cannot write %s (%s); training goes on", self.baseFilename, sys.exc_info()[1])

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk refused is refused again
            super().close()


class _Screen(logging.Handler):
    """The terminal, through rich, or plain lines flushed one by one."""

    def __init__(self, stream, rich: RichConsole | None):
        super().__init__()
        self.stream, self.rich = stream, rich

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self.rich is not None:
                renderable = getattr(record, "renderable", None) or _styled(record)
                self.rich.print(renderable, soft_wrap=getattr(record, "soft_wrap", False))
            else:
                # A byte-level model writes any character; a pipe's encoding may not have it.
                encoding = getattr(self.stream, "encoding", None) or "utf-8"
                line = _plain(record).encode(encoding, "replace").decode(encoding)
                self.stream.write(f"{line}\n")  # at once: what others say shall not come between
                self.stream.flush()
        except BrokenPipeError:
            # The reader went away (`| head`), the run goes on: later prints, of others too, lead nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except (OSError, ValueError):
            pass  # a closed terminal; run.log has the line


def _message(record: logging.LogRecord) -> str:
    trace = "\n" + logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
    return printable(record.getMessage() + trace)


def _plain(record: logging.LogRecord) -> str:
    level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
    return level + _message(record)


def _styled(record: logging.LogRecord) -> Text:
    if record.levelno < logging.WARNING:
        return Text("· " + _message(record), style="dim")
    return Text("! " + _message(record), style="yellow" if record.levelno < logging.ERROR else "bold red")


# ---------------------------------------------------------------------------------------------------------------------
# The console


class Console:
    """Speaks for a run; on any but the primary process it is silent. Use as a context manager.

    run_name: title of the header. log_path: run.log, appended to; None for none. total_steps: end of the bar.
    stream: where to speak, standard output unless given.
    """

    def __init__(self, run_name: str, log_path: str | os.PathLike | None, total_steps: int, primary: bool, stream=None):
        self.run_name, self.total_steps, self.primary = run_name, total_steps, primary
        stream = stream or sys.stdout
        # Bars and boxes need a terminal that moves its cursor and has the characters.
        utf8 = (getattr(stream, "encoding", None) or "").lower().replace("-", "") == "utf8"
        live = primary and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb" and utf8
        self._rich = RichConsole(file=stream, highlight=False, emoji=False) if live else None
        self._live: Live | None = None
        self._step, self._facts, self._losses = 0, [], []
        self._preparing, self._prepared = "", (0, 1)
        self._spinner = Spinner("dots", style="cyan")
        self._before = LOGGER.level, LOGGER.propagate
        LOGGER.setLevel(logging.INFO)
        LOGGER.propagate = False  # the root logger's handlers would say everything twice
        self._handlers: list[logging.Handler] = []
        self._add(_Screen(stream, self._rich) if primary else logging.NullHandler())
        if primary and log_path is not None:
            try:
                self._add(_LogFile(Path(log_path)))
            except OSError as error:
                self.warn(f"cannot write {log_path} ({error.strerror}); training goes on")

    def _add(self, handler: logging.Handler) -> None:
        LOGGER.addHandler(handler)
        self._handlers.append(handler)

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar, gives the terminal back and closes run.log."""
        self._stop_bar()
        for handler in self._handlers:
            LOGGER.removeHandler(handler)
            handler.close()
        self._handlers = []
        LOGGER.setLevel(self._before[0])
        LOGGER.propagate = self._before[1]

    def _say(self, text: str, renderable=None, soft_wrap: bool = False) -> None:
        LOGGER.info("%s", text, extra={"renderable": renderable, "soft_wrap": soft_wrap})

    def note(self, text: str) -> None:
        """One line of information."""
        self._say(text)

    def warn(self, text: str) -> None:
        """One line that the user should act on."""
        LOGGER.warning("%s", text)

    def header(self, rows: dict[str, str]) -> None:
        """Says what runs: parameters, mesh, devices, FLOPs a token, expected duration, ..."""
        panel = Panel(
            _pairs(rows, "cyan"),
            title=Text.assemble(("isomesh", "bold"), " · ", printable(self.run_name)),
            title_align="left",
            border_style="dim",
            expand=False,
            padding=(0, 1),
        )
        width = max(map(len, rows), default=0)
        lines = [f"isomesh | {self.run_name}", *(f"  {key:<{width}}  {value}" for key, value in rows.items())]
        self._say("\n".join(lines), panel)

    def preparation(self, what: str, done: int, total: int) -> None:
        """Progress of something before the first step, in units of its own: a bar on a terminal, else a line."""
        if what != self._preparing:
            self._preparing = what
            if self._rich is None:
                self._say(f"{what} ...")
        if self._rich is None:
            return
        if self._live is None:
            self._live = Live(get_renderable=self._preparation_bar, console=self._rich, refresh_per_second=6)
            self._live.start()
        self._prepared = done, total
        if done >= total:
            self._stop_bar()

    def _preparation_bar(self) -> Table:
        row = Table.grid(padding=(0, 1))
        done, total = self._prepared
        row.add_row(self._spinner, self._preparing, ProgressBar(max(1, total), done, width=30, complete_style="cyan"))
        return row

    def compiled(self, seconds: float, detail: str = "") -> None:
        """Says how long the step took to compile, with a detail such as its memory."""
        self._say(f"compiled the step in {duration(seconds)}" + (f" | {detail}" if detail else ""))

    def progress(
        self, step: int, loss: float, tokens_per_s: float, mfu: float | None = None, eta: float | None = None
    ) -> None:
        """A log point: moves the bar on a terminal, prints a line elsewhere. mfu is a share of 1, eta is in seconds."""
        facts = [("loss", f"{loss:.4f}"), ("", f"{human(tokens_per_s)} tok/s")]
        if mfu is not None and math.isfinite(mfu):
            facts.append(("MFU", f"{100 * mfu:.1f}%"))
        if eta is not None and 0 < eta < math.inf:
            facts.append(("ETA", duration(eta)))
        line = " | ".join([f"step {step}/{self.total_steps}", *(f"{key} {value}".strip() for key, value in facts)])
        self._step, self._facts = step, facts
        self._losses = [*self._losses, loss][-200:]
        if self._rich is None:
            self._say(line)
            return
        for handler in self._handlers[1:]:  # the bar says it on the screen
            handler.handle(logging.makeLogRecord({"msg": line, "levelno": logging.INFO}))
        if self._live is None:
            self._live = Live(get_renderable=self._bar, console=self._rich, refresh_per_second=6)
            self._live.start()

    def evaluation(
        self,
        step: int,
        loss: float,
        bits_per_byte: float | None = None,
        best: bool = False,
        by_source: dict[str, float] | None = None,
    ) -> None:
        """One line for an evaluation; `best` marks the lowest loss so far. bits_per_byte: None where no bytes count.
        by_source: the losses of the sources of a mixture, or the metrics of a task."""
        sources = ", ".join(f"{name} {each:.4f}" for name, each in (by_source or {}).items())
        bits = "" if bits_per_byte is None else f"{bits_per_byte:.4f} bits/byte"
        plain = [f"eval {step}/{self.total_steps}", f"loss {loss:.4f}", bits, sources, "best" if best else ""]
        text = Text.assemble(
            ("✓ ", "green"),
            (f"eval at {step:<{len(str(self.total_steps))}}  ", ""),
            (f"loss {loss:.4f}", "bold"),
            (f"  {bits}" if bits else "", ""),
            (f"  {sources}" if sources else "", "dim"),
            ("  ★ best so far" if best else "", "yellow"),
        )
        self._say(" | ".join(filter(None, plain)), text)

    def samples(self, rows: list[tuple[str, str]]) -> None:
        """Text that the model wrote: pairs of prompt and continuation."""
        self._stop_bar()
        self._say("samples", _rule("samples"))
        for number, (prompt, continuation) in enumerate(rows, 1):
            written = f"{prompt}{continuation}".rstrip()
            text = Text.assemble((printable(prompt), "bold cyan"), printable(continuation.rstrip()))
            plain = f"sample {number} | prompt {prompt!r}\n" + textwrap.indent(written, "    ")
            self._say(plain, Padding(text, (0, 1, 1, 1)))

    def finish(self, paths: dict[str, str | os.PathLike], commands: dict[str, str], title: str = "done") -> None:
        """Says where things were written, and the commands that go on from here: {"resume": "python train.py ..."}."""
        self._stop_bar()
        self._say(title, _rule(title))
        width = max(map(len, paths), default=0)
        for name, path in paths.items():
            text = Text.assemble((f"{name:<{width}}  ", "dim"), (printable(str(path)), "cyan"))
            self._say(f"wrote {name}: {path}", text, soft_wrap=True)
        for purpose, command in commands.items():
            # Without a frame and wrapped by the terminal itself, a long command can be copied whole.
            self._say(f"to {purpose}: {command}", Text.assemble((f"to {purpose}:\n", "dim"), f"  {command}"), True)

    # -- the bar

    def _bar(self) -> Table:
        """The live line; as the terminal narrows it drops the trend, the bar, then facts, ETA and loss last."""
        count = f"{self._step}/{self.total_steps}"
        texts = {key: Text.assemble((f"{key} " if key else "", "dim"), value) for key, value in self._facts}
        width = self._rich.width - 3 - len(count)  # less the spinner, its gap and a free column
        for key in ("MFU", "", "ETA"):
            if sum(len(text) + 2 for text in texts.values()) > width:
                texts.pop(key, None)
        free = width - sum(len(text) + 2 for text in texts.values())
        trend = sparkline(_thinned(self._losses, 16)) if free >= 36 and len(self._losses) > 2 else ""
        bar_width = min(40, free - 2 - (len(trend) + 2 if trend else 0))
        ended = self._step >= self.total_steps
        cells = [Text("✓", style="green") if ended else self._spinner]
        if bar_width >= 6:
            style = "green" if ended else "cyan"
            cells.append(ProgressBar(max(1, self.total_steps), self._step, width=bar_width, complete_style=style))
        cells += [Text(count, style="bold"), texts.pop("loss"), *([Text(trend, style="magenta")] if trend else [])]
        cells += texts.values()
        row = Table.grid()
        for _ in cells:
            row.add_column(no_wrap=True)
        row.add_row(cells[0], *(Padding(cell, (0, 0, 0, min(number, 2))) for number, cell in enumerate(cells[1:], 1)))
        return row

    def _stop_bar(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            with contextlib.suppress(OSError):  # a terminal that hung up must not hide why the run ends
                live.stop()


def _thinned(values: list[float], count: int) -> list[float]:
    """At most `count` values, evenly spread, the newest among them."""
    stride = max(1, math.ceil(len(values) / count))
    return values[::-1][::stride][::-1]


def _rule(title: str) -> Rule:
    return Rule(Text(title, style="bold"), style="dim", align="left")


def _pairs(rows: dict[str, str], style: str) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(style=style, overflow="fold")
    for key, value in rows.items():
        table.add_row(printable(key), printable(str(value)))
    return table
