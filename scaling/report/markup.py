"""Pieces of a scaling report's HTML: numbers as people read them, paragraphs, tables, figures. Texts are escaped."""

import base64
from html import escape

SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def number(value: float | None, digits: int = 4) -> str:
    """A number as people read it: 0.3198, 3.280, 4,096, 1.48e13."""
    if value is None:
        return "open"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:#.{digits}g}".rstrip(".") if abs(value) < 1000 else f"{value:,.0f}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"


def amount(value: float | None) -> str:
    """Parameters or tokens: 904k, 14.8M; beyond 1000 T as `number`."""
    for size, suffix in SUFFIXES if value is not None and value < 1e15 else ():
        if value >= size:
            return f"{value / size:#.3g}".rstrip(".") + suffix
    return number(value, 3)


def percent(value: float, digits: int = 2) -> str:
    """A share with its sign, as in +1.25% for 0.0125."""
    return f"{100 * value:+.{digits}f}%"


def interval(ends: list | None, write=number) -> str:
    """The two ends, each as `write` spells it (None is an open end); a dash where there is no interval."""
    return "-" if ends is None else f"{write(ends[0])} to {write(ends[1])}"


def paragraph(text: str, kind: str = "") -> str:
    """One paragraph; `kind` is its class in the page's style."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def absent(why: str) -> str:
    """A paragraph in place of what the data does not allow; `why` is a clause without its full stop."""
    return paragraph(f"Not shown: {why}.", "soft")


def table(
    heads: list[str], rows: list[list[str]], caption: str, words: tuple[int, ...] = (), far: set[int] = frozenset()
):
    """Cells are texts; columns in `words` hold prose, rows in `far` are marked."""
    kind = lambda column: ' class="words"' if column in words else ""
    line = lambda tag, cells: "".join(f"<{tag}{kind(i)}>{escape(cell)}</{tag}>" for i, cell in enumerate(cells))
    body = "".join(
        f'<tr class="far">{line("td", cells)}</tr>' if place in far else f"<tr>{line('td', cells)}</tr>"
        for place, cells in enumerate(rows)
    )
    top = f"<caption>{escape(caption)}</caption><thead><tr>{line('th', heads)}</tr></thead>"
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>'


def figure(figures: dict[str, bytes], names: list[str], caption: str) -> str:
    """The figures of these names that were drawn, inside the page itself, above one caption; empty if none was."""
    there = [name for name in names if f"{name}.png" in figures]
    if not there:
        return ""
    image = lambda name: (
        f'<img alt="{escape(name.replace("_", " "))}" src="data:image/png;base64,'
        f'{base64.b64encode(figures[f"{name}.png"]).decode()}">'
    )
    one = " one" if len(there) == 1 else ""
    return (
        f'<figure><div class="panels{one}">{"".join(map(image, there))}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
