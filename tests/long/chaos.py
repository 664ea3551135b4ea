"""Faults on a cluster under load: python -m tests.long.chaos [--rounds N] [--clients N] [--folder DIR]

Two replicas of a tiny model behind haproxy, keys and limits in a Postgres of its own. Ten clients ask, streaming and
not, while one fault after another is made. Prints a table; the exit code is 1 where something was lost or wrong.
It is a program, so that it can run for hours.
"""

import argparse
import asyncio
import contextlib
import csv
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import jax

from inference.config import SampleConfig
from inference.generate import generate
from inference.opening import open_model
from runtime.ports import free_port
from serving.cluster import control
from tests import runs
from tests.long.chaos_clients import OUTCOMES, Clients, Question
from tests.long.postgres import Postgres

ROOT = Path(__file__).parent.parent.parent
NAME = "tiny"
LIMITED = {"requests_a_minute": 40, "concurrent": 2}
LIMITED_CLIENTS = 3
GRACE = 10
OUTAGE_SECONDS = 10.0
TRAINED = ("train.steps=150", "optimizer.lr=1e-2", "train.seq_len=512", "train.batch_size=2")
SPARSE = ("checkpoint.every=150", "train.eval_every=0")
PROMPTS = ("the mesh", "a run is", "what its", "loss sees", "of a run", "is not what", "mesh mesh", "its loss")
TOKENS = (8, 40, 400)
PLATFORM = ("runtime.platform=cpu", "runtime.compile_cache=null")  # that of the tests is on already


def train(folder: Path) -> list[Path]:
    """Two runs that differ in their seed."""
    text, models = runs.corpus(folder / "text"), [folder / "first", folder / "second"]
    for seed, model in enumerate(models, 1):
        if not model.exists():
            ended = runs.outside(runs.overrides(text, model, *TRAINED, *SPARSE, f"seed={seed}"), devices=1)
            assert ended.returncode == 0, ended.stderr
    return models


def reference(model: Path) -> tuple[str, dict[Question, str]]:
    """The fingerprint of a model, and the greedy text to each question as `inference.generate` finds it."""
    opened = open_model(model, PLATFORM)
    questions = [Question(prompt, tokens) for prompt in PROMPTS for tokens in TOKENS]
    prompts = [opened.tokenizer.encode(question.prompt).tolist() for question in questions]
    with jax.set_mesh(opened.mesh):
        sample = SampleConfig(tokens=max(TOKENS), temperature=0.0)
        new = generate(
            opened.description, opened.params, prompts, sample, eos_id=opened.tokenizer.eos_id, dtype=opened.dtype
        )
    cut = [ids[: question.tokens] for question, ids in zip(questions, new, strict=True)]
    texts = map(opened.tokenizer.decode, cut)
    return f"fp_{opened.digest[:32]}", dict(zip(questions, texts, strict=True))


@dataclass
class Fault:
    """What a fault did."""

    name: str
    began: float
    ended: float = 0.0
    out_after: float | None = None  # seconds until the balancer sent nothing more to the replica
    again: int = 0  # requests that the balancer sent a second time
    back_after: float | None = None  # seconds until all replicas were ready again


