"""What the gate costs a request: identify, allow, admit and settle, on SQLite. python -m bench.access [REQUESTS]."""

import itertools
import sys
import tempfile
import time
from pathlib import Path

import uvloop
from fastapi import Request

from serving.access.door import Door, open_door
from serving.access.opening import open_state

PARTS = ("identify", "allow", "admit", "settle")
LIMITS = {"requests_a_minute": 10**9, "tokens_a_minute": 10**12, "tokens_a_day": 10**12, "concurrent": 1000}


def request(key: str) -> Request:
    """As it comes from uvicorn."""
    headers = [(b"authorization", f"Bearer {key}".encode())]
    path = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "state": {}}
    return Request({**path, "headers": headers, "client": ("127.0.0.1", 1)})


async def measured(door: Door, key: str, count: int) -> list[list[float]]:
    """Milliseconds of each part, for each request."""
    rows = []
    for _ in range(count):
        asked, times = request(key), [time.perf_counter()]
        who = await door.identify(asked)
        times.append(time.perf_counter())
        await door.allow(who, "chat", asked)
        times.append(time.perf_counter())
        room = await door.admit(who, asked, permission="chat", model="m", prompt_tokens=10, new_tokens=20)
        times.append(time.perf_counter())
        await room.settle(200, 10, 5)
        times.append(time.perf_counter())
        rows.append([1e3 * (after - before) for before, after in itertools.pairwise(times)])
    return rows[len(rows) // 20 :]


async def main(count: int) -> None:
    """A table: p50 and p99 of the parts and of all together, with all limits and with none."""
    with tempfile.TemporaryDirectory() as folder:
        opened = open_state(Path(folder))
        keys = {kind: opened.keys.create("user", made_by="bench", limits=limits)[1] for kind, limits in
                (("all limits", LIMITS), ("no limits", {}))}  # fmt: skip
        door = open_door(opened)
        door.start()
        for kind, key in keys.items():
            rows = await measured(door, key, count)
            columns = {name: [row[number] for row in rows] for number, name in enumerate(PARTS)}
            columns["together"] = [sum(row) for row in rows]
            for name, values in columns.items():
                values.sort()
                p50, p99 = (values[int(len(values) * share)] for share in (0.5, 0.99))
                print(f"{kind:10}  {name:8}  p50 {p50:.3f} ms  p99 {p99:.3f} ms")
        door.close()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5000))
