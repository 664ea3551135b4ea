"""Rows of labelled tables: CSV, TSV, JSON lines, Parquet, or a folder that has a folder of texts for each class."""

import contextlib
import csv
import io
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.corpus import position
from data.sources.files import LINES, TEXTS, File, kind, named_files
from data.sources.readers import decompressed

READ = (*LINES, ".parquet")
CLASS_COLUMNS = ("text", "label")  # of a folder with a folder for each class


@dataclass(frozen=True)
class Row:
    """One row of a table; `values` by what the task calls them."""

    name: str  # the file, and the line or row in it
    values: Mapping[str, Any]

    def text(self, role: str) -> str:
        """A value as a text, without space around it; empty where there is none."""
        value = self.values.get(role)
        return "" if value is None else str(value).strip()


@dataclass
class LeftOut:
    """How many rows were left out or changed, by why; and the name of the first of each kind."""

    counts: Counter = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Notes one."""
        self.counts[reason] += 1
        self.first.setdefault(reason, name)

    def told(self) -> str:
        """In one line; empty where all is well."""
        return "; ".join(f"{n:,} {reason} (first: {self.first[reason]})" for reason, n in self.counts.most_common())


def read_rows(
    path: str, columns: Mapping[str, str], optional: tuple[str, ...], key: str, left_out: LeftOut | None = None
) -> list[Row]:
    """The rows of all files that `path` names, in order; a note in `left_out` of files of a folder that hold none.

    columns: what the task asks for -> how a column is called; those that are `optional` may be missing. `key` is the
    setting that names the path, for messages. Raises ValueError for files that cannot be read and for missing columns.
    """
    folder, left_out = Path(path).expanduser(), left_out or LeftOut()
    if folder.is_dir() and any(child.is_dir() and not is_hidden(child) for child in folder.iterdir()):
        found = _classes(folder, left_out)
    else:
        try:
            files = named_files(path)
        except ValueError as error:
            raise ValueError(str(error).replace("data.path", key)) from None
        if strange := next((file for file in files if kind(file) not in READ), None):
            raise ValueError(f"{key}={strange}: a table is one of {' '.join(READ)}, or a folder of folders of texts")
        found = (row for file in files for row in _read(file))
    rows = []
    for name, values in found:
        for role, column in columns.items():
            if role not in optional and column not in values:
                hint = "; ".join(f"task.columns.{role}={one}" for one in list(values)[:1])
                raise ValueError(f"{name}: no column {column!r} for {role}; there are {', '.join(values)}: set {hint}")
        rows.append(Row(name, {role: values.get(column) for role, column in columns.items()}))
    if not rows:
        raise ValueError(f"{key}={path} holds no row" + (f": {left_out.told()}" if left_out.counts else ""))
    return rows


def is_heldout(row: Row, share: float) -> bool:
    """Whether a row is kept for evaluation: by what it says alone, the same in any order and on any machine."""
    return position(json.dumps([str(value) for value in row.values.values()])) < share


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is some program's own, as .ipynb_checkpoints or .DS_Store."""
    return path.name.startswith(".")


def _classes(folder: Path, left_out: LeftOut) -> Iterator[tuple[str, dict]]:
    """The texts of each folder, whose name is their label; hidden files and folders are passed over."""
    text, label = CLASS_COLUMNS
    for one in sorted(child for child in folder.iterdir() if not is_hidden(child)):
        inside = [one, *sorted(one.rglob("*"))]
        hidden = [path for path in inside if is_hidden(path)]
        for file in inside:
            if not file.is_file() or any(file.is_relative_to(other) for other in hidden):
                continue
            if one.is_dir() and file.suffix in TEXTS:
                yield str(file), {text: file.read_text(encoding="utf-8-sig", errors="replace"), label: one.name}
            else:
                left_out.add(f"that are no {' or '.join(TEXTS)} in a folder of a class: left out", str(file))


def _read(file: File) -> Iterator[tuple[str, dict]]:
    readers = {".jsonl": _json_lines, ".parquet": _parquet}
    try:
        with file.open("rb") as raw:
            yield from readers.get(kind(file), _csv)(file, raw)
    except (UnicodeDecodeError, csv.Error, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from None


def _json_lines(file: File, raw) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(decompressed(file, raw), 1):
        if line.strip():
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}:{number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{file}:{number}: a {type(row).__name__}, not an object with named fields")
            if rb"\u" in line and not _is_encodable(row):
                raise ValueError(f"{file}:{number}: a text holds half a surrogate pair, as in \\ud800")
            yield f"{file}:{number}", row


def _is_encodable(row: dict) -> bool:
    """Whether its texts are Unicode: JSON can spell half a surrogate pair, which no text can hold."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(sys.maxsize)  # of the whole process
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _csv(file: File, raw) -> Iterator[tuple[str, dict]]:
    stream = io.TextIOWrapper(decompressed(file, raw), "utf-8-sig", newline="")
    with _long_cells():
        rows = csv.reader(stream, strict=True, delimiter="\t" if kind(file) == ".tsv" else ",")
        header = next(rows, [])
        line = rows.line_num
        for row in rows:
            if row and len(row) != len(header):
                raise ValueError(f"{file}:{line + 1}: {len(row)} columns where the first line has {len(header)}")
            if row:
                yield f"{file}:{line + 1}", dict(zip(header, row, strict=True))
            line = rows.line_num


def _parquet(file: File, raw) -> Iterator[tuple[str, dict]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{file} needs the package pyarrow: make setup EXTRAS=data") from None
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(raw).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}:row {number}", row
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())[:300]}") from None
