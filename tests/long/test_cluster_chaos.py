"""Two real replicas behind haproxy, ten clients, faults that take seconds; tests/long/chaos.py makes all, for hours.

Left out is the roll to other weights, which takes minutes: test_cluster_haproxy.py rolls replicas without a model.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FAULTS = {
    "calm": "none", "kill": "kill -9", "freeze": "SIGSTOP", "drain": "drain, SIGTERM", "full_disk": "audit disk full",
    "no_database": "database gone 10 s",
}  # fmt: skip


def test_nothing_is_lost_wrong_or_untold(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tests.long.chaos", "--json", figures, "--folder", tmp_path / "runs"]
    command += ["--only", ",".join(FAULTS)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(figures.read_text())
    assert {row["fault"] for row in found["rows"]} == set(FAULTS.values())
    assert all(row["out_s"] < 2 for row in found["rows"] if row["out_s"])
    assert found["all"]["whole"] > 100
    assert found["all"]["limited"], "a limit was reached"
    assert found["overrun"] == found["audit"] == 0
