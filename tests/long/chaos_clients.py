"""Clients of a cluster under faults, and the judgement of each of their requests."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx

OUTCOMES = ("whole", "limited", "refused", "cut", "lost", "untold", "wrong")
PAUSE = 0.05  # seconds between two requests of a client


@dataclass(frozen=True)
class Question:
    """A request with one right answer for given weights."""

    prompt: str
    tokens: int


@dataclass
class Asked:
    """One request as its client saw it; times of time.monotonic()."""

    began: float
    stream: bool
    key: str
    first: float | None = None  # of the first byte of the answer
    over: float = 0.0
    outcome: str = ""
    why: str = ""
    tokens: int = 0  # of prompt and answer, where the answer says so


@dataclass
class Clients:
    """So many clients, each asking one thing after the other. expected: fingerprint -> question -> text."""

    address: str
    name: str
    expected: Mapping[str, Mapping[Question, str]]
    asked: list[Asked] = field(default_factory=list)
    stop: bool = False

    async def run(self, keys: list[tuple[str, str]]) -> None:
        """Until `stop`; keys: (what the key is called, the key) of each client."""
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
            await asyncio.gather(*(self._client(client, number, *key) for number, key in enumerate(keys)))

    async def _client(self, client: httpx.AsyncClient, number: int, called: str, key: str) -> None:
        draw, questions = random.Random(number), sorted(next(iter(self.expected.values())), key=lambda q: q.prompt)
        while not self.stop:
            one = Asked(time.monotonic(), draw.random() < 0.5, called)
            question = draw.choice(questions)
            try:
                await (self._streamed if one.stream else self._plain)(client, one, question, key)
            except (httpx.TransportError, ValueError) as error:
                one.outcome = "cut" if one.first else "lost"  # a broken connection is a client's to see
                one.why = f"{type(error).__name__}: {error}"
            one.over = time.monotonic()
            self.asked.append(one)
            await asyncio.sleep(1.0 if one.outcome in ("limited", "refused") else PAUSE)

    def _request(self, client: httpx.AsyncClient, one: Asked, question: Question, key: str) -> httpx.Request:
        body = {"model": self.name, "prompt": question.prompt, "max_tokens": question.tokens, "temperature": 0}
        body |= {"stream": True, "stream_options": {"include_usage": True}} if one.stream else {}
        headers = {"Authorization": f"Bearer {key}"}
        return client.build_request("POST", f"{self.address}/v1/completions", json=body, headers=headers)

    async def _plain(self, client: httpx.AsyncClient, one: Asked, question: Question, key: str) -> None:
        response = await client.send(self._request(client, one, question, key))
        if self._refused(one, response, response.content):
            return
        answer = response.json()
        one.tokens = answer["usage"]["total_tokens"]
        self._judge(one, question, answer["system_fingerprint"], answer["choices"][0]["text"], whole=True)

    async def _streamed(self, client: httpx.AsyncClient, one: Asked, question: Question, key: str) -> None:
        response = await client.send(self._request(client, one, question, key), stream=True)
        text, prints, done, told = "", set(), False, ""
        try:
            if self._refused(one, response, b"" if response.status_code == 200 else await response.aread()):
                return
            async for line in response.aiter_lines():
                one.first = one.first or time.monotonic()
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        told = event["error"]["message"]
                        continue
                    prints.add(event["system_fingerprint"])
                    one.tokens = (event.get("usage") or {}).get("total_tokens", one.tokens)
                    text += "".join(choice["text"] for choice in event["choices"])
        except httpx.TransportError as error:
            told = f"{type(error).__name__}: {error}"
        finally:
            await response.aclose()
        whole = done and not told
        if prints:
            self._judge(one, question, prints.pop(), text, whole=whole)
            if prints:
                one.outcome, one.why = "wrong", "two fingerprints in one stream"
        if one.outcome != "wrong" and not whole:
            one.outcome, one.why = ("cut" if told and one.first else "lost" if told else "untold"), told

    def _refused(self, one: Asked, response: httpx.Response, content: bytes) -> bool:
        """Whether the answer is an error, and which."""
        if response.status_code == 200:
            return False
        told = response.status_code in (429, 503) and "retry-after" in response.headers
        one.outcome = "lost" if not told else "limited" if response.status_code == 429 else "refused"
        one.why = f"{response.status_code} {content[:200]!r}"
        return True

    def _judge(self, one: Asked, question: Question, fingerprint: str, text: str, *, whole: bool) -> None:
        expected = self.expected.get(fingerprint, {}).get(question)
        right = expected is not None and (text == expected if whole else expected.startswith(text))
        one.outcome = "whole" if right else "wrong"
        if not right:
            one.why = f"{fingerprint} says {text!r} to {question.prompt!r}, not {expected!r}"

    def counts(self, since: float = 0.0, until: float = float("inf")) -> Counter:
        """Outcomes of the requests that ran at some moment of this time."""
        return Counter(one.outcome for one in self.asked if one.over >= since and one.began < until)

    def overrun(self, key: str, requests_a_minute: int, concurrent: int) -> int:
        """By how many requests a key certainly had more than its limits; what may have been within them is."""
        let_in = [one for one in self.asked if one.key == key and one.outcome in ("whole", "cut", "wrong")]
        minutes = ([o for o in let_in if o.began >= first.began and o.over <= first.began + 60] for first in let_in)
        most = max((len(inside) for inside in minutes), default=0) - requests_a_minute
        streams = [(one.first, one.over) for one in let_in if one.first and one.outcome == "whole"]
        beside = (sum(a < start < b for a, b in streams) + 1 for start, _ in streams)
        return max(0, most, max(beside, default=0) - concurrent)
