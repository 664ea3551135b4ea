"""`python -m serving MODEL`: a model behind an address."""

import argparse
import logging
import sys
from pathlib import Path

from runtime.arguments import Parser
from runtime.exit_codes import DONE
from serving.opening import add_model, open_service

GRACE_SECONDS = 30.0


def add_serve(parser: Parser) -> None:
    """The options of the server."""
    parser.usage = "python -m serving MODEL [--port N] [options] [key=value ...]"
    parser.epilog = "key=value sets mesh.* or runtime.* anew, as for train.py: mesh.tensor=2 runtime.platform=cpu"
    add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    parser.add_argument("--port", type=port, default=8000, help="0: any that is free, which is printed (%(default)s)")
    parser.add_argument("--socket", type=Path, metavar="FILE", help="listen there instead, behind a balancer")
    parser.add_argument(
        "--grace", type=seconds, default=GRACE_SECONDS, metavar="SECONDS",
        help="that what runs has to finish after SIGTERM (%(default)g)",
    )  # fmt: skip
    parser.add_argument("--metrics-port", type=port, metavar="N", help="GET /metrics there without a key (none)")
    parser.add_argument("--metrics-host", default="127.0.0.1", metavar="HOST", help="of that port (%(default)s)")
    parser.add_argument("--traces", metavar="URL", help="of a collector: http://127.0.0.1:4318 (none)")
    from serving.access.guard import add_guard

    add_guard(parser)
    parser.set_defaults(command=serve)


def port(text: str) -> int:
    """A port number."""
    number = int(text)
    if not 0 <= number < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text} is no port: they are 0 to 65535")
    return number


def seconds(text: str) -> float:
    """A length of time."""
    number = float(text)
    if not 0 <= number < 1e6:
        raise argparse.ArgumentTypeError(f"{text} must be 0 or more")
    return number


def serve(options: argparse.Namespace) -> int:
    """Opens the model, warms the engine and serves until SIGTERM. Raises ValueError or OSError as `find_model`."""
    from serving.access import guard
    from serving.access import routes as keys
    from serving.app import create_app
    from serving.batches.opening import FOLDER, add_batches
    from serving.lifecycle import Server, bound, bound_to, configured
    from serving.page import router as page
    from serving.seen import Seen

    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("isomesh").setLevel(logging.INFO)
    behind = options.socket is not None
    secure = {} if behind else guard.tls(options)
    # a port that is taken is told before a model is read
    listener = bound_to(options.socket) if behind else bound(options.host, options.port)
    seen = Seen(options.metrics_host, options.metrics_port, options.traces)
    opened, door = guard.open_guard(options)
    service = open_service(options)
    if behind:  # one replica alone would have it
        service.load = None
    batches = add_batches(opened.folder / FOLDER, service, door)
    routers = [keys.router, page.router, seen.over(service)]
    config = configured(create_app(service, door, routers), behind=behind, **secure)

    def told() -> None:
        batches.runner.wake()  # with what was left
        if not behind:  # else the balancer's address counts
            address = f"http{'s' if secure else ''}://{shown(options.host)}:{listener.getsockname()[1]}"
            print(guard.first_key(options, opened, door.chain, address, example(service)), flush=True)

    door.start()
    try:
        Server(config, service.lifecycle, options.grace, told).run([listener])
    finally:
        seen.close()
        door.close()
    return DONE


def example(service) -> tuple[str, dict]:
    """A request that the model answers: its path and body."""
    if service.labels is not None:
        return "/v1/classify", {"model": service.name, "input": "Hello"}
    if service.engine.encoder:
        return "/v1/embeddings", {"model": service.name, "input": "Hello"}
    if service.chat is None:
        return "/v1/completions", {"model": service.name, "prompt": "Hello", "max_tokens": 16}
    messages = [{"role": "user", "content": "Hello"}]
    return "/v1/chat/completions", {"model": service.name, "messages": messages, "max_tokens": 16}


def shown(host: str) -> str:
    """An address as it stands in a URL."""
    return f"[{host}]" if ":" in host else host
