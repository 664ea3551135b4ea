"""A server under requests that come when they come: python bench/serving_rates.py MODEL --rates 0.25,0.5,1 --out FILE.

Open loop: arrivals are Poisson, whatever the server manages (so that slowness is not hidden by clients that wait). For
each rate: time to the first token, time per further token, p50 and p99, and goodput: the share of all requests that
met both limits, and how many a second that were. Each request is drawn from the sizes of MIXED (bench/serving.py),
greedy, streamed. Starts `python -m serving MODEL` with keys of its own; one JSON line a rate with what load stood
beside it, and with --plot a picture; --table FILE prints the lines of a file as a table. With --overhead it measures
what HTTP and access add to a request, over an engine that answers at once.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
from peers import machine
from serving_weights import ROOT

from serving import MIXED, requests_of, text_ids

OVERHEAD_REQUESTS = 500


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[list[str]]:
    """A process, until the block ends; gives the three lines that it prints first."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        lines = [process.stdout.readline().strip() for _ in range(3)]
        if not lines[0].startswith("http"):
            raise ValueError(f"{' '.join(command)} did not start: it says more when run by hand")
        yield lines
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


async def one(client: httpx.AsyncClient, request: dict, at: float, began: float) -> dict:
    """One request at its time: seconds to the first token and per further one, or its status if it was refused."""
    await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
    body = {"prompt": request["prompt"], "max_tokens": request["new"], "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    sent, times, tokens = began + at, [], 0  # from when it was due: waiting in the client is waiting
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            return {"status": response.status_code}
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                told = json.loads(line[6:])
                times += [time.perf_counter() - sent] * bool(told["choices"])
                tokens = told["usage"]["completion_tokens"] if told.get("usage") else tokens
    rest = (times[-1] - times[0]) / max(1, tokens - 1)
    return {"status": 200, "ttft": times[0], "tpot": rest, "tokens": tokens, "end": sent + times[-1] - began}


async def sweep(address: str, key: str, rate: float, seconds: float, ids: list[int], seed: int) -> list[dict]:
    """All requests of one rate."""
    draw = random.Random(seed)
    arrivals, at = [], draw.expovariate(rate)
    while at < seconds:
        arrivals.append(at)
        at += draw.expovariate(rate)
    requests = requests_of([draw.choice(MIXED) for _ in arrivals], ids, seed)
    limits, headers = httpx.Limits(max_connections=None), {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=address, headers=headers, limits=limits, timeout=None) as client:
        began = time.perf_counter()
        return await asyncio.gather(*(one(client, *pair, began) for pair in zip(requests, arrivals, strict=True)))


def told_of(rate: float, seconds: float, found: list[dict], ttft: float, tpot: float) -> dict:
    """The line of one rate."""
    served = [answer for answer in found if answer["status"] == 200]
    good = [answer for answer in served if answer["ttft"] <= ttft and answer["tpot"] <= tpot]
    last = max([seconds, *(answer["end"] for answer in served)])
    line = {"kind": "serving rate", "rate": rate, "requests": len(found), "refused": len(found) - len(served)}
    line |= {"goodput": len(good) / seconds, "goodput_share": len(good) / max(1, len(found))}
    line |= {"tokens_per_s": sum(answer["tokens"] for answer in served) / last, "mix": MIXED}
    for name in ("ttft", "tpot"):
        values = [answer[name] for answer in served] or [float("nan")]
        line |= {f"{name}_p50": float(np.percentile(values, 50)), f"{name}_p99": float(np.percentile(values, 99))}
    return line | {"limits": {"ttft": ttft, "tpot": tpot}, "seconds": seconds}


def overhead() -> list[dict]:
    """p50 and p99 of a request that the engine answers at once, through keys, limits and audit, one after another."""
    lines = []
    with started([sys.executable, str(ROOT / "bench/peers/serving_double.py")]) as (address, key, _):
        where = urlsplit(address)
        connection = http.client.HTTPConnection(where.hostname, where.port)
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        for stream in (False, True):
            body, seconds = json.dumps({"prompt": "the mesh", "max_tokens": 1, "stream": stream}), []
            for _ in range(OVERHEAD_REQUESTS + 50):
                began = time.perf_counter()
                connection.request("POST", "/v1/completions", body, headers)
                answer = connection.getresponse()
                answer.read()
                seconds.append(time.perf_counter() - began)
                assert answer.status == 200, answer.status
            p50, p99 = np.percentile(seconds[50:], [50, 99])
            about = {"kind": "serving overhead", "stream": stream, "requests": OVERHEAD_REQUESTS}
            lines.append(about | {"p50_s": float(p50), "p99_s": float(p99)})
    return lines


def table(lines: list[dict]) -> str:
    """The lines of rates as Markdown."""
    head = "| rate, requests/s | requests | TTFT p50 / p99, s | TPOT p50 / p99, s | within both limits |"
    rows = [head + " goodput, requests/s | new tokens/s | load |", "|---|---|---|---|---|---|---|---|"]
    for line in lines:
        times = (f"{line[f'{name}_p50']:.2f} / {line[f'{name}_p99']:.2f}" for name in ("ttft", "tpot"))
        cells = [
            f"{line['rate']:g}",
            line["requests"],
            *times,
            f"{line['goodput_share']:.0%}",
            f"{line['goodput']:.3f}",
        ]
        rows.append("| " + " | ".join(map(str, [*cells, f"{line['tokens_per_s']:.1f}", line["load"]])) + " |")
    return "\n".join(rows)


def plot(lines: list[dict], path: str) -> None:
    """Latency and goodput over the rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    rates = [line["rate"] for line in lines]
    for axis, name, words in ((axes[0], "ttft", "time to first token, s"), (axes[1], "tpot", "time per token, s")):
        for part, style in (("p50", "-o"), ("p99", "--o")):
            axis.plot(rates, [line[f"{name}_{part}"] for line in lines], style, label=part)
        axis.axhline(lines[0]["limits"][name], color="grey", linewidth=0.8, label="limit")
        axis.set(xlabel="requests/s", title=words, yscale="log")
        axis.legend()
    axes[2].plot(rates, [line["goodput"] for line in lines], "-o", label="goodput")
    axes[2].plot(rates, rates, color="grey", linewidth=0.8, label="all")
    axes[2].set(xlabel="requests/s", title="within both limits, requests/s")
    axes[2].legend()
    figure.savefig(path, dpi=100)


def main(given: argparse.Namespace) -> None:
    def tell(line: dict) -> None:
        text = json.dumps(line | {"machine": machine()})
        print(text, flush=True)
        if given.out:
            with open(given.out, "a", encoding="utf-8") as file:
                file.write(text + "\n")

    if given.table:
        with open(given.table, encoding="utf-8") as file:
            lines = [line for line in map(json.loads, file) if line["kind"] == "serving rate"]
        print(table(lines))
        if given.plot:
            plot(lines, given.plot)
        return
    if given.overhead:
        for line in overhead():
            tell(line)
        return
    if not given.model:
        raise ValueError("say which MODEL to serve, or --overhead")
    rates, lines = [float(rate) for rate in given.rates.split(",")], []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "serving", given.model, "--port", "0", "--state", f"{folder}/state"]
        with started([*command, *given.server.split()]) as (address, _, line):
            key, ids = re.search(r"Bearer (im-[\w-]+)", line)[1], text_ids()
            asyncio.run(sweep(address, key, 1.0, 5.0, ids, 0))  # warm
            for number, rate in enumerate(rates):
                found = asyncio.run(sweep(address, key, rate, given.seconds, ids, number + 1))
                about = {"model": Path(given.model).name, "server": given.server}
                about["load"] = round(os.getloadavg()[0], 1)  # of the last minute, this server's own included
                lines.append(told_of(rate, given.seconds, found, given.ttft, given.tpot) | about)
                tell(lines[-1])
    print(table(lines))
    if given.plot:
        plot(lines, given.plot)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", help="run directory, Hugging Face folder or .gguf file")
    parser.add_argument("--rates", default="0.1,0.2,0.4,0.8", help="requests a second, by commas")
    parser.add_argument("--seconds", type=float, default=60, help="of arrivals, at each rate")
    parser.add_argument("--ttft", type=float, default=1.0, help="limit of the time to the first token, s")
    parser.add_argument("--tpot", type=float, default=0.1, help="limit of the time per further token, s")
    parser.add_argument("--server", default="--max-length 1024", help="options of python -m serving, as one word")
    parser.add_argument("--overhead", action="store_true", help="what HTTP and access add to a request")
    parser.add_argument("--table", metavar="FILE", help="print the lines of a file as a table, and measure nothing")
    parser.add_argument("--out", help="file that the lines are appended to")
    parser.add_argument("--plot", help="picture of the rates")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    given = parse(sys.argv[1:])
    try:
        main(given)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
