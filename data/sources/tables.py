"""Parquet and Arrow files: a document a row, in one column of strings."""

import contextlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from data.sources.files import File
from data.sources.readers import Bad, Read, Reading, missing_column

ROWS = 256  # that are turned into Python's strings at a time


def read_parquet(path: File, raw: BinaryIO, how: Reading) -> Read:
    """The rows of a Parquet file, one row group after another."""
    arrow = _arrow(path)
    import pyarrow.parquet

    with _faults_of(arrow):
        file = pyarrow.parquet.ParquetFile(raw)
        _check_column(path, file.schema_arrow, how.field, arrow)
        rows, size = max(1, file.metadata.num_rows), raw.seek(0, 2)
        batches = file.iter_batches(batch_size=ROWS, columns=[how.field])
        yield from _texts(path, batches, how.field, rows, size)


def read_arrow(path: File, raw: BinaryIO, how: Reading) -> Read:
    """The rows of an Arrow file: a stream, as `datasets` writes it, or with an index at its end, as Feather has it."""
    arrow = _arrow(path)
    with _faults_of(arrow):
        indexed = raw.read(6) == b"ARROW1"
        size = raw.seek(0, 2)
        raw.seek(0)
        file = arrow.ipc.open_file(raw) if indexed else arrow.ipc.open_stream(raw)
        _check_column(path, file.schema, how.field, arrow)
        batches = (file.get_batch(i) for i in range(file.num_record_batches)) if indexed else file
        yield from _texts(path, batches, how.field, None, size, raw)


def _arrow(path: File) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise ValueError(f"{path} needs the package pyarrow: make setup EXTRAS=data") from None
    return pyarrow


@contextlib.contextmanager
def _faults_of(arrow: Any) -> Iterator[None]:
    """What Arrow finds damaged, as an OSError like that of any other format."""
    try:
        yield
    except arrow.ArrowException as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise OSError(" ".join(str(error).split())[:300]) from error


def _check_column(path: File, schema: Any, field: str, arrow: Any) -> None:
    if schema.get_field_index(field) < 0:  # absent, or there twice
        raise ValueError(f"{path}: {missing_column(field, schema.names)}")
    held = schema.field(field).type
    text = held.value_type if arrow.types.is_dictionary(held) else held
    if not (arrow.types.is_string(text) or arrow.types.is_large_string(text) or arrow.types.is_string_view(text)):
        raise ValueError(f"{path}: column {field!r} holds {held}, not strings; columns: {', '.join(schema.names)}")


def _texts(path: File, batches: Any, field: str, rows: int | None, size: int, raw: BinaryIO | None = None) -> Read:
    done = 0
    for batch in batches:
        column = batch.column(batch.schema.get_field_index(field))
        for begin in range(0, len(column), ROWS):
            for value in _values(column.slice(begin, ROWS)):
                done += 1
                read = raw.tell() if raw is not None else size * done // rows
                yield f"{path}:row {done}", value, min(read, size)


def _values(column: Any) -> list[str | Bad]:
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:  # one of them
        values = [_value(item) for item in column]
    return [Bad("null") if value is None else value for value in values]


def _value(item: Any) -> str | Bad | None:
    try:
        return item.as_py()
    except UnicodeDecodeError as error:
        return Bad(f"not UTF-8 at byte {error.start}")
