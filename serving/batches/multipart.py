"""A form with a file, as HTTP clients send it (RFC 7578): written to disk as it comes, within bounds, and cut there.

Nothing of it is held in memory but a piece at a time, and no name that a client gives becomes a path.
"""

import asyncio
import email.parser
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import ClientDisconnect, Request

from serving.body import Gone
from serving.errors import ApiError

MOST_PARTS = 16
MOST_HEADERS = 8 << 10  # bytes of the headers of a part
MOST_FIELD = 4 << 10  # bytes of a field that is no file
MOST_AROUND = 64 << 10  # bytes of a form beside its file
SECONDS = 600.0  # that a form may take to arrive
LONGEST_NAME = 255  # characters of a file's name


@dataclass(frozen=True)
class Form:
    """The fields of a form, and where in the file on disk its one file lies: bytes `start` to `end`."""

    fields: Mapping[str, str]
    filename: str
    start: int
    end: int


async def receive(request: Request, path: Path, most: int) -> str:
    """Writes the body of a request to a path; returns its boundary. Raises ApiError 400, 408, 413 or 415.

    most: bytes of its file.
    """
    boundary = _boundary(request)
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > most + MOST_AROUND:
        raise _too_long(most)
    size = 0
    try:
        with path.open("xb") as file:
            async with asyncio.timeout(SECONDS):
                async for part in request.stream():
                    size += len(part)
                    if size > most + MOST_AROUND:
                        raise _too_long(most)
                    await asyncio.to_thread(file.write, part)
    except TimeoutError:
        raise ApiError(408, f"the file did not arrive within {SECONDS:g} s", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise Gone from None
    return boundary


def _boundary(request: Request) -> str:
    headers = email.parser.Parser().parsestr(f"Content-Type: {request.headers.get('content-type', '')}\n\n")
    if headers.get_content_type() != "multipart/form-data":
        raise ApiError(415, "send multipart/form-data with a part `file`: the header Content-Type says something else")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ApiError(415, "a compressed body is not read: send it without Content-Encoding")
    boundary = headers.get_param("boundary")
    if not isinstance(boundary, str) or not 0 < len(boundary) <= 70 or not boundary.isascii():
        raise ApiError(400, "the header Content-Type names no boundary of 1 to 70 characters", code="invalid_form")
    return boundary


def _too_long(most: int) -> ApiError:
    return ApiError(413, f"a file has at most {most} bytes", code="file_too_large", headers={"Connection": "close"})


def read_form(path: Path, boundary: str, most: int) -> Form:
    """The fields and the place of the file of a form that was received. Raises ApiError 400 or 413."""
    if not path.stat().st_size:
        raise _wrong("the form is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _read(data, boundary.encode(), most)


def _read(data: mmap.mmap, boundary: bytes, most: int) -> Form:
    fields: dict[str, str] = {}
    found: tuple[str, int, int] | None = None
    at = data.find(b"--" + boundary)
    if at not in (0, 2):  # a line break may stand before the first part
        raise _wrong("the form does not begin with its boundary")
    at += 2 + len(boundary)
    for _ in range(MOST_PARTS + 1):
        if data[at : at + 2] == b"--":
            break
        head = data.find(b"\r\n\r\n", at, at + MOST_HEADERS)
        end = data.find(b"\r\n--" + boundary, head + 2) if head >= 0 else -1
        if data[at : at + 2] != b"\r\n" or end < 0:
            raise _wrong("a part has no end, or headers that are no headers")
        start, headers = head + 4, email.parser.BytesParser().parsebytes(data[at + 2 : head + 4])
        name, filename = headers.get_param("name", header="content-disposition"), headers.get_filename()
        end = max(start, end)
        if name == "file" and found is None and filename is not None:
            found = plain_name(filename), start, end
        elif not isinstance(name, str) or name in fields or filename is not None or end - start > MOST_FIELD:
            raise _wrong(f"a form has one part `file` with a filename, and fields of at most {MOST_FIELD} bytes")
        else:
            fields[name] = data[start:end].decode("utf-8", "replace")
        at = end + 4 + len(boundary)
    else:
        raise _wrong(f"a form has at most {MOST_PARTS} parts")
    if found is None:
        raise ApiError(400, "file is missing: a part with a filename", param="file", code="missing_required_parameter")
    if found[2] - found[1] > most:
        raise _too_long(most)
    return Form(fields, *found)


def _wrong(what: str) -> ApiError:
    return ApiError(400, f"the body is no form that can be read: {what}", code="invalid_form")


def plain_name(name: str) -> str:
    """The last part of a name that a client gives its file, as it may be shown; it is never a path here."""
    last = name.replace("\\", "/").rpartition("/")[2]
    plain = "".join(character for character in last if character.isprintable())[:LONGEST_NAME].strip(". ")
    return plain or "unnamed"
