"""The help of settings: each key with its default and its comment, read from the source of its dataclass."""

import ast
import inspect
import io
import json
import textwrap
import tokenize
from collections.abc import Sequence
from dataclasses import fields, is_dataclass

from config.build import plain
from config.compose import CONF, load


def help_text(program: str = "train.py", overrides: Sequence[str] = ()) -> str:
    """Every key with its default and its comment, of the run that some overrides ask for."""
    groups = sorted(path.name for path in CONF.iterdir() if path.is_dir())
    presets = [f"  {g}={'|'.join(sorted(p.stem for p in (CONF / g).glob('*.yaml')))}" for g in groups]
    lines = [
        f"python {program} [key=value ...]",
        "",
        "presets:",
        *presets,
        "  model.from=PATH  # model, tokenizer and first weights: of a run, a Hugging Face folder, a .gguf file",
        "",
        f"keys, with the values of {'this' if overrides else 'the default'} run:",
    ]
    lines += documented(load(list(overrides)))
    if not overrides:
        lines += ["", "keys with a task, as they are with task=classification:"]
        lines += documented(load(["task=classification"]).task, "task.")
    return "\n".join(lines)


def documented(values, prefix: str = "") -> list[str]:
    """A line for each key of a dataclass and of those nested in it: its value here, and its comment."""
    texts, lines = comments(type(values)), []
    for f in fields(values):
        value = getattr(values, f.name)
        if is_dataclass(value):
            lines += documented(value, f"{prefix}{f.name}.")
            continue
        shown = json.dumps(plain(value)).strip('"')
        lines.append(f"  {prefix}{f.name}={shown}" + (f"  # {texts[f.name]}" if f.name in texts else ""))
    return lines


def comments(cls: type) -> dict[str, str]:
    """The comment of each field of a dataclass, or of one that it extends: beside it, on the lines right before it, or
    both, joined.
    """
    return {name: text for base in reversed(cls.__mro__) if is_dataclass(base) for name, text in _own(base).items()}


def _own(cls: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(cls))
    found, lines = {}, source.splitlines()
    at = {
        token.start[0]: token.string.lstrip("# ").rstrip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        first = node.lineno
        while lines[first - 2].lstrip().startswith("#"):
            first -= 1
        if text := " ".join(at[number] for number in range(first, node.end_lineno + 1) if number in at):
            found[node.target.id] = text
    return found
