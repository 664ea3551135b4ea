"""A run's metrics as Prometheus reads them, and that whoever reads them does not disturb the run."""

import math
import re
import socket
import time
import urllib.request
from pathlib import Path

import pytest
import runs
from prometheus_client.parser import text_string_to_metric_families

from config import compose
from runtime.ports import free_port
from runtime.scrapes import MOST_SCRAPES
from tracking.prometheus import BESIDE, KEYS, PrometheusSink, exported, exporter
from tracking.sinks import MetricsConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sink():
    sink = PrometheusSink("127.0.0.1", 0, 'nano-"a\\b\n', 500)
    yield sink
    sink.close()


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        return answer.read().decode()


def samples(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """The samples of an exposition, read by another reader: (name, values of labels) -> value."""
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(s.labels.values())): s.value for family in families for s in family.samples}


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(10)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_values_are_the_newest_in_base_units(sink):
    sink.log(10, {"tokens": 4096, "perf/step_ms": 250.0, "perf/peak_tflops": 2.0, "perf/peak": "a text"})
    sink.log(10, {"eval/loss": 0.1 + 0.2, "eval/loss/web": 2.0, "eval/capitals/acc": 0.25, "moe/load/003": 1.5})
    sink.stepped(11, {"train/loss": math.nan}, finite=False, spiked=False)
    sink.stepped(12, {"train/loss": 9.0, "train/grad_norm": math.inf}, finite=True, spiked=True)
    found = samples(scrape(sink.port))
    assert found["isomesh_run_info", ('nano-"a\\b\n',)] == 1
    assert found["isomesh_train_step", ()] == 12
    assert found["isomesh_train_planned_steps", ()] == 500
    assert found["isomesh_train_tokens", ()] == 4096
    assert found["isomesh_perf_step_seconds", ()] == 0.25
    assert found["isomesh_perf_peak_flops_per_second", ()] == 2e12
    assert found["isomesh_eval_loss", ()] == 0.1 + 0.2  # to the last bit
    assert found["isomesh_eval_source_loss", ("web",)] == 2.0
    assert found["isomesh_eval_task", ("capitals", "acc")] == 0.25
    assert found["isomesh_moe_load", ("003",)] == 1.5
    assert (found["isomesh_train_loss", ()], found["isomesh_train_grad_norm", ()]) == (9.0, math.inf)
    assert (found["isomesh_train_loss_spikes_total", ()], found["isomesh_train_nonfinite_steps_total", ()]) == (1, 1)
    assert abs(time.time() - found["isomesh_train_last_step_timestamp_seconds", ()]) < 60


def test_every_documented_key_has_a_name_of_its_own_and_the_page_tells_it():
    page = (ROOT / "docs/metrics.md").read_text()
    documented = set(re.findall(r"`((?:train|eval|perf|data|moe)/[^`]+)`", page)) | {"step", "tokens", "epoch"}
    documented -= {"perf/peak", "eval/<metric>", "eval/accuracy", "eval/f1"}  # a text; names that a task chooses
    assert len(documented) > 35
    for key in documented:
        metric, labels = exported(re.sub(r"<\w+>", "x", key))
        assert metric in KEYS.values(), key
        assert labels or key in KEYS
    names = [metric.name for metric in (*KEYS.values(), *BESIDE)]
    assert len(set(names)) == len(names)
    assert set(re.findall(r"`isomesh_(\w+)[{`]", page)) == set(names)


def test_an_unknown_key_is_exported_too(sink):
    sink.log(1, {"custom/some-thing": 3})
    assert samples(scrape(sink.port))["isomesh_custom_some_thing", ()] == 3


def test_clients_that_do_not_read_neither_hold_up_the_run_nor_fill_it_with_threads(sink):
    idle = [socket.create_connection(("127.0.0.1", sink.port)) for _ in range(3 * MOST_SCRAPES)]
    for one in idle[: MOST_SCRAPES - 1]:
        one.sendall(b"GET /metrics HTTP/1.1\r\nHost: x")  # and no end
    began = time.perf_counter()
    for step in range(200):
        sink.log(step, {"train/loss": 1.0})
        sink.stepped(step, {"train/loss": 1.0}, finite=True, spiked=False)
    sink.close()  # waits for none of them
    assert time.perf_counter() - began < 1.0
    assert any(is_closed(one) for one in idle[MOST_SCRAPES:])  # turned away at once
    for one in idle:
        one.close()


def test_nothing_listens_unless_asked_and_in_process_0_alone():
    with exporter(MetricsConfig(), "run", 1, True) as sinks:
        assert sinks == []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with exporter(MetricsConfig(prometheus_port=port), "run", 1, False) as sinks:
            assert sinks == []
        with (
            pytest.raises(ValueError, match=f"metrics.prometheus_port={port} is in use; choose another"),
            exporter(MetricsConfig(prometheus_port=port), "run", 1, True),
        ):
            pass


def test_what_cannot_be_listened_on_is_told_by_its_key():
    with pytest.raises(ValueError, match=r"metrics.prometheus_port=70000 is no port: 1 to 65535"):
        MetricsConfig(prometheus_port=70000)
    with (
        pytest.raises(ValueError, match=r"metrics.prometheus_host=192.0.2.1 cannot be listened on"),
        exporter(MetricsConfig(prometheus_port=9, prometheus_host="192.0.2.1"), "run", 1, True),
    ):
        pass


def test_a_run_on_a_taken_port_ends_before_it_has_written_anything(tmp_path, capfd):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = runs.corpus(tmp_path / "text")
        asked = runs.overrides(text, tmp_path / "run", f"metrics.prometheus_port={port}")
        assert runs.run(asked, devices=1) == 2
    assert capfd.readouterr().err.splitlines() == [
        f"error: metrics.prometheus_port={port} is in use; choose another port"
    ]
    assert not (tmp_path / "run" / "config.yaml").exists()


def exposition_of_a_run(tmp_path, monkeypatch) -> str:
    """What a run of eight steps in `tmp_path`/run exports at its end."""
    monkeypatch.chdir(tmp_path)
    scraped, close = [], PrometheusSink.close

    def close_later(sink):
        if sink._scrapes is not None:
            scraped.append(scrape(sink.port))
        close(sink)

    monkeypatch.setattr(PrometheusSink, "close", close_later)
    text = runs.corpus(tmp_path / "text")
    port = free_port()
    asked = runs.overrides(text, tmp_path / "run", f"metrics.prometheus_port={port}", "train.steps=8")
    assert runs.run(asked, devices=1) == 0
    (exposition,) = scraped
    return exposition


def test_a_run_exports_what_it_writes(tmp_path, monkeypatch):
    found, lines = samples(exposition_of_a_run(tmp_path, monkeypatch)), runs.lines(tmp_path / "run")
    newest = {key: value for line in lines for key, value in line.items() if not isinstance(value, str)}
    for key, value in newest.items():
        metric, labels = exported(key)
        assert metric in KEYS.values(), key
        assert found[f"isomesh_{metric.name}", labels] == value * metric.scale
    assert found["isomesh_run_info", ("run",)] == 1
    assert found["isomesh_train_planned_steps", ()] == 8


def test_the_port_does_not_decide_what_a_run_is():
    assert compose.load(["metrics.prometheus_port=9464"]).run.dir == compose.load([]).run.dir
