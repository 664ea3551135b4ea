"""The HTML page of a scaling report: one file, without scripts and without anything fetched from elsewhere."""

import shlex
from html import escape
from pathlib import Path

from scaling.report.markup import absent, amount, figure, interval, number, paragraph, percent, table

STYLE = Path(__file__).with_name("page.css")


def page(report: dict, figures: dict[str, bytes]) -> str:
    """The whole page. Every text of the table is escaped; equal reports give equal pages."""
    sections = (
        ("Prediction", _prediction),
        ("Loss against compute", _compute),
        ("IsoFLOP parabolas", _isoflop),
        ("Optimal size and tokens", _optimum),
        ("Residuals", _residuals),
        ("Extrapolation", _extrapolation),
        ("Coefficients", _coefficients),
        ("Seeds", _seeds),
        ("Provenance", _provenance),
    )
    body = "".join(f"<section><h2>{title}</h2>{write(report, figures)}</section>\n" for title, write in sections)
    name = escape(report["title"])
    law = report["analysis"]["law"]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Scaling report: {name}</title><style>{STYLE.read_text()}</style></head><body>\n"
        f'<header><h1>Scaling report: {name}</h1><p class="soft">{escape(law["formula"])} ({escape(law["source"])}); '
        f"{escape(report['analysis']['convention'])}</p></header>\n{body}</body></html>\n"
    )


# ------------------------------------------------------------------------------------------------------------- sections


def _prediction(report: dict, figures: dict[str, bytes]) -> str:
    head, text = report["headline"], ""
    if head is None:
        text = absent(report["absent"]["headline"])
    else:
        data = lambda value, words: f'<data value="{value!r}">{escape(words)}</data>'

        def quantity(name: str, write, unit: str) -> str:
            ends = head[name].get("interval80")
            shown = (
                "no band"
                if ends is None
                else "80% band " + " to ".join("open" if end is None else data(end, write(end)) for end in ends)
            )
            return f"{name} = {data(head[name]['value'], write(head[name]['value']))}{unit} ({shown})"

        beyond = head["beyond"]
        far = f"{data(beyond, number(beyond, 3))} times the largest run's compute ({number(head['largest'], 3)})"
        text = (
            f'<p class="headline">For {data(head["budget"], number(head["budget"], 3))} FLOPs: '
            f"{quantity('N', amount, ' parameters')}, {quantity('D', amount, ' tokens')}, "
            f"{quantity('D/N', lambda x: number(x, 3), '')}, "
            f"{quantity('loss', number, ' nats a token')}. The budget is {far}.</p>"
        )
    if report["warnings"]:
        items = "".join(f"<li>{escape(one)}</li>" for one in report["warnings"])
        return f'{text}<div class="warnings"><strong>Before you use this</strong><ul>{items}</ul></div>'
    return text + paragraph("Nothing that the analysis checks speaks against the fit.", "soft")


def _bands(report: dict) -> str:
    made = report["analysis"]["bootstrap"]
    if made is None:
        return ""
    return (
        f" A band is, at each of {len(report['analysis']['curve'])} budgets, where the profile of the objective stays"
        f" below its 80% threshold; thresholds are measured by {made['draws']:,} bootstrap refits around the fitted"
        " surface, at the predicted budget. It is the uncertainty of the curve and supposes that the law is right;"
        " a new run adds its noise."
    )


def _compute(report: dict, figures: dict[str, bytes]) -> str:
    if why := report["absent"].get("compute"):
        return absent(why)
    if not report["analysis"]["curve"]:
        return figure(figures, ["loss_compute"], "Every fitted run, by its compute C.")
    caption = (
        "Every fitted run. The blue line is the least loss that the fitted law allows at each C: the runs' lower edge"
        " if the law describes them. The red diamond is the prediction." + _bands(report)
    )
    return figure(figures, ["loss_compute"], caption)


def _isoflop(report: dict, figures: dict[str, bytes]) -> str:
    found = report["isoflop"]
    if found is None:
        return absent(report["absent"]["isoflop"])
    refused = [cut for cut in found["slices"] if cut["refused"]]
    text = "".join(paragraph(f"Refused: budget {cut['name']}: {cut['refused']}.") for cut in refused)
    caption = (
        "Runs of each budget (C in FLOPs), and a parabola of the loss in log N through the five sizes around the best;"
        " stars are the minima. A budget whose least loss is at its smallest or largest model has no optimum among its"
        " runs: it is refused."
    )
    heads = ["budget", "runs", "C (FLOPs)", "N at the minimum", "D = C / 6N", "loss there"]
    rows = [[cut["name"], str(cut["runs"]), number(cut["C"]), *_minimum(cut)] for cut in found["slices"]]
    return figure(figures, ["isoflop"], caption) + text + table(heads, rows, "Minima of the parabolas.")


