"""How text files are read: each reader yields (name, content, bytes read so far), where content is a text or a Bad."""

import csv
import gzip
import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from data.sources.files import File, kind

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Bad:
    """What stands where a document should: why it cannot be read."""

    reason: str


@dataclass(frozen=True)
class Reading:
    """What a reader needs to know beside its file."""

    field: str  # of the text
    tokenizer: "Tokenizer | None" = None  # of files that hold tokens


Content = str | np.ndarray | Bad
Read = Iterator[tuple[str, Content, int]]


def read_python(path: File, raw: BinaryIO, how: Reading) -> Read:
    """A Python module: one document, in the encoding that it declares."""
    try:
        yield str(path), importlib.util.decode_source(raw.read()), raw.tell()
    except (SyntaxError, UnicodeDecodeError) as error:
        yield str(path), Bad(str(error)), raw.tell()


def read_text(path: File, raw: BinaryIO, how: Reading) -> Read:
    """A text file: one document, in UTF-8."""
    content = decompressed(path, raw).read()
    try:
        yield str(path), content.decode("utf-8-sig"), raw.tell()
    except UnicodeDecodeError as error:
        yield str(path), Bad(f"not UTF-8 at byte {error.start}"), raw.tell()


def read_json_lines(path: File, raw: BinaryIO, how: Reading) -> Read:
    """JSON lines: a document a line, in one field of an object."""
    for number, line in enumerate(decompressed(path, raw), 1):
        if line.strip():
            yield f"{path}:{number}", _field_of(line, how.field), raw.tell()


def _field_of(line: bytes, field: str) -> str | Bad:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Bad(f"not UTF-8 at byte {error.start} of the line")
    except (json.JSONDecodeError, RecursionError) as error:
        return Bad(f"not JSON: {error}")
    except ValueError:
        return Bad(f"an integer of more than {sys.get_int_max_str_digits():,} digits, which Python does not read")
    if not isinstance(record, dict):
        return Bad(f"a {type(record).__name__}, not an object with a field {field!r}")
    if not isinstance(record.get(field), str):
        found = f"{field!r} is a {type(record[field]).__name__}" if field in record else f"no field {field!r}"
        return Bad(f"{found}; set data.field to the field with the text, one of {', '.join(record)}")
    try:
        record[field].encode()
    except UnicodeEncodeError as error:  # JSON can spell what no text can hold
        return Bad(f"{field!r} holds half a surrogate pair at character {error.start}")
    return record[field]


def read_csv(path: File, raw: BinaryIO, how: Reading) -> Read:
    """CSV, or with tabs TSV: a document a row, in one column. The first row names the columns.

    A quote that is opened and never closed swallows what follows it, as in every reader of CSV: it is told at the end.
    """
    limit = csv.field_size_limit(sys.maxsize)  # of the whole process: set back below
    try:
        yield from _rows_of_csv(path, raw, how)
    finally:
        csv.field_size_limit(limit)


def _rows_of_csv(path: File, raw: BinaryIO, how: Reading) -> Read:
    stream = io.TextIOWrapper(decompressed(path, raw), "utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.reader(stream, strict=True, delimiter="\t" if kind(path) == ".tsv" else ",")
    header = _next_row(rows)
    if header is None:
        return
    if isinstance(header, Bad):
        yield f"{path}:1", header, raw.tell()
        return
    if how.field not in header:
        raise ValueError(f"{path}:1: {missing_column(how.field, header)}")
    column = header.index(how.field)
    while True:
        line = rows.line_num + 1
        row = _next_row(rows)
        if row is None:
            return
        if row:
            yield f"{path}:{line}", row if isinstance(row, Bad) else _cell(row, column, header), raw.tell()


def _next_row(rows: Any) -> list[str] | Bad | None:
    try:
        return next(rows, None)
    except csv.Error as error:
        return Bad(f"not CSV: {error}")


def _cell(row: list[str], column: int, header: list[str]) -> str | Bad:
    if len(row) != len(header):
        return Bad(f"{len(row)} columns where the first line has {len(header)}")
    try:
        row[column].encode()
    except UnicodeEncodeError as error:
        return Bad(f"not UTF-8 at character {error.start} of {header[column]!r}")
    return row[column]


def missing_column(field: str, columns: list[str]) -> str:
    """What is wrong with a table that lacks the column of the text."""
    return f"no column {field!r}; set data.field to the column with the text, one of {', '.join(columns)}"


# ---- compression -------------------------------------------------------------------------------------------------


def decompressed(path: File, raw: BinaryIO) -> BinaryIO:
    """The bytes of a file without its compression."""
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdStream(raw), 1 << 20)
    return raw


class _ZstdStream(io.RawIOBase):
    """Reads every frame of a .zst file, and unlike the library's own reader notices when the last one breaks off."""

    def __init__(self, raw: BinaryIO):
        import zstandard  # here, so that other files are read without it

        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._open = None
        self._waiting = b""  # compressed, not looked at yet
        self._ready = memoryview(b"")  # text, not handed out yet

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            chunk = self._waiting or self._raw.read(1 << 18)
            if not chunk:
                if self._open:
                    raise EOFError("compressed file ended before the end-of-stream marker was reached")
                return 0
            self._open = self._open or self._frame()
            try:
                self._ready = memoryview(self._open.decompress(chunk))
            except self._error as error:
                raise OSError(f"damaged zstd data ({error})") from error
            self._waiting = self._open.unused_data
            if self._open.eof:
                self._open = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
