"""A real Prometheus (Debian's) beside a cluster of two replicas and a run: what it finds, and that its alerts fire."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest
import runs
import yaml

from runtime.ports import free_port

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "serving/alerts"


@contextlib.contextmanager
def process(*words, **options):
    """A process, whose whole group is killed at the end."""
    started = subprocess.Popen(words, cwd=ROOT, text=True, start_new_session=True, **options)
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait(30)


def get(url: str, body: dict | None = None, key: str | None = None) -> dict:
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    with urlopen(Request(url, json.dumps(body).encode() if body else None, headers), timeout=60) as answer:
        return json.loads(answer.read())


class Prometheus:
    """The query API."""

    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}/api/v1"

    def query(self, expression: str) -> dict[str, float]:
        """Values by job and instance."""
        found = get(f"{self.url}/query?query={quote(expression)}")["data"]["result"]
        return {(one["metric"].get("job"), one["metric"].get("instance")): float(one["value"][1]) for one in found}

    def firing(self) -> set[tuple[str, str]]:
        """Alerts that fire, with the instance."""
        alerts = get(f"{self.url}/alerts")["data"]["alerts"]
        return {
            (one["labels"]["alertname"], one["labels"].get("instance")) for one in alerts if one["state"] == "firing"
        }


def until(condition, seconds: float):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if found := condition():
                return found
        time.sleep(0.5)
    raise AssertionError(f"not within {seconds:g} s")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    text = runs.corpus(tmp_path_factory.mktemp("seen") / "text")
    ended = runs.outside(runs.overrides(text, text.parent / "run", "train.steps=8"), devices=1)
    assert ended.returncode == 0, ended.stderr
    return text.parent / "run", text


def test_two_replicas_and_a_run_are_scraped_and_an_alert_fires(trained, tmp_path):
    run, text = trained
    replicas, trainer, port = free_port(2), free_port(), free_port()
    targets = [f"127.0.0.1:{replicas + number}" for number in range(2)]
    serve = (sys.executable, "-m", "serving", "cluster", str(run), "--replicas", "2", "--port", "0", "--name", "tiny")
    serve += ("--metrics-port", str(replicas), "--state", str(tmp_path / "s"), "--max-running", "4")
    again = runs.overrides(
        text, tmp_path / "again", "train.steps=1000000", f"metrics.prometheus_port={trainer}", "runtime.cpu_devices=1"
    )
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(tmp_path / "log", "w"))
        cluster = stack.enter_context(process(*serve, stdout=subprocess.PIPE, stderr=log, env=runs.environment()))
        address = cluster.stdout.readline().strip()  # once a replica is ready
        curl = next((line for line in cluster.stdout if line.startswith("curl ")), "")
        assert curl, (tmp_path / "log").read_text()
        key = re.search(r"Bearer ([^'\"\s]+)", curl)[1]
        threading.Thread(target=cluster.stdout.read, daemon=True).start()
        (tmp_path / "key").write_text(key)
        config = yaml.safe_load((ALERTS / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        for one in config["scrape_configs"]:
            mine = {"isomesh-serving": targets, "isomesh-training": [f"127.0.0.1:{trainer}"]}[one["job_name"]]
            one["static_configs"] = [{"targets": mine}]
        keyed = {"job_name": "keyed", "authorization": {"credentials_file": str(tmp_path / "key")}}
        keyless = {"job_name": "keyless"}
        for one in (keyed, keyless):  # at the server's own address
            config["scrape_configs"].append(one | {"static_configs": [{"targets": [address.removeprefix("http://")]}]})
        for file in config["rule_files"]:
            shutil.copy(ALERTS / file, tmp_path)
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
        words = ("prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data")
        words += (f"--web.listen-address=127.0.0.1:{port}", "--log.level=error")
        stack.enter_context(process(*words, stderr=log))
        trains = stack.enter_context(
            process(sys.executable, "train.py", *again, stdout=log, stderr=log, env=runs.environment())
        )
        prometheus = Prometheus(port)
        up = lambda: prometheus.query('up{job=~"isomesh-.*"}')
        until(lambda: len(up()) == 3 and all(up().values()), 400)
        until(lambda: prometheus.query("min(isomesh_ready)") == {(None, None): 1}, 400)

        # requests through the balancer are counted at the replicas
        for number in range(12):
            body = {"model": "tiny", "prompt": f"the mesh {number}", "max_tokens": 6, "ignore_eos": True}
            assert get(f"{address}/v1/completions", body, key)["usage"]["completion_tokens"] == 6
        total = lambda name: sum(prometheus.query(f'{name}{{job="isomesh-serving"}}').values())
        until(lambda: total("vllm:generation_tokens_total") >= 72, 30)
        counted = prometheus.query('vllm:generation_tokens_total{job="isomesh-serving"}')
        assert {instance for _, instance in counted} == set(targets)
        assert all(counted.values()), "one of two replicas has had no request"
        assert total("vllm:time_to_first_token_seconds_count") == 12
        assert prometheus.query("max(isomesh_compiles_after_warm_up_total)") == {(None, None): 0}

        # a key from a file opens /metrics at the server's address; without one there is nothing
        until(lambda: prometheus.query('up{job="keyed"}') == {("keyed", address.removeprefix("http://")): 1}, 20)
        assert list(prometheus.query('up{job="keyless"}').values()) == [0]

        # the run is seen, step by step
        step = lambda: next(iter(prometheus.query("isomesh_train_step").values()), 0)
        first = until(step, 300)
        until(lambda: step() > first, 120)
        assert list(prometheus.query("isomesh_train_loss > 0"))
        ended = {"ReplicaDown", "NoReplicaReady", "RunGone", "RunStalled", "CompiledWhileServing"}
        assert not ended & {name for name, _ in prometheus.firing()}

        # both come to an end that nobody asked for
        os.killpg(trains.pid, signal.SIGKILL)
        os.killpg(cluster.pid, signal.SIGKILL)  # its replicas end with it
        wanted = {("ReplicaDown", target) for target in targets} | {("RunGone", f"127.0.0.1:{trainer}")}
        wanted.add(("NoReplicaReady", None))
        until(lambda: wanted <= prometheus.firing(), 200)
