"""How a running cluster is asked for things: a socket in its folder, one JSON line there, JSON lines back.

Who may enter the folder may ask: it is its owner's alone. The last line back has "code", an exit code.
"""

import asyncio
import contextlib
import json
import os
import socket as sockets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from runtime.exit_codes import DONE, MISTAKE
from serving.cluster.supervisor import Supervisor

SOCKET = "control.sock"
MOST_BYTES = 65536  # of a line


@contextlib.asynccontextmanager
async def answering(supervisor: Supervisor, folder: Path) -> AsyncIterator[None]:
    """Inside, the socket answers."""
    path = folder / SOCKET
    path.unlink(missing_ok=True)
    mask = os.umask(0o177)
    try:
        server = await asyncio.start_unix_server(lambda *ends: _answer(supervisor, *ends), path, limit=MOST_BYTES)
    finally:
        os.umask(mask)
    try:
        yield
    finally:
        server.close()
        path.unlink(missing_ok=True)


async def _answer(supervisor: Supervisor, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    def say(**facts) -> None:
        with contextlib.suppress(OSError):  # who asked may be gone; what was asked for goes on
            writer.write(json.dumps(facts).encode() + b"\n")

    try:
        asked = json.loads(await reader.readline())
        if asked["command"] == "roll":
            await supervisor.roll(asked.get("model"), lambda line: say(line=line))
        say(replicas=[replica.described() for replica in supervisor.replicas], code=DONE)
    except (ValueError, KeyError, TypeError, OSError) as error:
        say(line=f"error: {error}", code=MISTAKE)
    finally:
        with contextlib.suppress(OSError):
            await writer.drain()
        writer.close()


def ask(folder: Path, **asked) -> Iterator[dict]:
    """What the cluster of this folder says, line by line. Raises ValueError where none runs."""
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as link:
        try:
            link.connect(str(folder / SOCKET))
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            raise ValueError(f"no cluster runs on {folder}: give the --state of one") from None
        link.sendall(json.dumps(asked).encode() + b"\n")
        with link.makefile("rb") as lines:
            for line in lines:
                yield json.loads(line)