class Chaos:
    """A cluster that runs, and what is done to it."""

    def __init__(self, folder: Path, state: Path, models: list[Path], database: Postgres, port: int):
        self.folder, self.state, self.models, self.database = folder, state, models, database
        self.address = f"http://127.0.0.1:{port}"
        self.place = state / "cluster"
        self.faults: list[Fault] = []
        self.admin = ""
        self._serving = 0

    def replicas(self) -> list[dict]:
        """As the cluster tells of them."""
        (told,) = control.ask(self.place, command="show")
        return told["replicas"]

    async def until_ready(self, seconds: float = 900.0) -> None:
        """All replicas are ready, and haproxy knows it."""
        async with asyncio.timeout(seconds):
            while not all(each["state"] == "ready" for each in self.replicas()) or not all(self.up(n) for n in (1, 2)):
                await asyncio.sleep(0.1)

    def balancer(self, command: str) -> str:
        """What haproxy says."""
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(str(self.place / "haproxy.sock"))
            link.sendall(command.encode() + b"\n")
            return link.makefile().read()

    def stat(self, name: str) -> dict[str, str]:
        """haproxy's figures of a server of the pool."""
        rows = csv.DictReader(self.balancer("show stat").removeprefix("# ").splitlines())
        return next(row for row in rows if row["pxname"] == "replicas" and row["svname"] == name)

    def sent_again(self) -> int:
        """How many requests so far; haproxy counts each time."""
        return int(self.stat("BACKEND")["wretr"]) + int(self.stat("BACKEND")["wredis"])

    def up(self, number: int) -> bool:
        """Whether haproxy sends new requests to a replica."""
        return self.stat(f"r{number}")["status"].startswith("UP")

    @contextlib.asynccontextmanager
    async def fault(self, name: str, out: int | None = None):
        """Times what is made inside, until all is well again. out: the replica that has to leave the rotation."""
        fault = Fault(name, time.monotonic())
        self.faults.append(fault)
        print(f"{name} ...", file=sys.stderr, flush=True)
        before = self.sent_again()
        watch = asyncio.create_task(self._watch_out(fault, out)) if out else None
        yield fault
        if watch:
            await watch
        await self.until_ready()
        fault.back_after = time.monotonic() - fault.began
        await asyncio.sleep(2.0)
        fault.ended, fault.again = time.monotonic(), self.sent_again() - before

    async def _watch_out(self, fault: Fault, number: int) -> None:
        while self.up(number):
            await asyncio.sleep(0.02)
        fault.out_after = time.monotonic() - fault.began

    # ---- the faults ------------------------------------------------------------------------------------------

    async def calm(self) -> None:
        """No fault, to compare with."""
        async with self.fault("none"):
            await asyncio.sleep(10)

    async def kill(self) -> None:
        async with self.fault("kill -9", out=1):
            os.kill(self.replicas()[0]["pid"], signal.SIGKILL)

    async def freeze(self) -> None:
        async with self.fault("SIGSTOP", out=2):
            os.kill(self.replicas()[1]["pid"], signal.SIGSTOP)

    async def drain(self) -> None:
        """An operator drains a replica over HTTP, and ends it when it is empty."""
        async with self.fault("drain, SIGTERM", out=1), httpx.AsyncClient() as client:
            headers = {"Authorization": f"Bearer {self.admin}"}
            answer = await client.post(f"{self.address}/replicas/1/drain", headers=headers)
            assert answer.status_code == 200, answer.text
            await asyncio.sleep(3)
            os.kill(self.replicas()[0]["pid"], signal.SIGTERM)

    async def roll(self) -> None:
        self._serving = 1 - self._serving
        async with self.fault("roll to other weights"):
            command = [sys.executable, "-m", "serving", "roll", "--state", str(self.state), self.models[self._serving]]
            process = await asyncio.create_subprocess_exec(*command, cwd=ROOT)
            assert await process.wait() == 0

    async def full_disk(self) -> None:
        """No file of the replicas can grow: the audit cannot be written."""
        async with self.fault("audit disk full"):
            pids = [each["pid"] for each in self.replicas()]
            before = [resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids]
            for pid, (_, hard) in zip(pids, before, strict=True):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, hard))
            await asyncio.sleep(OUTAGE_SECONDS)
            for pid, limits in zip(pids, before, strict=True):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)

    async def no_database(self) -> None:
        async with self.fault("database gone 10 s"):
            await asyncio.to_thread(self.database.stop)
            await asyncio.sleep(OUTAGE_SECONDS)
            await asyncio.to_thread(self.database.start)