def _minimum(cut: dict) -> list[str]:
    if cut["refused"]:
        return ["refused", "", ""]
    return [amount(cut["N"]), amount(cut["C"] / 6 / cut["N"]), number(cut["loss"])]


def _optimum(report: dict, figures: dict[str, bytes]) -> str:
    if why := report["absent"].get("optimum"):
        return absent(why)
    why = report["absent"].get("power law")
    text = paragraph(f"No power law through the parabolas' minima: {why}.") if why else ""
    caption = (
        "The best N and D for a budget, by the fitted law (blue) and, where budgets have minima, by a straight line"
        " through them (orange, its band that of a regression line). Two ways that agree support each other; where the"
        " bands part, the prediction depends on the method."
    )
    return text + figure(figures, ["n_opt", "d_opt"], caption)


def _residuals(report: dict, figures: dict[str, bytes]) -> str:
    result, runs = report["analysis"], {run["line"]: run for run in report["runs"]}
    caption = (
        "Residuals of all fitted runs against each size. Orange bars are the means of the lowest, middle and highest"
        " third: a slope or a bow in them is what the law does not describe. Grey is one residual size either way."
    )
    text = figure(figures, [f"residuals_{letter.lower()}" for letter in result["residuals_by"]], caption)
    rows = [
        [letter, *(percent(third, 3) for third in found["thirds"]), f"{found['trend_t']:+.1f}"]
        for letter, found in result["residuals_by"].items()
    ]
    heads = ["by", "lowest third", "middle", "highest third", "trend t"]
    text += table(heads, rows, f"Mean residuals; one residual size is {result['fit']['residual_size']:.3%}.")
    if not result["outliers"]:
        return text + paragraph("No run is an outlier (5 residual sizes).", "soft")
    rows = [
        [str(one["line"]), str(runs[one["line"]].get("label", "")), percent(one["residual"]), f"{one['sizes']:+.1f}"]
        for one in result["outliers"]
    ]
    return text + table(["line", "run", "residual", "residual sizes"], rows, "Outliers; they stay in the fit.", (1,))


def _extrapolation(report: dict, figures: dict[str, bytes]) -> str:
    held = report["analysis"]["holdout"]
    if held is None:
        return absent(report["absent"]["extrapolation"])
    groups = f" (budget {', '.join(report['held_out_group'])})" if report["held_out_group"] else ""
    text = paragraph(
        f"The {held['fitted_runs']} runs up to C = {number(held['above'], 3)} were fitted alone, and predict the"
        f" {len(held['runs'])} above{groups}: median error {held['median_absolute_error']:.2%}, largest"
        f" {held['largest_absolute_error']:.2%}. This is the error of an extrapolation, not of a fit."
    )
    caption = "The law fitted to the grey runs predicts the red ones, which it has not seen."
    rows = [
        [str(one["line"]), number(one["C"]), f"{one['measured']:.4f}", f"{one['predicted']:.4f}", percent(one["error"])]
        for one in held["runs"]
    ]
    heads = ["line", "C (FLOPs)", "measured loss", "predicted", "error"]
    return (
        text + figure(figures, ["extrapolation", "extrapolation_error"], caption) + table(heads, rows, "Held-out runs.")
    )


