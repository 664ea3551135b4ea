"""A real gate before the engine's double, listening: for tests of who may do what."""

import contextlib
import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from doubles import EngineDouble, chat_template, listening
from fastapi import FastAPI

from serving.access import routes, verify
from serving.access.audit import FOLDER
from serving.access.door import Door, open_door
from serving.access.opening import Opened, open_state
from serving.access.tokens import Provider
from serving.app import create_app
from serving.batches.opening import add_batches
from serving.page.router import router
from serving.service import Service


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self):
        return json.loads(self.text)

    @property
    def message(self) -> str:
        return self.json["error"]["message"]


@dataclass
class Guarded:
    """A server and what guards it."""

    address: str
    app: FastAPI
    engine: EngineDouble
    opened: Opened
    door: Door

    def key(self, role: str = "user", **how) -> str:
        """The text of a new key."""
        return self.opened.keys.create(role, made_by="test", **how)[1]

    def ask(self, key: str | None, method: str, path: str, body=None, **headers) -> Answer:
        """One request; headers' underscores stand for hyphens."""
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            told["authorization"] = f"Bearer {key}"
        if body is not None:
            told.setdefault("content-type", "application/json")
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
        where = urlsplit(self.address)
        with contextlib.closing(http.client.HTTPConnection(where.hostname, where.port, timeout=20)) as connection:
            connection.request(method, path, body, told)
            response = connection.getresponse()
            return Answer(
                response.status,
                {name.lower(): value for name, value in response.getheaders()},
                response.read().decode(),
            )

    def complete(self, key: str | None, prompt: str = "the mesh", max_tokens: int = 3, **more) -> Answer:
        """A completion."""
        return self.ask(key, "POST", "/v1/completions", {"prompt": prompt, "max_tokens": max_tokens, **more})

    def records(self) -> list[dict]:
        """All that the audit of the server holds."""
        folder = self.opened.folder / FOLDER
        return [line.record for chain in verify.chains(folder) for line in verify.lines(folder, chain)]


@contextlib.contextmanager
def guarded(state: Path, provider: Provider | None = None, policy: str = "", **how) -> Iterator[Guarded]:
    """A server whose state is in a folder, with lines of policy.csv; `how` as Door has it."""
    state.mkdir(exist_ok=True)
    if policy:
        (state / "policy.csv").write_text(policy)
    opened = open_state(state)
    door = open_door(opened, provider, **how)
    chat = chat_template()
    engine = EngineDouble(tokenizer=chat.tokenizer)
    engine.start()
    service = Service(engine, "double", "d0" * 32, chat)
    add_batches(state / "batches", service, door)
    app = create_app(service, door, [routes.router, router])
    door.start()
    try:
        with listening(app) as address:
            yield Guarded(address, app, engine, opened, door)
    finally:
        door.close()
