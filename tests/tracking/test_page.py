"""The page of runs: what is in its data, that texts stay texts, how long runs are thinned, and what live serves."""

import base64
import hashlib
import http.client
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tracking.__main__ import main
from tracking.live import Server
from tracking.metrics_file import MetricsFile
from tracking.page import contents, page
from tracking.run import Run, differences, flat_settings, names, open_runs, parse_samples
from tracking.run_directory import RunDirectory
from tracking.series import Series

ROOT = Path(__file__).parent.parent.parent
HOSTILE = "</script </script><script>alert(1)</script><!--<script>&lt;'\"\u2028\ud800"


def write_run(path: Path, rows: list[tuple[int, dict]], config: dict | None = None, samples=()) -> Path:
    """A run's directory, by the writers that training uses."""
    directory = RunDirectory(path)
    directory.write_config(yaml.safe_dump(config or {"train": {"steps": 100}}))
    file = MetricsFile(directory.metrics)
    for step, metrics in rows:
        file.log(step, metrics)
    file.close()
    for step, prompt, text in samples:
        directory.write_samples(step, [(prompt, text)])
    return path


def rows(count: int, seed: int = 0, first: int = 1) -> list[tuple[int, dict]]:
    """Lines as a run writes them, an evaluation at every fourth step."""
    draw, found = random.Random(seed), []
    for step in range(first, first + count):
        values = {"tokens": 64 * step, "train/loss": draw.random(), "train/lr": 1e-3 / step, "perf/mfu": draw.random()}
        found.append((step, values | {"moe/load/000": draw.random()}))
        if step % 4 == 0:
            found.append((step, {"tokens": 64 * step, "eval/loss": draw.random()}))
    return found