def _coefficients(report: dict, figures: dict[str, bytes]) -> str:
    result, without = report["analysis"], report["analysis"]["without_outliers"]
    heads = ["", "value", "95% interval", "80% interval", *(["without outliers"] if without else [])]
    rows = []
    for name, one in result["fit"]["quantities"].items():
        write = amount if name in ("N at budget", "D at budget") else number
        ends = [interval(one.get(level), write) for level in ("interval95", "interval80")]
        rows.append([name, write(one["value"]), *ends])
        rows[-1] += [write(without["quantities"][name]["value"])] if without else []
    at = f" The budget is {number(result['budget'], 3)} FLOPs." if result["budget"] else ""
    fitted, kind = result["fit"], result["objective"]
    objective = f"Huber's loss, delta {kind['delta']:g}" if kind["kind"] == "huber" else kind["kind"]
    text = table(heads, rows, f"{result['law']['formula']}.{at}")
    text += paragraph(
        f"Objective: {objective}, of log losses: {fitted['objective_sum']:.8g} in sum;"
        f" {fitted['starts_reaching_best']} of {fitted['starts']} starts reach it."
        f" Condition number {number(fitted['condition_number'], 3)}.",
        "soft",
    )
    ways = [
        [name, "refused: " + one["refused"], "", "", ""]
        if "refused" in one
        else [name, f"{one['exponent']:.3f}", interval(one["interval95"])]
        + ([amount(one["N"]), amount(one["D"])] if "N" in one else _of_headline(report))
        for name, one in result["approaches"].items()
    ]
    if ways:
        heads = ["approach", "exponent of N_opt in C", "95% interval", "N at the budget", "D at the budget"]
        text += table(heads, ways, "Approaches side by side, never averaged.", (1,) if _refusals(ways) else ())
    caption = (
        "The fit's objective when the floor is held at other values. Steep sides: the runs tell the floor; a side that"
        " stays below the threshold is open, and no extrapolation to the floor is supported."
    )
    return text + figure(figures, ["floor_profile"], caption)


def _refusals(ways: list[list[str]]) -> bool:
    return any(row[1].startswith("refused") for row in ways)


def _of_headline(report: dict) -> list[str]:
    return [amount(report["headline"][letter]["value"]) for letter in "ND"]


def _seeds(report: dict, figures: dict[str, bytes]) -> str:
    found = report["seeds"]
    if found is None:
        return absent(report["absent"]["seeds"])
    ratio = found["residuals_over_spread"]
    judged = f", {number(ratio, 3)} times that" if ratio else ""
    text = paragraph(
        f"Runs that differ in their seed only spread by {found['spread']:.3%} (standard deviation of log loss,"
        f" {found['degrees_of_freedom']} degrees of freedom). The fit's residuals are"
        f" {report['analysis']['fit']['residual_size']:.3%}{judged}: near 1 times, the law leaves nothing but noise;"
        " far above, it misses something."
    )
    rows = [
        [amount(row["N"]), amount(row["D"]), str(row["runs"]), f"{row['mean']:.4f}", f"{row['spread']:.3%}"]
        for row in found["sizes"]
    ]
    return text + table(["N", "D", "seeds", "mean loss", "spread"], rows, "Sizes with several seeds.")


def _provenance(report: dict, figures: dict[str, bytes]) -> str:
    result, facts = report["analysis"], report["provenance"]
    read = result["table"]
    versions = ", ".join(f"{name} {release}" for name, release in facts["versions"].items())
    text = f"<pre>{escape(shlex.join(report['command']))}</pre>"
    text = paragraph("This report is written again, byte for byte, by:") + text
    rows = [["table", read["path"]], ["SHA-256", read["sha256"]]]
    rows.append(["rows", f"{read['used']} of {read['rows']} used"])
    for key, counts in facts["from"].items():
        rows.append([key.replace("_", " "), ", ".join(f"{name} ({count} rows)" for name, count in counts.items())])
    rows += [["note", note] for note in result["notes"]] + [["fitted with", versions]]
    if made := result["bootstrap"]:
        rows.append(["bootstrap", f"{made['draws']:,} draws, seed {made['seed']}, {made['failed']} did not converge"])
    text += table(["", ""], rows, "Where the numbers come from.", (1,))
    if result["refused"]:
        refused = [[str(row["line"]), row["reason"]] for row in result["refused"]]
        text += table(["line", "reason"], refused, "Rows that took no part.", (1,))
    text += _runs(report)
    if facts["sweep"]:
        text += f"<h3>sweep.yaml</h3><pre>{escape(facts['sweep'])}</pre>"
    return text


def _runs(report: dict) -> str:
    runs = report["runs"]
    letters = [letter for letter in (*"NDCU", "S1", "S2", *"FPV") if letter in runs[0]]
    labels = [key for key in ("label", "group", "seed") if any(key in run for run in runs)]
    rows = [
        [str(run["line"]), *(str(run.get(key, "")) for key in labels)]
        + [amount(run[letter]) if letter in "NDU" else number(run[letter]) for letter in letters]
        + [f"{run['loss']:.4f}", f"{run['fitted']:.4f}", percent(run["residual"])]
        for run in runs
    ]
    far = {place for place, run in enumerate(runs) if run["outlier"]}
    heads = ["line", *labels, *letters, "loss", "fitted", "residual"]
    return table(heads, rows, "Runs that were fitted.", (1,) if "label" in labels else (), far)
