"""Results of fits and of coordinate checks on the terminal."""

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from scaling.transfer.coordinates import Check, Line


def wide_console() -> Console:
    """The terminal; a pipe has no width to respect."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def show(result: dict, console: Console) -> None:
    """Prints what `analyse` found: refusals first, then numbers, then what speaks against them."""
    law, table, fitted = result["law"], result["table"], result["fit"]
    say = lambda text, style="": console.print(Text(text, style=style), soft_wrap=True)
    say(f"{law['name']}: {law['formula']}", "bold")
    say(f"{law['source']}; {result['convention']}")
    say(f"{table['path']}: {table['used']} of {table['rows']} rows used")
    for row in result["refused"]:
        say(f"refused line {row['line']}: {row['reason']}", "red")
    for note in result["notes"]:
        say(f"note: {note}", "yellow")
    kind = result["objective"]
    name = (
        f"Huber, delta {kind['delta']:g}" if kind["kind"] == "huber" else {"l1": "L1", "mse": "squares"}[kind["kind"]]
    )
    of = "loss" if kind["residuals"] == "linear" else "log loss"
    say(
        f"{name}, on {of}: sum {fitted['objective_sum']:.8g}, mean {fitted['objective_mean']:.8g};"
        f" {fitted['starts_reaching_best']} of {fitted['starts']} starts reach it;"
        f" residuals {fitted['residual_size']:.2%}; condition number {fitted['condition_number']:.3g}"
    )
    if boot := result["bootstrap"]:
        say(f"intervals: {boot['draws']} draws of {boot['independent']} {boot['of']}")
    console.print(_quantities(result))
    _approaches(result["approaches"], say)
    if held := result["holdout"]:
        say(
            f"held out above C = {held['above']:g}: {held['fitted_runs']} runs predict {len(held['runs'])},"
            f" median error {held['median_absolute_error']:.2%}, largest {held['largest_absolute_error']:.2%}",
            "bold",
        )
        console.print(_held(held))
    for letter, found in result["residuals_by"].items():
        thirds = " ".join(f"{third:+.3%}" for third in found["thirds"])
        say(f"residuals by {letter}, lowest to highest third: {thirds}; trend t = {found['trend_t']:.1f}")
    for one in result["outliers"]:
        say(f"outlier line {one['line']}: {one['residual']:+.2%} from the surface, {one['sizes']:+.1f} sizes", "yellow")
    for warning in result["warnings"]:
        say(f"warning: {warning}", "yellow")


def show_predictions(result: dict, console: Console) -> None:
    """Prints what a fit predicts for runs that were asked for, then what speaks against the fit."""
    law, letters = result["law"], [letter for letter in result["predictions"][0] if len(letter) <= 2]
    console.print(
        Text(f"{law['name']}: {law['formula']}; {result['table']['used']} runs", style="bold"), soft_wrap=True
    )
    grid = Grid(*letters, "loss", "95% interval", "80% interval", "95% of one run", "80% of one run")
    for one in result["predictions"]:
        ends = [_interval(one.get(name)) for name in ("interval95", "interval80", "run95", "run80")]
        grid.add_row(*(f"{one[letter]:.4g}" for letter in letters), f"{one['loss']:.5g}", *ends)
    console.print(grid)
    for warning in result["warnings"]:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)


def show_coordinates(title: str, check: Check, lines: list[Line], console: Console) -> None:
    """Prints a coordinate check: each coordinate's change by size, its slopes and the verdict."""
    sizes = sorted(check.changes)
    grid = Grid(f"change of, by {check.dial}", *map(str, sizes), "slope of change", "slope of size", "")
    for line in lines:
        values = [f"{check.changes[size][line.name][-1]:.4g}" for size in sizes]
        words = Text("flat" if line.flat else "NOT FLAT", style="" if line.flat else "red")
        grid.add_row(line.name, *values, f"{line.change:+.2f}", f"{line.size:+.2f}", words)
    console.print(Text(title, style="bold"), grid)
    bad = [line.name for line in lines if not line.flat]
    console.print(Text(f"not flat: {', '.join(bad)}" if bad else f"flat: no change depends on the {check.dial}"))


def _quantities(result: dict) -> Grid:
    without = result["without_outliers"]
    grid = Grid("", "value", "95% interval", "80% interval", *(["without outliers"] if without else []))
    for name, one in result["fit"]["quantities"].items():
        label = name.replace("at budget", f"at {result['budget']:.4g} FLOPs") if result["budget"] else name
        cells = [label, f"{one['value']:.5g}", _interval(one.get("interval95")), _interval(one.get("interval80"))]
        if without:
            cells.append(f"{without['quantities'][name]['value']:.5g}")
        grid.add_row(*map(Text, cells))
    return grid


def _held(held: dict) -> Grid:
    """Each held-out run, nearest first: what was predicted without it, and where 95% of such runs should lie."""
    grid = Grid("held out, line", "C", "measured", "predicted", "error", "95% of one run")
    for one in sorted(held["runs"], key=lambda one: one["C"]):
        numbers = (f"{one['C']:.4g}", f"{one['measured']:.5g}", f"{one['predicted']:.5g}", f"{one['error']:+.2%}")
        grid.add_row(str(one["line"]), *numbers, _interval(one.get("run95")))
    return grid


def _interval(ends: list | None) -> str:
    if ends is None:
        return "-"
    low, high = ("open" if end is None else f"{end:.4g}" for end in ends)
    return f"{low} to {high}"


def _approaches(found: dict, say) -> None:
    for name, one in found.items():
        if refusal := one.get("refused"):
            say(f"{name}: refused: {refusal}", "yellow")
        else:
            at = f"; N = {one['N']:.4g}, D = {one['D']:.4g} at the budget" if "N" in one else ""
            at += f", loss {one['loss']:.4f} if it falls as C^{one['loss_exponent']:.4f}" if "loss" in one else ""
            say(f"{name}: N_opt grows as C^{one['exponent']:.4f}, 95% {_interval(one['interval95'])}{at}")
        for cut in one.get("slices", ()):
            if cut["refused"]:
                say(f"isoFLOP slice {cut['name']} refused: {cut['refused']}", "yellow")
