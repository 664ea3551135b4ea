"""Two real replicas behind haproxy, ten clients, every fault once; tests/long/chaos.py can go on for hours."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FAULTS = {
    *("none", "kill -9", "SIGSTOP", "drain, SIGTERM", "roll to other weights", "audit disk full", "database gone 10 s"),
}


def test_nothing_is_lost_wrong_or_untold(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tests.long.chaos", "--json", figures, "--folder", tmp_path / "runs"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(figures.read_text())
    assert {row["fault"] for row in found["rows"]} == FAULTS
    assert all(row["out_s"] < 2 for row in found["rows"] if row["out_s"])
    assert found["all"]["whole"] > 100
    assert found["all"]["limited"], "a limit was reached"
    assert found["overrun"] == found["audit"] == 0
