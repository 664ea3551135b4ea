"""python -m data clean IN OUT --exact --near 0.8 ...: a corpus without what should not be trained on.

IN is what data.path takes (files, globs, addresses, by commas), or settings of data, as in data=movie_reviews. OUT is a
new folder, with documents.jsonl, removed.jsonl and a report; it gets its name when it is whole.
"""

import argparse
import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from config.compose import load
from data.cleaning.contamination import Evaluation, evaluation
from data.cleaning.report import table
from data.cleaning.run import DOCUMENTS, Cleaning, clean
from data.cleaning.steps import Examiner, Steps
from data.commands.progress import bar
from data.corpus import DataConfig, documents, items
from data.objects import is_url
from data.shards import require_unchanged, stamps
from runtime import leave
from runtime.arguments import Parser
from runtime.locks import Locked, locked
from runtime.overrides import pasted


def add_clean(parser: Parser) -> None:
    """The options of the command."""
    parser.usage = "%(prog)s (IN | data.KEY=VALUE ...) OUT [--exact] [--near 0.8] [--language en] [--against FILES] ..."
    parser.add_argument(
        "words",
        nargs="+",
        metavar="IN OUT",
        help="files as of data.path, or settings of data as of train.py; the new folder",
    )
    parser.add_argument("--exact", action="store_true", help="remove documents that are the same but for spaces")
    words = "remove documents whose runs of 5 words are so alike (Jaccard), as in 0.8"
    parser.add_argument("--near", type=float, metavar="SIMILARITY", help=words)
    parser.add_argument("--min-chars", type=_count, metavar="N", help="remove shorter ones")
    parser.add_argument("--max-chars", type=_count, metavar="N", help="remove longer ones")
    parser.add_argument("--language", metavar="CODES", help="keep these alone, as in en or en,de")
    words = "remove what has a run of words of these files (as IN)"
    parser.add_argument("--against", metavar="FILES", help=words)
    parser.add_argument("--against-field", default="text", metavar="KEY", help="of the text in them (default: text)")
    parser.add_argument("--ngram", type=_count, default=13, metavar="N", help="words of such a run (default: 13)")
    parser.add_argument("--skip-bad", action="store_true", help="count what cannot be read, and go on")
    parser.add_argument("--compress", action="store_true", help="write .jsonl.zst")
    parser.add_argument(
        "--workers", type=_count, default=os.cpu_count(), metavar="N", help="processes (default: the cores)"
    )
    parser.set_defaults(command=run)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def run(options: argparse.Namespace) -> None:
    """Cleans a corpus. Raises ValueError or OSError for what the user can mend."""
    data, out = _places(options.words)
    languages = tuple(code for code in (options.language or "").split(",") if code)
    steps = Steps(options.min_chars, options.max_chars, languages, options.ngram, options.exact, options.near)
    if steps == Steps(ngram=options.ngram) and not options.against:
        raise ValueError("nothing to do: give --exact, --near, --min-chars, --max-chars, --language or --against")
    before = stamps(data)
    total = sum(stamp[1] for stamp in before)
    told = data.path or data.source
    cleaning = Cleaning(told, steps, _against(options), options.skip_bad, options.compress, options.workers)
    Examiner(steps, cleaning.against)  # what is missing is told before anything is made
    began = time.perf_counter()
    with _made(out) as folder, bar("cleaning", total) as progress:
        facts = clean(items(data), folder, cleaning, progress)
        require_unchanged(data, before)
    seconds, read = time.perf_counter() - began, facts["read"]
    print(table(facts))
    print(f"{out}: {read['bytes'] / 1e6:,.1f} MB in {seconds:.1f} s, {read['bytes'] / 1e6 / seconds:.1f} MB/s")
    documents = out / f"{DOCUMENTS}{'.zst' if options.compress else ''}"
    print(f"what was removed, and why: {out}/report.md")
    print(f"train on the rest: python train.py data=text {pasted('data.path', str(documents))}")


def _places(words: list[str]) -> tuple[DataConfig, Path]:
    settings = [word for word in words if word.startswith(("data=", "data."))]
    plain = [word for word in words if word not in settings]
    if len(plain) != (1 if settings else 2):
        raise ValueError(f"clean takes IN and OUT, or data.* settings and OUT: {' '.join(words)} names neither")
    if is_url(plain[-1]):
        raise ValueError(f"{plain[-1]}: OUT is a folder of this machine")
    out = Path(plain[-1]).expanduser()
    if not settings:
        settings = ["data=text", f"data.path={_quoted(plain[0])}"]
    elif not any(word.startswith(("data=", "data.source=")) for word in settings):
        settings = ["data=text", *settings]
    data = load(settings).data
    if data.source not in ("stdlib", "text", "movie_reviews"):
        raise ValueError(f"data.source={data.source} has no texts of its own to clean; give files")
    return data, out


def _quoted(path: str) -> str:
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _against(options: argparse.Namespace) -> Evaluation | None:
    if not options.against:
        return None
    data = DataConfig("text", options.against, options.against_field)
    return evaluation(documents(data, skip_bad=options.skip_bad), options.ngram)


@contextlib.contextmanager
def _made(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, which gets its name if all goes well and is removed if not."""
    _refuse_what_is_there(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder, lock = out.with_name(f".{out.name}.partial"), out.with_name(f".lock-{out.name}")
    try:
        with locked(lock), leave.on_leaving(lambda: _discard(folder, lock)):
            _refuse_what_is_there(out)  # by now
            shutil.rmtree(folder, ignore_errors=True)  # of one that was killed
            folder.mkdir()
            try:
                yield folder
                os.rename(folder, out)
            finally:
                _discard(folder, lock)
    except Locked:
        raise ValueError(f"another process is cleaning into {out}") from None


def _refuse_what_is_there(out: Path) -> None:
    if out.exists():
        raise ValueError(f"{out} is there already: give another name")


def _discard(folder: Path, lock: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.unlink(missing_ok=True)
