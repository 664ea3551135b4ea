"""Chat templates: messages become the text and the ids that an instruction-tuned model was trained on.

A template is a Jinja program that comes with the tokenizer (chat_template.jinja, tokenizer_config.json, or the metadata
of a GGUF file). It is foreign code and runs in a sandbox. What it writes itself may be a special token; what a message
says stays text, even where it spells one: no message can end its turn or begin another's.
"""

import datetime
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.tokenizer import JsonTokenizer, TokenizerConfig, load_tokenizer
from data.tokenizers.files import files_of, read_settings, read_text
from data.tokenizers.gguf import read_metadata
from runtime.files import replace_text

TEMPLATE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"
PRIVATE = range(0xF0000, 0xFFFFE)  # code points that no standard gives a meaning
# Under which a template knows the special tokens, and a GGUF file their ids.
NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding", "sep_token": "seperator"}


class ChatTemplate:
    """The chat template of a tokenizer.

    source: the Jinja program. names: what it calls special tokens (`bos_token`, ...) -> how these are spelled.
    """

    def __init__(self, source: str, tokenizer: JsonTokenizer, names: Mapping[str, str]):
        self._source, self._tokenizer, self._names = source, tokenizer, dict(names)
        self._template = _compile(source)
        longest = sorted(filter(None, tokenizer.specials), key=len, reverse=True)
        self._special = "|".join(map(re.escape, longest))
        end = self._names.get("eos_token")
        ends = {tokenizer.eos_id, tokenizer.specials.get(end, tokenizer.eos_id)}
        self.stop_ids = tuple(sorted(ends))
        """Tokens after which an answer is over."""

    def text(self, messages: list[dict], *, generation_prompt: bool = False, **variables: Any) -> str:
        """The text of messages, special tokens as published files spell them.

        messages: each with `role` and `content`, as templates want them. generation_prompt: ends with the beginning of
        the answer. variables: more that a template may read (`tools`, `documents`, `enable_thinking`). Raises
        ValueError where the template refuses the messages or fails.
        """
        rendered, mark = self._render(messages, generation_prompt, variables)
        return rendered.replace(mark, "")

    def encode(self, messages: list[dict], *, generation_prompt: bool = False, **variables: Any) -> np.ndarray:
        """The ids of `text`, int32 of (tokens,); special ones where the template wrote them, never from a message."""
        rendered, mark = self._render(messages, generation_prompt, variables)
        parts, at = [], 0
        for found in re.finditer(f"(?<!{mark})(?:{self._special})", rendered):
            parts += [rendered[at : found.start()].replace(mark, ""), self._tokenizer.specials[found[0]]]
            at = found.end()
        return self._tokenizer.encode_parts([*parts, rendered[at:].replace(mark, "")])

    def save(self, folder: Path) -> None:
        """Writes the template and what it calls special tokens beside a tokenizer.json, as `transformers` reads them."""
        replace_text(folder / TEMPLATE, self._source)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self._names}
        replace_text(folder / SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

    def _render(self, messages: list[dict], generation_prompt: bool, variables: dict) -> tuple[str, str]:
        """The text, and the mark that stands in it before all that a message says and a special token could begin with."""
        import jinja2

        if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
            raise ValueError("a chat is a list of messages, at least one, each an object with role and content")
        given = {"messages": [{k: v for k, v in message.items() if v is not None} for message in messages], **variables}
        mark = _unused(json.dumps(given, ensure_ascii=False, default=str) + self._source)
        marked = _marked(given, mark, re.compile(f"(?={self._special})"), _Edges(self._tokenizer.specials))
        for name in ("tools", "documents"):
            marked.setdefault(name, None)
        try:
            text = self._template.render(**(self._names | marked), add_generation_prompt=generation_prompt)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise ValueError(f"the chat template: {' '.join(str(error).split())}") from error
        return text.replace(json.dumps(mark)[1:-1], mark), mark  # a template may write JSON


# ---- where it comes from -----------------------------------------------------------------------------------------


def open_chat(path: Path | str, tokenizer: JsonTokenizer | None = None) -> ChatTemplate:
    """The chat template that stands beside a tokenizer: path as in tokenizer.path. Raises ValueError if there is none.

    tokenizer: that of the path, where it is open already.
    """
    path = Path(path).expanduser()
    tokenizer = tokenizer or load_tokenizer(TokenizerConfig("file", path=str(path)))
    source, names = find_template(path)
    if source is None:
        raise ValueError(f"{path} has no chat template: looked for {TEMPLATE} and chat_template in {SETTINGS}")
    return ChatTemplate(source, tokenizer, names)


def find_template(path: Path) -> tuple[str | None, dict[str, str]]:
    """The template that belongs to the tokenizer of a path, or None, and the special tokens that it may name."""
    file = files_of(path)[0]
    if file.suffix == ".gguf":
        return _of_gguf(read_metadata(file))
    settings = read_settings(file.parent)
    names = {name: settings[name] for name in NAMES if settings.get(name)}
    names = {name: token["content"] if isinstance(token, dict) else token for name, token in names.items()}
    if (file.parent / TEMPLATE).exists():
        return read_text(file.parent / TEMPLATE), names
    source = settings.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {template.get("name"): template.get("template") for template in source if isinstance(template, dict)}
        source = named.get("default")
    return source, names


def _of_gguf(metadata: dict) -> tuple[str | None, dict[str, str]]:
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in NAMES.items()}
    names = {name: tokens[i] for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    return metadata.get("tokenizer.chat_template"), names


# ---- what messages say stays text --------------------------------------------------------------------------------


class _Edges:
    """Whether the beginning or the end of a text could be part of a special token that goes on outside of it."""

    def __init__(self, specials: Mapping[str, int]):
        self._specials = [special for special in specials if len(special) > 1]

    def begins(self, text: str) -> bool:
        """Whether a special token could have begun before the text and reach into it."""
        tails = (special[at:] for special in self._specials for at in range(1, len(special)))
        return any(text.startswith(tail) or tail.startswith(text) for tail in tails)

    def end(self, text: str) -> int | None:
        """Where in the text a special token could begin that goes on behind it; None if nowhere."""
        heads = (special[:length] for special in self._specials for length in range(1, len(special)))
        lengths = [len(head) for head in heads if text.endswith(head)]
        return len(text) - max(lengths) if lengths else None


def _marked(value: Any, mark: str, special: re.Pattern, edges: _Edges, key: str | None = None) -> Any:
    """What is given to a template, with a mark wherever a text in it could begin or join a special token.

    A role is part of what the program says, and a template may make a special token of it (`<|` + role + `|>`): its
    edges are free, and only whole special tokens are marked in it.
    """
    if isinstance(value, Mapping):
        return {special.sub(mark, k) if isinstance(k, str) else k: _marked(v, mark, special, edges, k) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(item, mark, special, edges, key) for item in value]
    if not isinstance(value, str):
        return value
    text = value
    if key != "role":
        body = text.strip()  # templates take space away
        start = text.find(body)
        if body and (at := edges.end(body)) is not None:
            text = f"{text[: start + at]}{mark}{text[start + at :]}"
        if body and edges.begins(body):
            text = f"{text[:start]}{mark}{text[start:]}"
    return special.sub(mark, text)


def _unused(text: str) -> str:
    """A character that is not in a text."""
    used = set(text)
    return next(chr(code) for code in PRIVATE if chr(code) not in used)


# ---- the sandbox -------------------------------------------------------------------------------------------------


def _compile(source: str):
    """The template as a program. Raises ValueError where it is none."""
    try:
        import jinja2
        import jinja2.sandbox
        from jinja2.ext import Extension, loopcontrols
    except ImportError:
        raise ValueError("a chat template is run by the package jinja2: pip install jinja2") from None

    class Generation(Extension):
        """{% generation %}...{% endgeneration %}, which some templates put around what the assistant said."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template: {' '.join(str(error).split())}") from error


def _to_json(value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys: bool = False) -> str:
    """Jinja's own filter writes for HTML pages."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
