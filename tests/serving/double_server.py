"""A server over the double in a process of its own: python tests/serving/double_server.py PORT [STEP_SECONDS] [GRACE].

For tests that need sockets and signals. Prints its address, then answers like `python -m serving`.
"""

import logging
import sys

from doubles import EngineDouble, served

from serving.lifecycle import Server, bound, configured


def main(port: str, seconds: str = "0", grace: str = "5") -> None:
    """Serves until SIGTERM."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    app = served(EngineDouble(seconds=float(seconds), reach=4096))
    listener = bound("127.0.0.1", int(port))
    told = lambda: print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    Server(configured(app), app.state.service.lifecycle, float(grace), told).run([listener])


if __name__ == "__main__":
    main(*sys.argv[1:])
