"""The model that a command serves, as its options name it. JAX is not imported before it is opened."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.config import NEWEST, step
from inference.adapter_books import NAME
from inference.options import SETTING, model
from runtime.arguments import Parser

if TYPE_CHECKING:
    from serving.service import Service


POOLINGS = ("mean", "last", "first", "max", "none")


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
    parser.add_argument("--pooling", choices=POOLINGS, help="of a text's vectors (mean, or as the model's folder says)")
    parser.add_argument("--draft", metavar="MODEL", type=model, help="a small model that proposes tokens")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=FOLDER", type=adapter,
        help="a run with adapter=lora on this model, or a folder of peft, that requests call NAME; again for more",
    )  # fmt: skip
    parser.add_argument("--max-adapters", type=count, metavar="N", help="places for adapters, also while it serves")
    parser.add_argument("--max-adapter-rank", type=count, metavar="N", help="rank of the largest that fits a place")
    parser.add_argument("--speculation", choices=("none", "ngram", "draft"), help="who proposes tokens")


# options that are settings of the engine
ENGINE = ("max_running", "cache_tokens", "chunk", "max_waiting", "max_length", "cache_dtype", "speculation")
ENGINE += ("pooling", "max_adapters", "max_adapter_rank")


def count(text: str) -> int:
    """A whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return number


def adapter(text: str) -> str:
    """NAME=FOLDER, as it is."""
    name, _, folder = text.partition("=")
    if not NAME.fullmatch(name) or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER; names are of letters, digits and . _ : @ / -")
    if not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{folder} is no folder: a run's directory, or one with adapter_config.json")
    return text


def name_of(model: Path) -> str:
    """What clients call a model that was given no name. Raises ValueError where its path ends in none."""
    name = os.path.basename(os.path.abspath(model)).removesuffix(".gguf")
    if not name:
        raise ValueError(f"{model} has no name that clients could use: give one with --name")
    return name


def open_service(options: argparse.Namespace) -> "Service":
    """The service of the model that the options name, its engine warm and running."""
    from inference.adapters import AdapterReader
    from inference.engine import Engine
    from inference.engine_options import EngineOptions
    from inference.opening import chat_of, classes_of, find_model
    from serving.service import Labels, Service

    if strange := next((word for word in options.settings if not SETTING.match(word)), None):
        raise ValueError(f"{strange} is no setting: they are mesh.* and runtime.*, as in mesh.tensor=2")
    found = find_model(options.model, options.settings)
    given = {name: value for name in ENGINE if (value := getattr(options, name)) is not None}
    if options.draft and "speculation" not in given:
        given["speculation"] = "draft"
    cut, name = EngineOptions(**given), options.name or name_of(options.model)
    beside = [(name, Path(folder)) for name, _, folder in (text.partition("=") for text in options.adapter)]
    reader = AdapterReader(found) if beside or cut.max_adapters else None
    called = [name, *(one for one, _ in beside)]
    if double := next((one for one in called if called.count(one) > 1), None):
        raise ValueError(f"two models would be called {double!r}: give --adapter another NAME, or the model a --name")
    for one, folder in beside:  # told before a model is read
        reader.check(one, folder)
    opened = found.open(options.step)
    opened = reader.put_base(opened) if reader else opened
    adapters = tuple(reader.read(one, folder) for one, folder in beside)
    draft = find_model(options.draft, options.settings).open() if options.draft else None
    try:
        chat = chat_of(found.path)
    except ValueError:  # it has none: it answers /v1/completions
        chat = None
    engine = Engine(opened, cut, draft, adapters)
    engine.start()
    end = found.tokenizer.end_ids if engine.encoder else ()  # an encoder reads whole texts
    classes = classes_of(found)
    labels = None if classes is None else Labels(*classes)
    service = Service(engine, name, opened.digest, chat, found.begin, end, found.frame, labels)
    if cut.max_adapters:
        service.load = lambda name, folder: engine.load_adapter(reader.read(name, folder))
    return service
