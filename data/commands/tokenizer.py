"""python -m data tokenizer train|show|convert: tokenizers apart from a run.

train OUT tokenizer=bpe|unigram tokenizer.vocab_size=N data=...   of the training documents of a corpus
show PATH [TEXT ...]       what it has, and how it cuts texts
convert PATH OUT           a folder with tokenizer.json, and with its chat template where it has one
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from config.compose import load
from data.chat import open_chat
from data.corpus import Document, split
from data.tokenizer import BYTE_OF, BYTE_TOKEN, JsonTokenizer, TokenizerConfig, load_tokenizer, train
from runtime import leave
from runtime.arguments import Parser

SAMPLE = "The cat's 12,345 mats: naïve café, 猫が好き 😀\n\treturn x"


def add_tokenizer(parser: Parser) -> None:
    """The three commands and their options."""
    parser.usage = "%(prog)s train|show|convert ..."
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("action", choices=ACTIONS, metavar="train|show|convert")
    parser.add_argument("words", nargs="*", metavar="...", help="see above")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
    """Raises ValueError or OSError for what the user can mend."""
    ACTIONS[options.action](options.words)


def train_command(words: list[str]) -> None:
    """Trains a tokenizer of a corpus and writes it.

    Raises ValueError for a mistake, or where the file is there already.
    """
    outs = [word for word in words if "=" not in word]
    if len(outs) != 1:
        raise ValueError(
            f"train takes one file to write, as in `train tokenizer.json tokenizer=bpe`: {len(outs)} given"
        )
    out = Path(outs[0]).expanduser()
    given = {word.partition("=")[0] for word in words if "=" in word}
    if wrong := sorted(key for key in given if key.partition(".")[0] not in ("data", "tokenizer")):
        raise ValueError(f"{wrong[0]} decides nothing here: a tokenizer is made by data.* and tokenizer.* alone")
    named = [] if given & {"data", "data.source"} or "data.path" not in given else ["data=text"]
    kind = [] if given & {"tokenizer", "tokenizer.kind"} else ["tokenizer=bpe"]
    config = load([*named, *kind, *(word for word in words if "=" in word)])
    if not config.tokenizer.is_trained:
        raise ValueError(f"tokenizer.kind={config.tokenizer.kind} is not trained; choose bpe or unigram")
    if out.exists():
        raise ValueError(f"{out} is there already: give another name")
    texts = (item.text for item, heldout in split(config.data) if isinstance(item, Document) and not heldout)
    tokenizer = train(config.tokenizer, texts)
    out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out)
    print(f"wrote {out}: {config.tokenizer.kind} of {tokenizer.vocab_size:,} tokens, digest {tokenizer.digest[:12]}")
    print(f"train with it: python train.py tokenizer=file tokenizer.path={out}")


def show_command(words: list[str]) -> None:
    """Prints what a tokenizer has, and how it cuts texts.

    Raises ValueError where none is named, or what is named is none.
    """
    path, texts = words[:1], words[1:] or [SAMPLE]
    if not path:
        raise ValueError("show takes a tokenizer: a tokenizer.json, a folder with one, a .gguf")
    tokenizer = _open(path[0])
    specials = sorted(tokenizer.specials, key=tokenizer.specials.get)
    facts = {
        "tokens": f"{tokenizer.vocab_size:,}",
        "digest": tokenizer.digest[:12],
        "end of document": f"{_name(tokenizer, tokenizer.eos_id)} ({tokenizer.eos_id})",
        "special": " ".join(specials[:20]) + (f" and {len(specials) - 20} more" if len(specials) > 20 else ""),
        "chat template": _template(path[0], tokenizer),
    }
    if missing := missing_bytes(tokenizer):
        facts["cannot spell"] = f"{len(missing)} bytes, which vanish from texts: {missing.hex(' ')}"
    for name, value in facts.items():
        print(f"{name}: {value}")
    for text in texts:
        ids = tokenizer.encode(text)
        back = (
            "the same text comes back" if tokenizer.decode(ids) == text else f"comes back as {tokenizer.decode(ids)!r}"
        )
        print(f"\n{text!r}\n{len(text.encode())} bytes, {len(ids)} tokens; {back}")
        print(" ".join(f"{spelled(tokenizer, i)}:{i}" for i in ids.tolist()))


def convert_command(words: list[str]) -> None:
    """Writes a tokenizer as a folder that this project and `transformers` read.

    The folder comes to be whole or not at all. Raises ValueError where it is there already.
    """
    if len(words) != 2:
        raise ValueError(f"convert takes a tokenizer and a new folder: {len(words)} words given")
    path, out = words[0], Path(words[1]).expanduser()
    if out.exists():
        raise ValueError(f"{out} is there already: give another name")
    tokenizer = _open(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    with leave.on_leaving(lambda: shutil.rmtree(temporary, ignore_errors=True)):
        try:
            tokenizer.save(temporary / "tokenizer.json")
            template = _chat(path, tokenizer)
            if template:
                template.save(temporary)
            temporary.chmod(0o755)
            temporary.rename(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    print(f"wrote {', '.join(sorted(file.name for file in out.iterdir()))} to {out}")


ACTIONS = {"train": train_command, "show": show_command, "convert": convert_command}


def missing_bytes(tokenizer: JsonTokenizer) -> bytes:
    """The bytes that a byte-level tokenizer, or one that falls back to bytes, has no token for, of those in UTF-8."""
    vocab = tokenizer.vocab()
    if sum(character in vocab for character in BYTE_OF) > 128 and tokenizer.is_byte_level:
        known = {byte for character, byte in BYTE_OF.items() if character in vocab}
    elif tokenizer.joins_bytes:
        known = {int(token[3:5], 16) for token in vocab if BYTE_TOKEN.fullmatch(token)}
    else:
        return b""
    in_texts = {*range(0xC0), *range(0xC2, 0xF5)}
    return bytes(sorted(in_texts - known))


def spelled(tokenizer: JsonTokenizer, token: int) -> str:
    """A token as Python would spell its text, or its bytes where these are no text alone."""
    text = tokenizer.decode([token]) or _name(tokenizer, token)
    return repr(text if "\ufffd" not in text else tokenizer.bytes_of(token) or text)


def _open(path: str) -> JsonTokenizer:
    return load_tokenizer(TokenizerConfig("file", path=path))


def _name(tokenizer: JsonTokenizer, token: int) -> str:
    return next((name for name, i in tokenizer.specials.items() if i == token), f"<{token}>")


def _chat(path: str, tokenizer: JsonTokenizer):
    """The chat template of a path, or None with the reason on stderr where it cannot be used."""
    try:
        return open_chat(path, tokenizer)
    except ValueError as error:
        if "has no chat template" not in str(error):
            print(f"warning: {error}", file=sys.stderr)
        return None


def _template(path: str, tokenizer: JsonTokenizer) -> str:
    template = _chat(path, tokenizer)
    return f"yes; an answer ends with {template.stop_ids}" if template else "none"
