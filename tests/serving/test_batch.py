"""Batches over the double: order, bad lines, and going on after a kill in any moment."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from doubles import EngineDouble, served

from serving.batch import Output, Owner, run

ROOT = Path(__file__).parents[2]


def line(name, url="/v1/completions", **body):
    asked = {"prompt": f"prompt of {name}", "max_tokens": 4} | body
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": asked})


def batch(source, path, width=4):
    app = served(EngineDouble(), Owner())
    try:
        with Output(path) as output:
            return asyncio.run(run(app, source, output, width))
    finally:
        app.state.service.engine.stop()


def told(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_every_line_is_answered_and_bad_ones_do_not_end_it(tmp_path):
    lines = [
        line("good"),
        "no JSON",
        "[1]",
        "",
        json.dumps({"custom_id": "x"}),
        line("good"),
        line("bad url", url="/drain"),
        line("streamed", stream=True),
        line("wrong field", max_token=3),
        '{"custom_id": "deep", "body": ' + "[" * 100_000,
        json.dumps({"custom_id": "y" * 600, "method": "POST", "url": "/v1/completions", "body": {}}),
        line("last"),
    ]
    (tmp_path / "in").write_text("\n".join(lines))
    assert batch(tmp_path / "in", tmp_path / "out") == 11
    found = {one["line"]: one for one in told(tmp_path / "out")}
    assert found.keys() == {*range(1, 13)} - {4}
    assert found[1]["response"]["body"]["choices"][0]["text"] == "abcd"
    assert (found[9]["response"]["status_code"], found[9]["error"]) == (400, None)
    assert {n for n, one in found.items() if one["error"]} == {2, 3, 5, 6, 7, 8, 10, 11}
    assert "another line" in found[6]["error"]["message"]
    assert batch(tmp_path / "in", tmp_path / "out") == 0


def test_a_line_waits_for_room_however_often_it_is_refused(tmp_path):
    (tmp_path / "in").write_text("\n".join(line(str(number)) for number in range(3)))
    refused = []

    async def app(scope, receive, send):
        full = len(refused) < 20
        refused.extend([True] * full)
        headers = [(b"retry-after", b"0")]
        await send({"type": "http.response.start", "status": 503 if full else 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})

    with Output(tmp_path / "out") as output:
        assert asyncio.run(run(app, tmp_path / "in", output, 2)) == 3
        assert asyncio.run(run(app, tmp_path / "in", output, 2, goes_on=lambda: False)) == 0
    assert [one["response"]["status_code"] for one in told(tmp_path / "out")] == [200] * 3


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_a_torn_last_line_is_done_again(tmp_path, cut):
    (tmp_path / "in").write_text("\n".join(line(str(number)) for number in range(6)))
    batch(tmp_path / "in", tmp_path / "out", width=1)
    whole = (tmp_path / "out").read_bytes()
    (tmp_path / "out").write_bytes(whole[: len(whole) - cut])
    assert batch(tmp_path / "in", tmp_path / "out") == (1 if cut else 0)
    assert sorted(one["custom_id"] for one in told(tmp_path / "out")) == [str(number) for number in range(6)]


def test_the_output_of_another_input_is_refused(tmp_path):
    (tmp_path / "in").write_text(line("a"))
    batch(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in").write_text(line("b"))
    with pytest.raises(ValueError, match="another custom_id"):
        batch(tmp_path / "in", tmp_path / "out")
    (tmp_path / "other").write_text("what?\n")
    with pytest.raises(ValueError, match="line 1 is not of a batch"):
        batch(tmp_path / "in", tmp_path / "other")


@pytest.mark.parametrize("text", ['{"precious": 1}', line("a"), '{"line": 1, "custom_id": "a"}'])
def test_a_file_of_one_line_that_is_no_output_stays_as_it_is(tmp_path, text):
    (tmp_path / "in").write_text(line("a"))
    (tmp_path / "out").write_text(text)
    with pytest.raises(ValueError, match="line 1 is not of a batch"):
        batch(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out").read_text() == text


def test_two_batches_do_not_write_one_output(tmp_path):
    with Output(tmp_path / "out"), pytest.raises(ValueError, match="another batch"), Output(tmp_path / "out"):
        pass


PROGRAM = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, "tests/serving")
from doubles import EngineDouble, served
from serving.batch import Output, Owner, run
app = served(EngineDouble(seconds=0.01), Owner())
with Output(Path(sys.argv[2])) as output:
    print(asyncio.run(run(app, Path(sys.argv[1]), output, 4)))
"""


def test_killed_again_and_again_it_loses_and_doubles_nothing(tmp_path):
    (tmp_path / "in").write_text("\n".join(line(str(number)) for number in range(120)))
    command = [sys.executable, "-c", PROGRAM, tmp_path / "in", tmp_path / "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    out, kills = tmp_path / "out", 0
    while kills < 2:
        before = out.stat().st_size if out.exists() else 0
        running = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)
        while running.poll() is None and (out.stat().st_size if out.exists() else 0) < before + 3000:
            time.sleep(0.001)
        assert running.poll() is None, "it was to be killed before its end"
        running.send_signal(signal.SIGKILL)
        running.communicate()
        kills += 1
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert sorted(one["line"] for one in told(out)) == list(range(1, 121))
