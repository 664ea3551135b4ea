"""The rows of files as they stand there: CSV, JSON lines or a JSON list, packed or not, several as one table.

Lines of a second file go on after the first's, so one number tells a row. Nothing is dropped silently: what is no row
is refused with its line.
"""

import csv
import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scaling.fit.expressions import number

UTF16 = (b"\xff\xfe", b"\xfe\xff")  # how a file in it begins
GZIP = b"\x1f\x8b"
FILE = "file"  # the column that several files add: which one a row is from


@dataclass(frozen=True)
class Refused:
    """A row that takes no part in the fit."""

    line: int  # in the file, from 1
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


@dataclass(frozen=True)
class Rows:
    """The rows that files hold together, those that could not be read, and what a reader should know of them."""

    path: str
    digest: str  # SHA-256 of the files' bytes, one after the other
    rows: list[tuple[int, dict]]  # line, values by column
    refused: list[Refused]
    notes: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """All columns, in the order of their first appearance."""
        return list(dict.fromkeys(name for _, row in self.rows for name in row))


def read_files(paths: str | Path | Sequence[str | Path], wanted: Iterable[str] = ()) -> Rows:
    """All rows of one file or several. Raises ValueError where one is not there, is no table, or has no row."""
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    digest, rows, refused, notes, before = hashlib.sha256(), [], [], [], 0
    for file in files:
        content = _bytes(Path(file))
        digest.update(content)
        text, more, odd = _rows_of(Path(file), content, set(wanted))
        extra = {FILE: Path(file).name} if len(files) > 1 else {}
        rows += [(line + before, {**extra, **row}) for line, row in more]
        refused += [Refused(one.line + before, one.reason) for one in odd]
        count = len(_lines(text.rstrip("\r\n"))) if not text.lstrip().startswith("[") else len(more) + len(odd)
        told = f"lines {before + 1} to {before + count} are those of {file}"
        notes += [told] if len(files) > 1 else []
        notes += [f"{file}: {note}" if len(files) > 1 else note for note in _notes(text)]
        before += count
    return Rows(", ".join(map(str, files)), digest.hexdigest(), rows, refused, tuple(notes))


def read_rows(path: str | Path, wanted: Iterable[str] = ()) -> tuple[str, list[tuple[int, dict]], list[Refused]]:
    """A table's text, its rows as they stand there, with their lines, and lines that are no rows.

    Raises ValueError where there is no file or no row, and for a `wanted` column that stands there twice.
    """
    return _rows_of(Path(path), _bytes(Path(path)), set(wanted))


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    return path.read_bytes()


def _rows_of(path: Path, content: bytes, wanted: set[str]) -> tuple[str, list[tuple[int, dict]], list[Refused]]:
    if content[:2] == GZIP:
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} does not unpack, cut short? {error}") from None
    text = content.decode("utf-16" if content[:2] in UTF16 else "utf-8-sig", errors="replace")
    if "\0" in text[:1000] or text.count("\ufffd") > len(text) // 10:
        raise ValueError(f"{path} is not text: a table is CSV, JSON lines or a JSON list")
    text = _uncommented(text)
    json_like = text.lstrip()[:1] in ("{", "[")
    rows, refused = _json_rows(text) if json_like else _csv_rows(text, wanted)
    if not rows:
        raise ValueError(f"{path} holds no rows" + (f": every line is refused; {refused[0]}" if refused else ""))
    return text, rows, refused


def _lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _uncommented(text: str) -> str:
    """The text with its leading lines of # emptied, so that lines keep their numbers.

    Where numbers follow at once, the last of these lines is the header, as numpy.savetxt writes it.
    """
    if not text.lstrip().startswith("#"):
        return text
    lines = _lines(text)
    first = next((place for place, line in enumerate(lines) if line.strip() and line.lstrip()[0] != "#"), len(lines))
    commented = [place for place in range(first) if lines[place].strip()]
    header = lines[commented[-1]].lstrip("# \t") if first < len(lines) and _numbers(lines[first]) else ""
    kept = [""] * commented[-1] + [header] + [""] * (first - commented[-1] - 1)
    return "\n".join([*kept, *lines[first:]])


def _numbers(line: str) -> bool:
    """Whether a line of a table holds numbers alone."""
    try:
        return bool([number(part) for part in next(csv.reader([line], delimiter=max(",\t;", key=line.count)))])
    except (ValueError, StopIteration):
        return False


def _csv_rows(text: str, wanted: set[str]) -> tuple[list[tuple[int, dict]], list[Refused]]:
    lines = _lines(text)
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        return [], []
    records = _records(lines, delimiter=max(",\t;", key=first.count))
    header = [name.strip() for name in records[0][1]]
    twice = [name for name, count in Counter(header).items() if count > 1 and name in wanted]
    if twice:
        raise ValueError(f"column {twice[0]} stands {header.count(twice[0])} times in the first line")
    rows, refused = [], []
    for line, fields in records[1:]:
        if len(fields) != len(header):
            cut = "cut short? " if len(fields) < len(header) else ""
            refused.append(Refused(line, f"{cut}{len(fields)} fields of {len(header)}"))
        else:
            rows.append((line, dict(zip(header, (field.strip() for field in fields), strict=True))))
    if rows and not text.endswith(("\n", "\r")) and rows[-1][0] == len(lines) and _shortest(rows):
        refused.append(Refused(rows.pop()[0], "cut short? no line end, and its last value is shorter than any other"))
    return rows, refused


def _records(lines: list[str], delimiter: str) -> list[tuple[int, list[str]]]:
    """Fields that are not all empty, by the line they end on.

    Quoted text may hold line ends. A quote that nobody closed takes its own line only: read on, it would swallow the
    rows below.
    """
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter)
    records, before, swallowed = [], 0, False
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                records.append((reader.line_num, fields))
                swallowed |= reader.line_num > before + 1 and len(fields) != len(records[0][1])
            before = reader.line_num
        if swallowed:
            apart = [next(csv.reader([one], delimiter=delimiter), []) for one in lines]
            return [(line, one) for line, one in enumerate(apart, start=1) if any(field.strip() for field in one)]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} does not parse as CSV: {error}") from None
    return records


def _shortest(rows: list[tuple[int, dict]]) -> bool:
    """Whether the last row's last value has fewer characters than that of every other row."""
    *others, last = [len(list(row.values())[-1]) for _, row in rows]
    return bool(others) and last < min(others)


def _json_rows(text: str) -> tuple[list[tuple[int, dict]], list[Refused]]:
    if text.lstrip().startswith("["):
        try:
            rows = list(enumerate(json.loads(text), start=1))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"a JSON list that does not parse, cut short? {error}") from None
        return [row for row in rows if isinstance(row[1], dict)], [
            Refused(line, "not an object") for line, row in rows if not isinstance(row, dict)
        ]
    rows, refused = [], []
    for line, one in enumerate(text.splitlines(), start=1):
        if not one.strip():
            continue
        try:
            row = json.loads(one)
            if not isinstance(row, dict):
                raise ValueError
            rows.append((line, row))
        except (ValueError, RecursionError):
            refused.append(Refused(line, "cut short? not a JSON object"))
    return rows, refused


def _notes(text: str) -> tuple[str, ...]:
    whole = text.endswith(("\n", "\r")) or text.rstrip().endswith("]")  # a JSON list that parses is whole
    return () if whole else ("the file does not end with a line end: was it cut short?",)
