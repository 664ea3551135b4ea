"""The page of one or several runs: one HTML file with its data, style and script; nothing is fetched from elsewhere."""

import base64
import hashlib
import json
import os
from html import escape
from pathlib import Path

from tracking.run import Run, differences, names

HERE = Path(__file__).parent
SCRIPTS = ("scales.js", "chart.js", "page.js")
MARK = '<meta name="generator" content="isomesh run page">'  # nothing else is replaced


def contents(runs: list[Run], known: list[tuple[int, int]] | None = None) -> dict:
    """What the page shows of the runs, as JSON can hold it.

    Each run's `series` holds `step` and `value` of every metric; values that are not finite are the strings "NaN",
    "Infinity" and "-Infinity". `known` tells for each run what a reader has already (its generation, its last step):
    then only points from the step `from` on are there, which replace the reader's.
    """
    found = []
    for place, (run, name) in enumerate(zip(runs, names([run.path for run in runs]), strict=True)):
        same = known is not None and known[place][0] == run.generation
        since = run.since(min(known[place][1], run.last)) if same else 0
        series = run.series_points(since)
        for points in series.values():
            points["value"] = [_plain(value) for value in points["value"]]
        described = {"name": name, "path": str(run.path), "generation": run.generation, "last": run.last}
        described |= {"from": since, "series": series, "facts": run.facts, "notes": run.notes()}
        found.append(described | {"samples": run.samples, "settings": run.settings})
    return {"runs": found, "differences": differences([run.settings for run in runs])}


def page(runs: list[Run], live: str = "") -> str:
    """The whole page; `live` is the token of the server that it asks for more, see `Server`.

    Texts of the runs reach it as data only, which the script shows as texts.
    Its policy allows this script and this style alone, and no connection; a live page may ask its own server.
    """
    title = runs[0].path.resolve().name if len(runs) == 1 else f"{len(runs)} runs"
    data = json.dumps(contents(runs) | {"title": title, "live": live}, allow_nan=False, separators=(",", ":"))
    script = "\n".join((HERE / file).read_text(encoding="utf-8") for file in SCRIPTS)
    style = (HERE / "page.css").read_text(encoding="utf-8")
    policy = f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; img-src data:"
    policy += "; base-uri 'none'; form-action 'none'" + ("; connect-src 'self'" if live else "")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{MARK}\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style></head>\n<body>\n"
        "<noscript>The charts of this page are drawn by its own script, which this browser does not run.</noscript>\n"
        f'<script type="application/json" id="data">{_inside_script(data)}</script>\n'
        f"<script>{script}</script>\n</body></html>\n"
    )


def write_page(file: Path, text: str) -> None:
    """Writes the page at once, so that no reader sees half of it. Raises ValueError where `file` is something else."""
    if file.is_dir():
        raise ValueError(f"{file} is a directory; name a file with --out")
    if file.exists():
        with open(file, "rb") as opened:
            if MARK.encode() not in opened.read(1024):
                raise ValueError(f"{file} exists and is no page of runs; choose another --out")
    if not file.parent.is_dir():
        raise ValueError(f"there is no directory {file.parent} to write {file.name} in; choose another --out")
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(text.encode("utf-8", errors="xmlcharrefreplace"))
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(value: float) -> float | str:
    if value != value:
        return "NaN"
    return value if abs(value) != float("inf") else "Infinity" if value > 0 else "-Infinity"


def _inside_script(text: str) -> str:
    """JSON that neither ends the element around it nor opens a comment in it."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
