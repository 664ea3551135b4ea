"""python -m data show: a batch as the model sees it, on the terminal and as a picture."""

import argparse
import sys
from pathlib import Path

import numpy as np

from config.compose import load
from config.schema import Config
from data.loader import Stream
from data.opening import Corpora, open_corpora
from data.packing import Batch
from data.streams import Mixture, training_stream
from data.tokenizer import Tokenizer

COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red")  # of documents, in turn
VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "·"})
END = "■"  # of a document


def add_show(options: argparse.ArgumentParser) -> None:
    """The options of the command."""
    options.set_defaults(command=show)
    options.add_argument("settings", nargs="*", metavar="key=value", help="settings of the run, as of train.py")
    options.add_argument("--step", type=int, default=1, metavar="N", help="which step's batch (default: 1, the first)")
    options.add_argument("--rows", type=int, default=4, metavar="N", help="how many of its rows (default: 4)")
    options.add_argument("--png", type=Path, metavar="FILE", help="draw the rows there, too")


def show(options: argparse.Namespace) -> None:
    """Prints the batch, and draws it if asked. Raises ValueError for the user's mistakes."""
    config = load(options.settings)
    if not 1 <= options.step <= config.train.steps:
        raise ValueError(f"--step {options.step}: the run has steps 1 to train.steps={config.train.steps}")
    if options.rows < 1:
        raise ValueError(f"--rows {options.rows}: must be 1 or more")
    if options.png and options.png.suffix.lower() != ".png":
        raise ValueError(f"--png {options.png}: the name of a picture ends in .png")
    corpora = open_corpora(config.data, config.tokenizer, _progress)
    stream = training_stream(config.data, corpora, seed=config.seed, **_shape(config))
    rows = min(options.rows, config.train.batch_size)
    batch, sources = stream.batch(options.step - 1, slice(0, rows)), sources_of(stream, config, options.step, rows)
    _print(config, corpora, stream, options.step, batch, sources)
    if options.png:
        draw(batch, sources, config.model.causal, f"step {options.step}", options.png)
        print(f"wrote {options.png}")


def _shape(config: Config) -> dict[str, int]:
    return {"seq_len": config.train.seq_len, "batch_size": config.train.batch_size}


def _progress(what: str, done: int, total: int) -> None:
    if done == 0:
        print(f"{what} ...", file=sys.stderr)


def sources_of(stream: Stream, config: Config, step: int, rows: int) -> list[str]:
    """The source of each of the first rows of a step's batch."""
    return stream.names(step - 1)[:rows] if isinstance(stream, Mixture) else [config.data.source] * rows


# ------------------------------------------------------------------------------------------------------- the terminal


def _print(config: Config, corpora: Corpora, stream: Stream, step: int, batch: Batch, sources: list[str]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console = console if console.is_terminal else Console(width=120)
    rows, width = batch["tokens_BT"].shape
    facts = {"data": f"{config.data.source}, {corpora.training_tokens:,} tokens, tokenizer {config.tokenizer.kind}"}
    facts |= stream.told(config.train.steps)
    facts["step"] = (
        f"{step} of {config.train.steps}, rows 0 to {rows - 1} of {config.train.batch_size}, {width} tokens each"
    )
    for name, value in facts.items():
        console.print(Text.assemble((f"{name}: ", "dim"), value))
    console.print(Text("reversed: its target does not count", style="dim"))
    for row in range(rows):
        one = {name: array[row] for name, array in batch.items()}
        console.print()
        console.print(Text(f"row {row} · {sources[row]} · {in_words(one)}", style="bold"))
        for line in documents_of(one, corpora.tokenizer):
            console.print(line, soft_wrap=True)


def in_words(row: dict[str, np.ndarray]) -> str:
    """How many documents and targets a row has."""
    width, counted = len(row["tokens_BT"]), int(row["mask_BT"].sum())
    said = f"{counted} of {width} targets count"
    if "segments_BT" not in row:
        return f"{said} · documents are not kept apart"
    documents, empty = np.unique(row["segments_BT"][row["segments_BT"] > 0]), int((row["segments_BT"] == 0).sum())
    return f"{len(documents)} document{'s'[: len(documents) != 1]} · {said}" + (
        f" · {empty} places are empty" if empty else ""
    )


def documents_of(row: dict[str, np.ndarray], tokenizer: Tokenizer) -> list:
    """A row's documents, each a rich Text: its number and its places, then its tokens."""
    from rich.text import Text

    segments = row.get("segments_BT", np.ones(len(row["tokens_BT"]), np.int32))
    places, lines = row.get("places_BT", np.arange(len(segments))), []
    for document in dict.fromkeys(segments.tolist()):
        at = np.flatnonzero(segments == document)
        if not document:
            lines.append(Text(f"  -  {len(at)} x nothing", style="dim"))
            continue
        colour = COLOURS[(document - 1) % len(COLOURS)]
        line = Text(f"{document:>3}  {places[at[0]]}-{places[at[-1]]}  ", style="dim")
        for i in at:
            text = token_text(tokenizer, int(row["tokens_BT"][i]))
            line.append(text, style=f"not dim {colour}" + ("" if row["mask_BT"][i] else " reverse"))
        lines.append(line)
    return lines


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as printable text on one line; what is no text is <ID>."""
    if token == tokenizer.eos_id:
        return END
    text = tokenizer.decode([token]).translate(VISIBLE)
    return "".join(c if c.isprintable() else "�" for c in text) or f"<{token}>"


# -------------------------------------------------------------------------------------------------------- the picture


def draw(batch: Batch, sources: list[str], causal: bool, title: str, path: Path) -> None:
    """The rows' documents, targets and positions, and what attention sees in that with the most documents.

    Writes a PNG, whole or not at all. Raises ValueError without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--png needs matplotlib: install the extra `dev`, or leave --png out") from None
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rows, width = batch["tokens_BT"].shape
    segments = batch.get("segments_BT", np.ones((rows, width), np.int32))
    places = batch.get("places_BT", np.broadcast_to(np.arange(width), (rows, width)))
    figure, axes = plt.subplots(2, 2, figsize=(14, 9), constrained_layout=True)
    colours = np.where(segments > 0, (segments - 1) % 10, np.nan)
    panels = [
        ("documents (white: nothing)", colours, {"cmap": "tab10", "vmin": 0, "vmax": 9}),
        ("targets that count (dark)", batch["mask_BT"], {"cmap": "Greys", "vmin": 0, "vmax": 1}),
        ("positions", places, {"cmap": "viridis"}),
    ]
    labels = [f"{row}  {source}" for row, source in enumerate(sources)]
    for axis, (name, values, how) in zip(axes.flat, panels, strict=False):
        image = axis.imshow(values, aspect="auto", interpolation="nearest", **how)
        axis.set(title=name, xlabel="token of the row", yticks=range(rows), yticklabels=labels)
    figure.colorbar(image, ax=axes[1, 0])
    row = int(np.argmax(segments.max(1)))
    seen = (segments[row][:, None] == segments[row][None]) & (np.tri(width, dtype=bool) if causal else True)
    axes[1, 1].imshow(seen, cmap="Blues", interpolation="nearest")
    axes[1, 1].set(title=f"what each token of row {row} attends to", xlabel="token attended to", ylabel="token")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    figure.savefig(beside, dpi=110, format="png")
    plt.close(figure)
    beside.replace(path)
