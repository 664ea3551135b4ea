"""The tests' double of an engine behind the real gate, until SIGTERM: prints its address, a key with all limits and an
empty line.
"""

import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/serving")]

from guarded import guarded  # noqa: E402

LIMITS = {"requests_a_minute": 10**9, "tokens_a_minute": 10**12, "tokens_a_day": 10**12, "concurrent": 1000}


def main() -> None:
    """Serves."""
    with tempfile.TemporaryDirectory() as folder, guarded(Path(folder) / "state") as server:
        print(server.address, server.key(limits=LIMITS), "", sep="\n", flush=True)
        signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    main()
