"""`python -m serving MODEL`: a model behind an address."""

import argparse
import logging
import sys

from checkpoint.config import NEWEST, step
from inference.options import SETTING, model
from runtime.arguments import Parser
from runtime.exit_codes import DONE

GRACE_SECONDS = 30.0


def add_serve(parser: Parser) -> None:
    """The options of the server."""
    parser.usage = "python -m serving MODEL [--port N] [options] [key=value ...]"
    parser.epilog = "key=value sets mesh.* or runtime.* anew, as for train.py: mesh.tensor=2 runtime.platform=cpu"
    add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    parser.add_argument("--port", type=port, default=8000, help="0: any that is free, which is printed (%(default)s)")
    parser.add_argument(
        "--grace", type=seconds, default=GRACE_SECONDS, metavar="SECONDS",
        help="that what runs has to finish after SIGTERM (%(default)g)",
    )  # fmt: skip
    from serving.access.guard import add_guard

    add_guard(parser)
    parser.set_defaults(command=serve)


def add_model(parser: Parser) -> None:
    """What is served, and how its engine is cut."""
    parser.add_argument("model", metavar="MODEL", type=model, help="run directory, Hugging Face folder or .gguf file")
    parser.add_argument("settings", metavar="key=value", nargs="*", help="mesh and runtime")
    parser.add_argument("--step", type=step, default=NEWEST, metavar="best|last|N", help="checkpoint of a run (last)")
    parser.add_argument("--name", help="what clients call the model (the name of its folder or file)")
    parser.add_argument("--max-running", type=count, metavar="N", help="choices that are generated at once")
    parser.add_argument("--cache-tokens", type=count, metavar="N", help="tokens that the cache holds, of all together")
    parser.add_argument("--chunk", type=count, metavar="N", help="tokens of prompts that one step reads")
    parser.add_argument("--max-waiting", type=count, metavar="N", help="requests that wait before others are refused")
    parser.add_argument("--max-length", type=count, metavar="N", help="tokens of the longest sequence")
    parser.add_argument("--cache-dtype", choices=("int8",), help="the cache in 8 bits instead of the model's own type")
    parser.add_argument("--draft", metavar="MODEL", type=model, help="a small model that proposes tokens")
    parser.add_argument("--speculation", choices=("none", "ngram", "draft"), help="who proposes tokens")


ENGINE = ("max_running", "cache_tokens", "chunk", "max_waiting", "max_length", "cache_dtype", "speculation")


def count(text: str) -> int:
    """A whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return number


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
    from serving.lifecycle import Server, bound, configured
    from serving.page import router as page

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    secure = guard.tls(options)
    listener = bound(options.host, options.port)  # a port that is taken is told before a model is read
    opened, door = guard.open_guard(options)
    service = open_service(options)
    config = configured(create_app(service, door, [keys.router, page.router]), **secure)
    address = f"http{'s' if secure else ''}://{shown(options.host)}:{listener.getsockname()[1]}"
    told = lambda: print(guard.first_key(options, opened, door, address, example(service)), flush=True)
    door.start()
    try:
        Server(config, service.lifecycle, options.grace, told).run([listener])
    finally:
        door.close()
    return DONE


def example(service) -> tuple[str, dict]:
    """A request that the model answers: its path and body."""
    if service.engine.encoder:
        return "/v1/embeddings", {"model": service.name, "input": "Hello"}
    if service.chat is None:
        return "/v1/completions", {"model": service.name, "prompt": "Hello", "max_tokens": 16}
    messages = [{"role": "user", "content": "Hello"}]
    return "/v1/chat/completions", {"model": service.name, "messages": messages, "max_tokens": 16}


def open_service(options: argparse.Namespace):
    """The service of the model that the options name, its engine warm and running."""
    from inference.engine import Engine
    from inference.engine_options import EngineOptions
    from inference.opening import chat_of, find_model
    from serving.service import Service

    if strange := next((word for word in options.settings if not SETTING.match(word)), None):
        raise ValueError(f"{strange} is no setting: they are mesh.* and runtime.*, as in mesh.tensor=2")
    found = find_model(options.model, options.settings)
    given = {name: value for name in ENGINE if (value := getattr(options, name)) is not None}
    if options.draft and "speculation" not in given:
        given["speculation"] = "draft"
    cut = EngineOptions(**given)
    opened = found.open(options.step)
    draft = find_model(options.draft, options.settings).open() if options.draft else None
    try:
        chat = chat_of(found.path)
    except ValueError:  # it has none: it answers /v1/completions
        chat = None
    engine = Engine(opened, cut, draft)
    engine.start()
    return Service(engine, options.name or found.path.stem, opened.digest, chat, found.begin)


def shown(host: str) -> str:
    """An address as it stands in a URL."""
    return f"[{host}]" if ":" in host else host
