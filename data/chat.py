"""Chat templates: messages become the text and the ids that an instruction-tuned model was trained on.

A template is a Jinja program that comes with the tokenizer (chat_template.jinja, tokenizer_config.json, or the metadata
of a GGUF file). It is foreign code and runs in a sandbox. What it writes itself may be a special token; what a message
says stays text, even where it spells one: no message can end its turn or begin another's.
"""

import datetime
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.tokenizer import JsonTokenizer, TokenizerConfig, load_tokenizer
from data.tokenizers.files import SETTINGS, files_of, read_settings, read_text
from runtime.files import replace_text
from runtime.gguf import read_header

TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
PRIVATE = range(0xF0000, 0xFFFFE)  # code points that no standard gives a meaning
# What a template calls special tokens -> how a GGUF file calls their ids.
NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
STRUCTURE = ("role", "type")  # keys of messages whose values are words of the program
ENDS = ("eos", "eot", "eom")  # of a text, a turn, a message: an answer is over after any of them


class ChatTemplate:
    """The chat template of a tokenizer.

    source: the Jinja program. names: what it calls special tokens (`bos_token`, ...) -> how these are spelled.
    stops: further tokens that end an answer. Attributes: `source`, `tokenizer`; `stop_ids`, that end an answer.
    """

    def __init__(self, source: str, tokenizer: JsonTokenizer, names: Mapping[str, str], stops: Iterable[int] = ()):
        self.source, self.tokenizer, self._names = source, tokenizer, dict(names)
        self._template = _compile(source)
        longest = sorted(filter(None, tokenizer.specials), key=len, reverse=True)
        self._special = "|".join(map(re.escape, longest))
        end = tokenizer.specials.get(self._names.get("eos_token"), tokenizer.eos_id)
        self.stop_ids = tuple(sorted({tokenizer.eos_id, end, *stops}))

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
            parts += [rendered[at : found.start()].replace(mark, ""), self.tokenizer.specials[found[0]]]
            at = found.end()
        return self.tokenizer.encode_parts([*parts, rendered[at:].replace(mark, "")])

    def save(self, folder: Path) -> None:
        """Writes the template and its names of special tokens beside a tokenizer.json, as `transformers` reads them."""
        replace_text(folder / TEMPLATE, self.source)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self._names}
        for name, content in ((SETTINGS, settings), (GENERATION, {"eos_token_id": list(self.stop_ids)})):
            replace_text(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def _render(self, messages: list[dict], generation_prompt: bool, variables: dict) -> tuple[str, str]:
        """The text, with a mark before all in it that a special token could begin with but is a message's; the mark."""
        import jinja2

        if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
            raise ValueError("a chat is a list of messages, at least one, each an object with role and content")
        given = {"messages": [{k: v for k, v in message.items() if v is not None} for message in messages], **variables}
        mark = _unused(json.dumps(given, ensure_ascii=False, default=str) + self.source)
        marker = _Marker(mark, self.tokenizer.specials)
        # a word that the program gives (reasoning_effort="low") is like a role
        marked = {key: marker.given(value, "role" if isinstance(value, str) else key) for key, value in given.items()}
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
    file = files_of(path)[0]
    source, names, stops = _of_gguf(read_header(file).metadata) if file.suffix == ".gguf" else _of_folder(file.parent)
    if not isinstance(source, str):
        raise ValueError(f"{path} has no chat template: looked for {TEMPLATE} and chat_template in {SETTINGS}")
    return ChatTemplate(source, tokenizer, names, stops)


def _of_folder(folder: Path) -> tuple[str | None, dict[str, str], list[int]]:
    settings, generation = read_settings(folder / SETTINGS), read_settings(folder / GENERATION)
    names = {name: settings[name] for name in NAMES if settings.get(name)}
    names = {name: token["content"] if isinstance(token, dict) else token for name, token in names.items()}
    stops = generation.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if (folder / TEMPLATE).exists():
        return read_text(folder / TEMPLATE), names, stops
    source = settings.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {template.get("name"): template.get("template") for template in source if isinstance(template, dict)}
        source = named.get("default")
    return source, names, stops


def _of_gguf(metadata: dict) -> tuple[str | None, dict[str, str], list[int]]:
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in {*NAMES.values(), *ENDS}}
    ids = {name: i for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    names = {name: tokens[ids[key]] for name, key in NAMES.items() if key in ids}
    return metadata.get("tokenizer.chat_template"), names, [ids[end] for end in ENDS if end in ids]


# ---- what messages say stays text --------------------------------------------------------------------------------


class _Marker:
    """Puts a mark wherever a text could begin a special token, or join what stands around it to one."""

    def __init__(self, mark: str, specials: Mapping[str, int]):
        self._mark = mark
        self._whole = re.compile(f"(?={'|'.join(map(re.escape, specials))})")
        self._heads = {special[:end] for special in specials for end in range(1, len(special))}
        self._tails = {special[start:] for special in specials for start in range(1, len(special))}

    def given(self, value: Any, key: str) -> Any:
        """What a template is given under this key, marked.

        A role, like a type or the name of a field, is what the program says; a template compares it with words of its
        own, or makes a special token of it (`<|` + role + `|>`): only whole special tokens are marked in it.
        """
        if isinstance(value, Mapping):
            return {self.given(k, "type"): self.given(v, k) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.given(item, key) for item in value]
        if not isinstance(value, str):
            return value
        return self._whole.sub(self._mark, value if key in STRUCTURE else self._with_edges(value))

    def _with_edges(self, text: str) -> str:
        body = text.strip()  # templates take space away
        start = text.find(body)
        # where a special token could begin that goes on behind the text
        places = [start + len(body) - len(head) for head in self._heads if body.endswith(head)]
        # one that began before the text could reach into it, or through it
        if body and any(body.startswith(tail) or tail.startswith(body) for tail in self._tails):
            places.append(start)
        for place in sorted(places, reverse=True):
            text = f"{text[:place]}{self._mark}{text[place:]}"
        return text


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
        raise ValueError("a chat template needs the package jinja2: make setup EXTRAS=tokenizers") from None

    class Generation(Extension):
        """{% generation %}...{% endgeneration %}, which some templates put around what the assistant said."""

        tags = frozenset({"generation"})

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
