"""Reads the file of an offline W&B run: its config, its history, its id.

The file is a log of protocol buffers in the format of LevelDB's: blocks of 32 KiB, which hold pieces with a checksum,
a length and a kind each; a record is a whole piece, or a first, middle ones and a last.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

BLOCK, HEADER, PREFIX = 32768, struct.Struct("<IHB"), 7  # the prefix: ":W&B", a magic number, a version
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file. Raises ValueError where it is damaged or cut short, after those before."""
    content = path.read_bytes()
    if content[:4] != b":W&B":
        raise ValueError(f"{path} is no W&B file")
    at, parts = PREFIX, b""
    while at < len(content):
        if BLOCK - at % BLOCK < HEADER.size:  # the rest of a block is padding
            at += BLOCK - at % BLOCK
            continue
        if at + HEADER.size > len(content):
            raise ValueError(f"{path} is cut short at byte {at}")
        checksum, length, kind = HEADER.unpack_from(content, at)
        data = content[at + HEADER.size : at + HEADER.size + length]
        if len(data) < length:
            raise ValueError(f"{path} is cut short at byte {at}")
        if zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum or kind not in (FULL, FIRST, MIDDLE, LAST):
            raise ValueError(f"{path} is damaged at byte {at}")
        parts = data if kind in (FULL, FIRST) else parts + data
        if kind in (FULL, LAST):
            yield parts
        at += HEADER.size + length


def read_offline(directory: Path) -> tuple[dict, list[dict], dict, str]:
    """Config, history rows, provenance and what is wrong with the file ("" if nothing) of an offline-run directory.

    Raises ValueError if there is no file, or it says nothing of a run.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # slow to import, and needed here only

    files = sorted(directory.glob("run-*.wandb"))
    if not files:
        raise ValueError(f"{directory} holds no run-*.wandb file")
    config, history, facts, wrong = {}, [], {}, ""
    try:
        for data in records(files[0]):
            record = Record.FromString(data)
            if record.HasField("run"):
                facts |= {"run": record.run.run_id, "began": record.run.start_time.seconds}
                facts |= {"host": record.run.host} if record.run.host else {}
                facts |= {"commit": record.run.git.commit} if record.run.git.commit else {}
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("config"):
                config |= {item.key: json.loads(item.value_json) for item in record.config.update}
            if record.HasField("history"):
                history.append(
                    {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                )
    except ValueError as error:
        wrong = str(error)
    if not facts or not config:
        raise ValueError(wrong or f"{files[0]} tells of no run")
    return config, [row for row in history if "step" in row and "samples" not in row], facts, wrong
