"""A server over the double in a process of its own: python tests/serving/double_server.py PORT [STEP_SECONDS] [GRACE].

For tests that need sockets and signals. Prints its address, then answers like `python -m serving`.
"""

import logging
import sys

from doubles import EngineDouble, OpenGate

from serving.app import create_app
from serving.lifecycle import Server, bound, configured
from serving.service import Service


def main(port: str, seconds: str = "0", grace: str = "5") -> None:
    """Serves until SIGTERM."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    engine = EngineDouble(seconds=float(seconds), reach=4096)
    engine.start()
    service = Service(engine, "double", "d0" * 32)
    listener = bound("127.0.0.1", int(port))
    told = lambda: print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    Server(configured(create_app(service, OpenGate())), service.lifecycle, float(grace), told).run([listener])


if __name__ == "__main__":
    main(*sys.argv[1:])
