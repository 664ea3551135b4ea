"""Tokenizers: plain bytes, byte-level BPE or unigram trained on the corpus, or one from published files.

All have the same face: `vocab_size`, `eos_id`, `encode`, `encode_batch`, `decode`, `bytes_of`, `joins_bytes`,
`token_bytes`, `begin_ids`, `end_ids`, `digest`, `save`. What to print of new tokens, `inference.detokenizer` tells.
No special token ever comes out of a text, whatever the text spells: the end of a document can be trusted as its border,
and only a chat template (`data.chat`) writes the marks of its turns.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.tokenizers.files import read_spec
from data.words import WordEncoder
from runtime.files import replace_text

TRAINED = ("bpe", "unigram")
KINDS = ("bytes", *TRAINED, "file")
END_OF_TEXT = "<|endoftext|>"
SMALLEST_TRAINED = 257  # every byte and the end of a document
# Names under which published tokenizers keep the end of a document, the most telling first.
EOS_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<｜end▁of▁sentence｜>",
    "<|im_end|>",
    "<EOS>",
    "[EOS]",
    "[SEP]",
)
BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")  # by which SentencePiece spells what it has no word for


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: printable ones as they are (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


# What special tokens are called while a tokenizer is in use: drawn anew by each process, so that no text can spell it.
UNSPELLABLE = f"special{secrets.token_hex(16)}x"


@dataclass(frozen=True)
class TokenizerConfig:
    """How texts become ids: as bytes, by a vocabulary trained on the training documents, or by a published file.

    Raises ValueError for an unknown kind, a vocabulary below 257 ids, or a file that is not named.
    """

    kind: str = "bytes"  # bytes | bpe, unigram (byte-level, trained on the training documents) | file (see its path)
    vocab_size: int = 4096  # of kind=bpe and unigram: all tokens, with the bytes and the end of a document
    path: str | None = None  # of kind=file: a tokenizer.json, a folder with one or with GPT-2's two files, or a .gguf

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"tokenizer.kind={self.kind}: choose one of {', '.join(KINDS)}")
        if self.is_trained and self.vocab_size < SMALLEST_TRAINED:
            raise ValueError(
                f"tokenizer.vocab_size={self.vocab_size}: tokenizer.kind={self.kind} needs at least {SMALLEST_TRAINED} "
                f"= 256 bytes + 1 end of document"
            )
        if self.kind == "file" and not self.path:
            raise ValueError("tokenizer.kind=file needs tokenizer.path=.../tokenizer.json (or a folder, or a .gguf)")

    @property
    def is_trained(self) -> bool:
        """Whether there is no tokenizer before the corpus has been read."""
        return self.kind in TRAINED


class ByteTokenizer:
    """UTF-8 bytes as ids; NUL ends a document, so NULs of a text are dropped."""

    vocab_size = 256
    eos_id = 0
    digest = hashlib.sha256(b"bytes").hexdigest()
    joins_bytes = False
    begin_ids = end_ids = ()

    def __init__(self):
        self.token_bytes = np.ones(self.vocab_size, np.int32)
        self.token_bytes[self.eos_id] = 0

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 of (bytes,)."""
        ids = np.frombuffer(text.encode(), np.uint8)
        return ids[ids != self.eos_id].astype(np.int32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of every text."""
        return [self.encode(text) for text in texts]

    def encode_places(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`encode` of every text, and (tokens, 2): the characters at which each token begins and ends."""
        made = []
        for text in texts:
            raw = text.encode()
            begins = np.frombuffer(raw, np.uint8) & 0xC0 != 0x80  # others go on with a character
            at = np.cumsum(begins) - 1
            kept = np.frombuffer(raw, np.uint8) != self.eos_id
            made.append((self.encode(text), np.stack([at, at + 1], 1)[kept]))
        return made

    def by_words(self) -> None:
        """None: on one core there is nothing faster than `encode_batch`."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; broken UTF-8 shows as U+FFFD, the end of a document and foreign ids as nothing."""
        ids = _known(ids, self.vocab_size)
        return ids[ids != self.eos_id].astype(np.uint8).tobytes().decode("utf-8", "replace")

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token, none of the end of a document or a foreign id."""
        return bytes([token]) if 0 <= token < self.vocab_size and token != self.eos_id else b""

    def as_json(self) -> str:
        """The same as a tokenizer.json, for programs that read these: the ids of UTF-8 bytes, NUL a special token."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        end = next(character for character, byte in BYTE_OF.items() if byte == self.eos_id)
        vocab = {END_OF_TEXT if character == end else character: byte for character, byte in BYTE_OF.items()}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        return tokenizer.to_str()

    def save(self, path: Path) -> None:
        """Writes nothing: bytes need no file."""


class JsonTokenizer:
    """A tokenizer.json, run by the `tokenizers` library.

    `token_bytes` is exact for byte-level tokenizers without normalisation (GPT-2, Llama 3, those trained here). One
    that rewrites its text (a prefixed space, NFC, lower case) is counted by the text that its tokens spell.
    `begin_ids` and `end_ids` are the special tokens that its models want around a sequence; `encode` gives neither.
    Special tokens have names of their own while in use, which no text can spell: `encode` makes ordinary tokens of
    everything, and only `encode_parts` gives special ones, where it is told to.
    Raises ValueError for a text that is no tokenizer, or one without an end of document.
    """

    def __init__(self, spec: str, name: str, vocab_size: int | None = None):
        """spec: the JSON text. name: for messages. vocab_size: at least the ids in use; the rest stay unused."""
        from tokenizers import Tokenizer  # here, so that `bytes` starts without it

        parsed, used = _parse(spec, name)
        names = _unspellable(parsed)
        try:
            self._tokenizer = Tokenizer.from_str(json.dumps(_renamed(parsed, names)))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{name}: not a tokenizer.json: {error}") from error
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        if max(vocab.values()) >= used:  # the library numbers such tokens anew
            raise ValueError(f"{name}: its added tokens do not follow its vocabulary")
        self.specials = {token: vocab[unspellable] for token, unspellable in names.items()}  # under published names
        self.eos_id = next((self.specials[eos] for eos in EOS_NAMES if eos in names), None)
        if self.eos_id is None:
            raise ValueError(f"{name}: no end-of-document token; looked for {' '.join(EOS_NAMES)}")
        self._names = {self.specials[token]: unspellable for token, unspellable in names.items()}
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._spec = spec
        self.digest = hashlib.sha256(spec.encode()).hexdigest()
        self.vocab_size = max(used, vocab_size or 0)
        decoder = json.dumps(parsed.get("decoder"))
        self.is_byte_level, self.joins_bytes = '"ByteLevel"' in decoder, '"ByteFallback"' in decoder
        self.token_bytes = self._count_bytes(vocab)
        around = self._tokenizer.encode("a", add_special_tokens=True).ids
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        at = next((i for i in range(len(around)) if around[i : i + len(plain)] == plain), None)
        self.begin_ids = () if at is None else tuple(around[:at])
        self.end_ids = () if at is None else tuple(around[at + len(plain) :])

    def _count_bytes(self, vocab: dict[str, int]) -> np.ndarray:
        byte_level = '"ByteLevel"' in self._spec
        added = self._tokenizer.get_added_tokens_decoder()
        counts = np.zeros(self.vocab_size, np.int32)
        for token, i in vocab.items():
            if i in self._names:
                counts[i] = 0
            elif i in added:
                counts[i] = len(token.encode())
            elif byte_level:
                counts[i] = len(token)  # each character of such a vocabulary stands for one byte
            elif BYTE_TOKEN.fullmatch(token):
                counts[i] = 1  # SentencePiece falls back to bytes
            else:
                counts[i] = len(token.replace("▁", " ").encode())
        return counts

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 of (tokens,), without a begin or an end of document."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of every text, on all cores."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        arrays = (np.array(encoding.ids, np.int32) for encoding in encodings)
        # A vocabulary may give its end of document to what it has no other token for.
        return [ids[ids != self.eos_id] for ids in arrays]

    def encode_places(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`encode` of every text, and (tokens, 2): the characters at which each token begins and ends."""
        made = []
        for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False):
            ids, places = np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int64).reshape(-1, 2)
            made.append((ids[ids != self.eos_id], places[ids != self.eos_id]))
        return made

    def encode_parts(self, parts: Iterable[str | int]) -> np.ndarray:
        """Ids of one text in which special tokens stand, int32 of (tokens,): a str is text, an int a special token."""
        text = "".join(part if isinstance(part, str) else self._names[part] for part in parts)
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def by_words(self) -> WordEncoder | None:
        """Another `encode_batch` with the same results, on one core and faster there; None where there is none."""
        return WordEncoder(self._tokenizer, self.eos_id) if WordEncoder.fits(self._spec) else None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; broken UTF-8 shows as U+FFFD, special tokens and foreign ids as nothing."""
        known = _known(ids, self.vocab_size).tolist()
        return self._tokenizer.decode([i for i in known if i not in self._names])

    def bytes_of(self, token: int) -> bytes | None:
        """The bytes that a token adds to those of its neighbours, none of special and foreign ones.

        None where it stands for text of its own. `joins_bytes` says that the decoder takes neighbouring bytes as a
        whole: if they are not UTF-8, all of them are shown as broken.
        """
        if not 0 <= token < self.vocab_size or token in self._names:
            return b""
        spelled = self._tokenizer.id_to_token(token)
        if spelled is None:
            return b""
        if self.is_byte_level:
            try:
                return bytes(BYTE_OF[character] for character in spelled)
            except KeyError:  # an added token, which stands as it is
                return spelled.encode()
        return bytes([int(spelled[3:5], 16)]) if self.joins_bytes and BYTE_TOKEN.fullmatch(spelled) else None

    def as_json(self) -> str:
        """The text of the tokenizer.json as it was given, so that its digest stays."""
        return self._spec

    def vocab(self) -> dict[str, int]:
        """The id of every token but special ones, as the vocabulary spells it."""
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        return {token: i for token, i in vocab.items() if i not in self._names}

    def save(self, path: Path) -> None:
        """Writes the tokenizer.json as it was given, whole or not at all."""
        replace_text(Path(path), self._spec)


Tokenizer = ByteTokenizer | JsonTokenizer


def train(config: TokenizerConfig, texts: Iterable[str]) -> JsonTokenizer:
    """The tokenizer of kind=bpe or unigram for these texts."""
    return {"bpe": train_bpe, "unigram": train_unigram}[config.kind](texts, config.vocab_size)


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Byte-level BPE with GPT-2's word pattern; the same texts give the same tokenizer.

    A corpus too small for so many merges leaves the last ids unused. (Sennrich et al. 2016; Radford et al. 2019.)
    """
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return JsonTokenizer(tokenizer.to_str(), "trained BPE", vocab_size)


def train_unigram(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Byte-level unigram with GPT-2's word pattern: a word is cut into the tokens that are likeliest together.

    The same texts give the same tokenizer; every byte is a token, so that nothing is unknown. (Kudo 2018.)
    """
    from tokenizers import models

    from data.tokenizers.unigram import unigram_pieces

    tokenizer = _byte_level(models.Unigram([(END_OF_TEXT, 0.0), *unigram_pieces(texts, vocab_size - 1)]))
    tokenizer.add_special_tokens([END_OF_TEXT])
    return JsonTokenizer(tokenizer.to_str(), "trained unigram", vocab_size)


def _byte_level(model):
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def load_tokenizer(config: TokenizerConfig, saved: Path | None = None) -> Tokenizer:
    """The tokenizer of a config, without its corpus.

    saved: what `save` wrote; a trained one needs it, kind=file prefers it to its path. Raises ValueError where the file
    is not there or damaged.
    """
    if config.kind == "bytes":
        return ByteTokenizer()
    if config.is_trained:
        assert saved is not None, "it is trained by data.shards.prepare, which saves it"
        return JsonTokenizer(read_spec(saved), str(saved), config.vocab_size)
    path = saved if saved is not None and Path(saved).exists() else config.path
    return JsonTokenizer(read_spec(path), str(path))


def vocab_size_of(config: TokenizerConfig) -> int:
    """Number of ids of the tokenizer, known before any corpus is read; equals its `vocab_size`."""
    if config.kind == "bytes":
        return ByteTokenizer.vocab_size
    if config.is_trained:
        return config.vocab_size
    return _parse(read_spec(config.path), config.path)[1]


# ---- what a tokenizer.json says ----------------------------------------------------------------------------------


def _parse(spec: str, name: str) -> tuple[dict, int]:
    """A tokenizer.json, and its highest id + 1: published vocabularies may have holes."""
    try:
        parsed = json.loads(spec)
        vocab = parsed["model"]["vocab"]
        ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))  # Unigram keeps a list
        added = [token["id"] for token in parsed.get("added_tokens") or [] if isinstance(token["content"], str)]
        return parsed, max([*ids, *added]) + 1
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name}: not a tokenizer.json: {type(error).__name__} {error}") from error