@contextlib.contextmanager
def cluster(folder: Path, state: Path, model: Path, port: int, environment: dict) -> Iterator[subprocess.Popen]:
    """A cluster, ended afterwards with exit code 0 and nothing left."""
    command = [sys.executable, "-m", "serving", "cluster", model, "--name", NAME, "--port", str(port), "--grace", GRACE]
    command += ["--state", state, "--max-running", 8, "--chunk", 64, "--replicas", 2, *PLATFORM]
    with open(folder / "cluster.log", "ab") as log:
        process = subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def serving(environment: dict, *words) -> subprocess.CompletedProcess:
    """python -m serving WORDS."""
    command = [sys.executable, "-m", "serving", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def key(state: Path, environment: dict, role: str, **limits: int) -> str:
    """A new key."""
    options = [word for name, value in limits.items() for word in (f"--{name.replace('_', '-')}", value)]
    made = serving(environment, "keys", "create", "--role", role, "--state", state, *options)
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


def table(clients: Clients, faults: list[Fault]) -> list[dict]:
    """A row a kind of fault."""
    rows = []
    for name in dict.fromkeys(fault.name for fault in faults):
        of = [fault for fault in faults if fault.name == name]
        counts = sum((clients.counts(fault.began, fault.ended) for fault in of), start=type(clients.counts())())
        waits = [
            one.over - one.began for f in of for one in clients.asked if one.over >= f.began and one.began < f.ended
        ]
        longest = max(waits, default=0.0)
        out = [fault.out_after for fault in of if fault.out_after is not None]
        facts = {"fault": name, "times": len(of), "out_s": round(max(out), 2) if out else None}
        facts |= {"back_s": round(max(fault.back_after for fault in of), 1), "longest_s": round(longest, 1)}
        facts["again"] = sum(fault.again for fault in of)
        rows.append(
            {
                **facts,
                **{name: counts[name] for name in OUTCOMES},
            }
        )
    return rows


def show(rows: list[dict]) -> None:
    """Prints a table."""
    for row in [dict(zip(rows[0], rows[0], strict=True)), *rows]:
        print(
            "  ".join(
                str("-" if value is None else value).rjust(22 if n == 0 else 7) for n, value in enumerate(row.values())
            )
        )


async def attack(chaos: Chaos, clients: Clients, keys: list[tuple[str, str]], rounds: int, only: str | None) -> None:
    """Makes every fault so many times, under load."""
    faults: list[Callable[[], Awaitable[None]]] = [
        *(chaos.calm, chaos.kill, chaos.freeze, chaos.drain, chaos.roll, chaos.full_disk, chaos.no_database)
    ]
    load = asyncio.create_task(clients.run(keys))
    try:
        for _ in range(rounds):
            for fault in faults:
                if only is None or fault.__name__ in only.split(","):
                    await fault()
                assert not load.done(), load.exception()
    finally:
        clients.stop = True
        await load


def main(arguments: list[str] | None = None) -> int:
    """Runs it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="how often each fault is made")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--only", help="faults by their names in the code")
    parser.add_argument("--folder", type=Path, help="where runs are kept for the next time; default: a new one")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        folder.mkdir(exist_ok=True)
        state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-state-")))
        os.environ.setdefault("ISOMESH_TEST_CACHE", str(folder / "cache-xla"))
        models = train(folder)
        expected = dict(map(reference, models))
        database = stack.enter_context(Postgres(free_port()))
        environment = runs.environment(ISOMESH_DATABASE=database.address)
        keys = {role: key(state, environment, role) for role in ("admin", "user")}
        keys["limited"] = key(state, environment, "user", **LIMITED)
        port = free_port()
        chaos = Chaos(folder, state, models, database, port)
        chaos.admin = keys["admin"]
        process = stack.enter_context(cluster(folder, state, models[0], port, environment))
        clients = Clients(chaos.address, NAME, expected)
        names = ["user"] * max(1, options.clients - LIMITED_CLIENTS) + ["limited"] * LIMITED_CLIENTS
        began = time.monotonic()

        async def whole() -> None:
            async with asyncio.timeout(900):
                while not (chaos.place / control.SOCKET).exists():
                    assert process.poll() is None, f"the cluster ended: see {folder / 'cluster.log'}"
                    await asyncio.sleep(0.1)
            await chaos.until_ready()
            await attack(chaos, clients, [(name, keys[name]) for name in names], options.rounds, options.only)

        asyncio.run(whole())
        figures = {"rows": table(clients, chaos.faults), "requests": len(clients.asked), "all": clients.counts()}
        audit = serving(environment, "audit", "verify", "--state", state)
        print(audit.stderr + audit.stdout, end="")
        figures |= {"audit": audit.returncode}
        figures |= {"overrun": clients.overrun("limited", **LIMITED), "minutes": (time.monotonic() - began) / 60}
    show(figures["rows"])
    print(json.dumps({name: value for name, value in figures.items() if name != "rows"}))
    for one in clients.asked:
        if one.outcome in ("refused", "lost", "untold", "wrong"):
            print(f"{one.outcome} after {one.over - one.began:.1f} s, stream={one.stream}: {one.why[:300]}")
    if options.json:
        options.json.write_text(json.dumps(figures))
    bad = sum(figures["all"][name] for name in ("lost", "untold", "wrong")) + figures["overrun"] + figures["audit"]
    late = [row for row in figures["rows"] if row["out_s"] and row["out_s"] > 2]
    return 1 if bad or late else 0


if __name__ == "__main__":
    sys.exit(main())