class Elements(HTMLParser):
    """The elements of a page: (tag, attributes), and the text of each script by its id."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.scripts, self.titles, self._open = [], {}, [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._open = (tag, dict(attrs).get("id", ""))

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, text):
        if self._open and self._open[0] == "script":
            self.scripts[self._open[1]] = self.scripts.get(self._open[1], "") + text
        elif self._open and self._open[0] == "title":
            self.titles.append(text)


def data_of(text: str) -> dict:
    return json.loads(Elements(text).scripts["data"])


def series_of(file: Path, key: str, run: int = 0) -> list[tuple[int, float]]:
    found = data_of(file.read_text())["runs"][run]["series"][key]
    return list(zip(found["step"], map(float, found["value"]), strict=True))


# ----------------------------------------------------------------------------------------------------------------- data


def test_every_step_of_every_metric_is_in_the_page(tmp_path):
    written = rows(200)
    run = write_run(tmp_path / "run", written)
    assert main([str(run)]) == 0
    found = data_of((run / "page.html").read_text())["runs"][0]["series"]
    keys = {key for _, metrics in written for key in metrics} - {"moe/load/000"}  # of each layer: only their worst
    assert set(found) == keys
    for key in keys:
        points = [(step, metrics[key]) for step, metrics in written if key in metrics]
        assert list(zip(found[key]["step"], found[key]["value"], strict=True)) == points


def test_the_charts_ask_for_keys_that_are_documented():
    script, documented = (ROOT / "tracking/page.js").read_text(), (ROOT / "docs/metrics.md").read_text()
    keys = [word for word in script.split('"') if word.startswith(("train/", "eval/", "perf/", "moe/"))]
    assert {"train/loss", "eval/loss", "train/lr", "train/grad_norm", "perf/tokens_per_s", "perf/mfu"} <= set(keys)
    assert not [key for key in keys if f"`{key}`" not in documented]


def test_values_that_are_not_finite(tmp_path):
    values = [1.0, math.nan, math.inf, -math.inf, 2.0]
    run = write_run(tmp_path / "run", [(step, {"train/loss": value}) for step, value in enumerate(values)])
    assert main([str(run)]) == 0
    found = [value for _, value in series_of(run / "page.html", "train/loss")]
    np.testing.assert_array_equal(found, values)


def test_settings_that_differ():
    one = {"train": {"steps": 10, "lr": 0.1}, "model": {"layers": 2, "names": ["a", "b"]}, "run": {"dir": "x"}}
    two = {"train": {"steps": 10, "lr": 0.2}, "model": {"layers": 2, "names": ["a"]}, "run": {"dir": "y"}, "new": None}
    flat = [flat_settings(yaml.safe_dump(config)) for config in (one, two)]
    expected = {"train.lr": ["0.1", "0.2"], "model.names": ['["a", "b"]', '["a"]'], "new": [None, "null"]}
    assert differences(flat) == expected
    assert differences([flat[0]] * 3) == {} == differences(flat[:1])


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [tmp_path / "a/run", tmp_path / "b/run", tmp_path / "other"]
    assert names(paths) == ["a/run", "b/run", f"{tmp_path.name}/other"]
    assert names(paths[:1]) == ["run"]


def test_samples_are_read_as_they_were_written(tmp_path):
    written = [(3, "def ", "f():\n  '--- no heading'\n"), (3, "", "\n\n"), (9, 'it\'s "x"\n', HOSTILE[:-1])]
    run = write_run(tmp_path / "run", rows(1), samples=written)
    found = parse_samples((run / "samples.txt").read_text())
    assert [(sample["step"], sample["prompt"], sample["text"]) for sample in found] == written
    assert data_of(page(open_runs([run])))["runs"][0]["samples"] == found
    assert parse_samples("half a sample\n--- step 1, prompt __import__('os')\ntext\n") == [
        {"step": 1, "prompt": "", "text": "text"}
    ]


# ------------------------------------------------------------------------------------------------------------- escaping


def test_texts_of_runs_stay_texts(tmp_path):
    """A name, a sample, a setting and a metric that try to end the script reach the data as they are."""
    name = "<script>alert(1)&lt;\udcff"  # the last is a byte that is no UTF-8
    metrics = [(1, {"train/loss": 1.0, "perf/peak": HOSTILE, HOSTILE[:-1]: 2.0})]
    samples = [(1, HOSTILE[:-1], "</script>")]
    run = write_run(tmp_path / name, metrics, {"wandb": {"name": HOSTILE[:-1]}}, samples)
    text = page(open_runs([run]))
    elements = Elements(text)
    tags = [tag for tag, _ in elements.found]
    head = ["html", "head", *["meta"] * 4, "link", "title", "style"]
    assert tags == [*head, "body", "noscript", "script", "script"]
    assert "".join(elements.titles).startswith("<script>alert(1)&lt;")
    assert "<" not in elements.scripts["data"]  # browsers end a script earlier than this parser does
    found = json.loads(elements.scripts["data"])["runs"][0]
    assert found["name"] == run.name
    assert found["facts"]["perf/peak"] == HOSTILE
    assert found["series"][HOSTILE[:-1]] == {"step": [1], "value": [2.0]}
    assert found["settings"]["wandb.name"] == HOSTILE[:-1]
    assert found["samples"] == [{"step": 1, "prompt": HOSTILE[:-1], "text": "</script>"}]
    assert main([str(run), "--out", str(tmp_path / "page.html")]) == 0


def test_the_page_asks_for_nothing_and_runs_its_own_script_alone(tmp_path):
    elements = Elements(page(open_runs([write_run(tmp_path / "run", rows(3))])))
    for _, attributes in elements.found:
        assert not attributes.keys() & {"src", "srcset", "action", "onload", "onclick"}
        assert attributes.get("href", "data:,") == "data:,"
    policy = next(a["content"] for _, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(elements.scripts[""].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert "connect-src" not in policy


# ------------------------------------------------------------------------------------------------------------- thinning

VALUES = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([math.nan, math.inf, -math.inf, 0.0]))


@given(st.lists(st.tuples(st.integers(0, 400), VALUES), min_size=1, max_size=300), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_thinning_keeps_extremes(points, draw):
    series, pieces = Series(buckets=8), Series(buckets=8)
    for step, value in points:
        series.add(step, value)
        pieces.add(step, value)
        if draw.random() < 0.2:
            pieces.fold()
    found = series.points()
    kept = list(zip(found["step"], found["value"], strict=True))
    assert repr(pieces.points()["value"]) == repr(found["value"]), "it matters in which pieces the points came"
    assert pieces.points()["step"] == found["step"] == sorted(found["step"])
    assert len({step // series.width for step in found["step"]}) <= 8
    assert not set(map(repr, kept)) - set(map(repr, points)), "a point that was not measured"
    for bucket in {step // series.width for step, _ in points}:
        inside = lambda some, bucket=bucket: [value for step, value in some if step // series.width == bucket]
        for test in (math.isfinite, lambda value: not math.isfinite(value)):
            all_, few = (list(filter(test, inside(some))) for some in (points, kept))
            assert bool(all_) == bool(few)
            if all_ and test is math.isfinite:
                assert (min(all_), max(all_)) == (min(few), max(few))
    if series.width > 1:
        finite = [value for _, value in points if math.isfinite(value)]
        means = np.array(found["mean"])
        assert len(means) <= 8
        assert not len(means) or min(finite) - 1 <= means.min() <= means.max() <= max(finite) + 1


def test_few_steps_are_not_thinned():
    series = Series(buckets=50)
    for step in range(0, 500, 10):
        series.add(step, step / 3)
    assert series.points() == {"step": list(range(0, 500, 10)), "value": [step / 3 for step in range(0, 500, 10)]}


def test_a_long_run_is_a_small_page_with_its_spikes(tmp_path):
    count, draw = 50_000, random.Random(0)
    losses = [2 + draw.random() for _ in range(count)]
    losses[31_415], losses[27_182], losses[40_000] = 99.0, 0.001, math.nan
    run = write_run(tmp_path / "run", [(step, {"train/loss": loss}) for step, loss in enumerate(losses)])
    assert main([str(run)]) == 0
    points = series_of(run / "page.html", "train/loss")
    assert {(31_415, 99.0), (27_182, 0.001)} <= set(points)
    assert [step for step, value in points if math.isnan(value)] == [40_000]
    assert 2_000 < len(points) < 4_100
    assert (run / "page.html").stat().st_size < 300_000
    found = data_of((run / "page.html").read_text())["runs"][0]["series"]["train/loss"]
    assert np.mean(found["mean"]) == pytest.approx(np.nanmean(losses), rel=1e-3)


# ------------------------------------------------------------------------------------------------------------- commands


def told(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("nowhere", "nowhere does not exist"),
        ("empty", "empty is no run: it holds no metrics.jsonl and no config.yaml"),
        ("file", "file is no directory"),
        ("sweep", "sweep is no run but holds 1: give them (sweep/0)"),
        ("sweep/0 sweep/../sweep/0", "sweep/../sweep/0 is given twice"),
        ("sweep/0 nowhere", "nowhere does not exist"),
        ("", "required: RUN"),
        ("live nowhere", "nowhere does not exist"),
        ("live sweep/0 --port 70000", "70000 is no port; choose 0 to 65535"),
        ("sweep/0 --out missing/page.html", "there is no directory missing to write page.html in"),
        ("sweep/0 --out sweep", "sweep is a directory"),
    ],
)
def test_what_cannot_be_drawn_is_told_in_one_line(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    write_run(Path("sweep/0"), rows(1))
    Path("empty").mkdir()
    Path("file").touch()
    try:
        code = main(arguments.split())
    except SystemExit as end:
        code = end.code
    lines = told(capsys)
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert not list(tmp_path.rglob("page.html"))


def test_a_run_without_metrics_yet(tmp_path, capsys):
    run, other = write_run(tmp_path / "run", []), write_run(tmp_path / "other", rows(2))
    assert main([str(run)]) == 2
    assert told(capsys) == [f"error: nothing to draw: {run} has no metrics.jsonl yet"]
    (run / "metrics.jsonl").touch()
    assert main([str(run)]) == 2
    assert told(capsys) == [f"error: nothing to draw: {run / 'metrics.jsonl'} holds no metrics yet"]
    assert not (run / "page.html").exists()
    assert main([str(run), str(other), "--out", str(tmp_path / "both.html")]) == 0
    assert told(capsys) == [f"note: {run / 'metrics.jsonl'} holds no metrics yet"]
    assert [one["name"] for one in data_of((tmp_path / "both.html").read_text())["runs"]] == ["other"]


def test_damaged_lines_are_named_and_left_out(tmp_path, capsys):
    run = write_run(tmp_path / "run", [(step, {"train/loss": float(step)}) for step in range(1, 5)])
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 5, "train/lo\n\n[1]\n{"step": true}\n{"step": 9007199254740993, "train/loss": 1}\n')
        file.write(b'{"step": 6, "train/loss": 1' + b"0" * 400 + b'}\n{"step": 7, "train/loss": 7.0')
    assert main([str(run)]) == 0
    file = run / "metrics.jsonl"
    notes = [
        f"{file}: 4 lines are damaged and left out (line 5)",
        f"{file}: the last line (line 11) is cut short and left out",
    ]
    assert told(capsys) == [f"note: {note}" for note in notes]
    assert series_of(run / "page.html", "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (6, math.inf)]
    assert data_of((run / "page.html").read_text())["runs"][0]["notes"] == notes


def test_a_page_replaces_pages_only(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write_run(tmp_path / name, rows(3))
    assert main(["a", "b"]) == main(["a", "b"]) == 0
    assert [one["name"] for one in data_of((tmp_path / "page.html").read_text())["runs"]] == ["a", "b"]
    config = (tmp_path / "a/config.yaml").read_text()
    capsys.readouterr()
    assert main(["a", "--out", "a/config.yaml"]) == 2
    assert told(capsys) == ["error: a/config.yaml exists and is no page of runs; choose another --out"]
    assert (tmp_path / "a/config.yaml").read_text() == config
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["config.yaml", "metrics.jsonl"]


def test_a_broken_config_leaves_the_curves(tmp_path):
    run = write_run(tmp_path / "run", rows(2))
    (run / "config.yaml").write_bytes(b"a: [\xff\n")
    found = contents(open_runs([run]))["runs"][0]
    assert (found["settings"], found["series"]["train/loss"]["step"]) == ({}, [1, 2])


# ----------------------------------------------------------------------------------------------------------------- live


class Reader:
    """What a live page keeps, as page.js does: news replace what was known from a step on."""

    def __init__(self):
        self.known, self.series = None, {}

    def take(self, news: dict) -> None:
        if self.known is None or news["generation"] != self.known[0]:
            self.series = news["series"]
        else:
            for key, fresh in news["series"].items():
                for steps, values in (("step", "value"), ("mean_step", "mean")):
                    old = self.series.get(key, {})
                    pairs = zip(old.get(steps, []), old.get(values, []), strict=True)
                    before = [pair for pair in pairs if pair[0] < news["from"]]
                    if steps in fresh:
                        fresh[steps] = [step for step, _ in before] + fresh[steps]
                        fresh[values] = [value for _, value in before] + fresh[values]
            self.series = {**self.series, **news["series"]}
        self.known = (news["generation"], news["last"])


@pytest.mark.parametrize("seed", range(6))
def test_pieces_of_a_live_run_make_the_whole(tmp_path, seed, monkeypatch):
    """Lines come in pieces of any size, are taken back by a resume, and are many enough to be thinned."""
    monkeypatch.setattr("tracking.series.BUCKETS", 16)
    monkeypatch.setattr("tracking.run.Series", lambda: Series(buckets=16))
    draw, path = random.Random(seed), write_run(tmp_path / "run", [])
    run, reader, file, step = Run(path), Reader(), MetricsFile(path / "metrics.jsonl"), 0
    for _ in range(40):
        if draw.random() < 0.1 and step:
            step = draw.randrange(step)
            file.resume(step)
        else:
            for row in rows(draw.randrange(6), draw.random(), step + 1):
                file.log(*row)
                step = row[0]
        if draw.random() < 0.2:  # seen while half of a line is written
            size = (path / "metrics.jsonl").stat().st_size if (path / "metrics.jsonl").exists() else 0
            file.log(step, {"eval/loss": 1.5})
            whole = (path / "metrics.jsonl").read_bytes()
            os.truncate(path / "metrics.jsonl", size + (len(whole) - size) // 2)
            run.refresh()
            with open(path / "metrics.jsonl", "ab") as opened:
                opened.write(whole[size + (len(whole) - size) // 2 :])
        run.refresh()
        reader.take(contents([run], reader.known and [reader.known])["runs"][0])
        fresh = contents(open_runs([path]))["runs"][0]
        assert reader.series == fresh["series"]
        assert (run.last, run.notes()) == (fresh["last"], fresh["notes"])
    file.close()


@pytest.fixture
def served(tmp_path):
    run = write_run(tmp_path / "run", rows(10))
    with Server(open_runs([run]), port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server, run
        server.shutdown()
        thread.join()


def ask(server: Server, path: str, host: str | None = "") -> tuple[int, str]:
    """Status and body; `host`: its header, by default the right one, None for none."""
    port = server.server_address[1]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest("GET", path, skip_host=True)
    if host is not None:
        connection.putheader("Host", host or f"127.0.0.1:{port}")
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def test_live_serves_what_came_since(served):
    server, run = served
    status, text = ask(server, "/")
    assert status == 200
    data = data_of(text)
    assert (data["live"], data["runs"][0]["last"]) == (server.token, 10)
    assert "connect-src 'self'" in text
    generation = data["runs"][0]["generation"]
    file = MetricsFile(run / "metrics.jsonl")
    for row in rows(3, first=11):
        file.log(*row)
    file.close()
    data = lambda known: json.loads(ask(server, f"/data?server={server.token}{known}")[1])["runs"][0]
    news = data(f"&known={generation}.10")
    assert news["generation"] == generation
    assert (news["from"], news["series"]["train/loss"]["step"]) == (10, [10, 11, 12, 13])
    for known in ("", "&known=", "&known=x.1", "&known=1.2,1.3", "&known=1.-5", f"&known={generation + 1}.10"):
        assert data(known)["series"]["train/loss"]["step"] == [*range(1, 14)]
    assert data(f"&known={generation}.999")["series"]["train/loss"]["step"] == [13]
    for stranger in ("", "?server=", f"?server={server.token[1:]}", f"?known={generation}.10"):
        assert ask(server, f"/data{stranger}")[0] == 409


def test_live_answers_under_its_own_name_only(served):
    server, run = served
    port = server.server_address[1]
    assert server.server_address[0] == "127.0.0.1"
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost:8000", "[::1]:1", "localhost"):
        assert ask(server, "/", host)[0] == 200
    for host in (
        None,
        f"rebound.example:{port}",
        "localhost.rebound.example",
        "127.0.0.1.example",
        "127x0.0.1",
        "localhost:",
    ):
        for path in ("/", "/data"):
            status, text = ask(server, path, host)
            assert status == 403
            assert "train/loss" not in text
    for path in ("/metrics.jsonl", "/../run/config.yaml", "/data/x", f"/{run}/config.yaml"):
        assert ask(server, path)[0] == 404


def test_live_survives_what_is_no_request(served):
    server, _ = served
    for noise in (
        b"",
        b"\x16\x03\x01\x00",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST / HTTP/1.1\r\n\r\n",
    ):
        with socket.create_connection(server.server_address, timeout=20) as connection:
            connection.sendall(noise)
            connection.shutdown(socket.SHUT_WR)
            assert b" 200 " not in connection.recv(4096)
    assert ask(server, "/")[0] == 200


def hear_ctrl_c():
    """A background job of a shell, as these tests may be, ignores SIGINT, and so do its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_live_ends_with_ctrl_c_and_tells_a_taken_port(tmp_path):
    run = write_run(tmp_path / "run", rows(3))
    command = [sys.executable, "-m", "tracking", "live", str(run), "--port"]
    with subprocess.Popen(
        [*command, "0"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c
    ) as process:
        line = process.stdout.readline()
        assert line.startswith("serving http://127.0.0.1:")
        port = line.split(":")[2].split("/")[0]
        second = subprocess.run([*command, port], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert second.returncode == 2
        assert second.stderr == f"error: port {port} is in use; choose another with --port, or --port 0 for any\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
        assert process.stderr.read() == ""
