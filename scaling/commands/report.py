"""python -m scaling report: everything about one experiment on a page, with figures and numbers beside it."""

import argparse
from pathlib import Path

from scaling.fit.columns import COLUMNS, add_columns, check_flops, chosen_columns
from scaling.fit.laws import LAWS
from scaling.report.content import AS_COLLECTED, RESULTS, SWEEP, ReportRequest, assemble, columns_of, locate
from scaling.report.figures import draw
from scaling.report.page import page
from scaling.strict_json import write

PAGE, NUMBERS, FIGURES = "report.html", "report.json", "figures"


def add_report(options: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m scaling report` to its parser, and `command`, which runs with them."""
    options.set_defaults(command=run_report)
    options.add_argument("experiment", type=Path, help=f"a folder with {RESULTS}, or a table")
    options.add_argument("--law", choices=LAWS, default="hoffmann", help="default: hoffmann")
    options.add_argument(
        "--budget", type=float, metavar="FLOPS", help="to predict (default: 10 times the largest run's)"
    )
    words = "predict runs above from those below (default: the largest of 4 or more budgets is held out)"
    options.add_argument("--holdout-above", type=float, metavar="FLOPS", help=words)
    options.add_argument("--bootstrap", type=int, default=4000, metavar="DRAWS", help="0: no bands (default: 4000)")
    options.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    options.add_argument("--out", type=Path, metavar="DIR", help="default: the experiment's folder")
    options.add_argument(
        "--wandb", choices=("disabled", "offline", "online"), default="disabled", help="log it there, too"
    )
    options.add_argument("--project", default="isomesh", help="of W&B (default: isomesh)")
    add_columns(options, AS_COLLECTED)


def run_report(options: argparse.Namespace) -> None:
    """Reads, fits, draws, writes. Raises ValueError for the user's mistakes."""
    law, table = LAWS[options.law], locate(options.experiment)
    check_flops(options, law)
    names = chosen_columns(options, law, columns_of(table))
    request = ReportRequest(
        law, options.bootstrap, options.seed, options.budget, options.holdout_above, options.min_ratio
    )
    report = assemble(table, names, request)
    report = {"title": title(options.experiment), "command": command(options)} | report
    figures = draw(report)
    out = options.out or table.parent
    (out / FIGURES).mkdir(parents=True, exist_ok=True)
    for name, content in figures.items():
        (out / FIGURES / name).write_bytes(content)
    write(out / NUMBERS, report)
    (out / PAGE).write_text(page(report, figures))
    for line in report["warnings"]:
        print(f"warning: {line}")
    print(f"{out / PAGE}: {len(figures)} figures, {report['analysis']['table']['used']} runs")
    if options.wandb != "disabled":
        publish(report, [out / FIGURES / name for name in figures], out, table, options.wandb, options.project)


def title(experiment: Path) -> str:
    """What the page is called: the name of the experiment's folder, or of the table without its suffix."""
    return experiment.resolve().name if experiment.is_dir() else experiment.stem


def command(options: argparse.Namespace) -> list[str]:
    """What writes the same report again: all that its content depends on, and not where it is written or logged."""
    words = ["python", "-m", "scaling", "report", str(options.experiment), "--law", options.law]
    for flag, value in (("--budget", options.budget), ("--holdout-above", options.holdout_above)):
        words += [] if value is None else [flag, repr(value)]
    words += ["--min-ratio", repr(options.min_ratio)] if options.min_ratio else []
    words += ["--bootstrap", str(options.bootstrap), "--seed", str(options.seed)]
    for letter, flag in {"loss": "--loss", **{letter: flag for letter, (flag, _) in COLUMNS.items()}}.items():
        name = getattr(options, letter)
        words += [] if name is None else [flag, name]
    return words


def publish(report: dict, figures: list[Path], out: Path, table: Path, mode: str, project: str) -> None:
    """Logs the report to W&B: one artifact of all its files, and the tables `runs` and `coefficients`."""
    import wandb

    settings = wandb.Settings(silent=True, console="off")
    name = f"report-{report['title']}"
    run = wandb.init(project=project, mode=mode, dir=out, job_type="report", name=name, settings=settings)
    runs = report["runs"]
    columns = sorted({key for one in runs for key in one})
    quantities = report["analysis"]["fit"]["quantities"]
    rows = [
        [name, one["value"], *one.get("interval95", (None, None)), *one.get("interval80", (None, None))]
        for name, one in quantities.items()
    ]
    heads = ["name", "value", "low95", "high95", "low80", "high80"]
    run.log(
        {
            "runs": wandb.Table(columns=columns, data=[[one.get(key) for key in columns] for one in runs]),
            "coefficients": wandb.Table(columns=heads, data=rows),
        }
    )
    artifact = wandb.Artifact(artifact_name(name), type="scaling-report", metadata={"command": report["command"]})
    for file in (out / PAGE, out / NUMBERS, table, table.with_name(SWEEP), *figures):
        if file.is_file():
            artifact.add_file(str(file), name=f"{FIGURES}/{file.name}" if file in figures else file.name)
    run.log_artifact(artifact)
    run.finish()


def artifact_name(text: str) -> str:
    """W&B takes letters, digits, - _ and . only."""
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_.") else "-" for letter in text)