def _unspellable(parsed: dict) -> dict[str, str]:
    """The special tokens of a tokenizer.json, with the names that they have while in use."""
    vocab, added = parsed["model"]["vocab"], parsed.get("added_tokens") or []
    words = vocab if isinstance(vocab, dict) else {piece[0] for piece in vocab}
    known = {token["content"] for token in added}
    special = [token["content"] for token in added if token.get("special")]
    eos = next((eos for eos in EOS_NAMES if eos in words or eos in known), None)  # perhaps an ordinary word there
    return {token: f"{UNSPELLABLE}{i:x}x" for i, token in enumerate(dict.fromkeys([*special, *filter(None, [eos])]))}


def _renamed(parsed: dict, names: dict[str, str]) -> dict:
    """A tokenizer.json whose special tokens have other names: no text can spell them, and no merges make them."""
    model = dict(parsed["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece[0], piece[0]), *piece[1:]] for piece in model["vocab"]]
    if merges := model.get("merges"):
        joined = lambda merge: merge.replace(" ", "") if isinstance(merge, str) else "".join(merge)
        model["merges"] = [merge for merge in merges if joined(merge) not in names]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    added = parsed.get("added_tokens") or []
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    words = names.keys() - {token["content"] for token in added}  # that the vocabulary holds like any other
    new = [{"id": 0, "content": names[token], "special": True, **flags} for token in words]
    added = [*new, *(token | {"content": names.get(token["content"], token["content"])} for token in added)]
    return parsed | {"model": model, "added_tokens": added}


def _known(ids: Iterable[int], vocab_size: int) -> np.ndarray:
    ids = np.asarray(ids if hasattr(ids, "__len__") else list(ids), np.int64).reshape(-1)
    return ids[(ids >= 0) & (ids < vocab_size)]
