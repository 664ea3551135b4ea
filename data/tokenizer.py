"""Tokenizers: plain bytes, byte-level BPE trained on the corpus, or any tokenizer.json.

All have the same face: `vocab_size`, `eos_id`, `encode`, `encode_batch`, `decode`, `bytes_of`, `joins_bytes`,
`token_bytes`, `digest`, `save`. What to print of new tokens, `inference.detokenizer` tells.
The end of a document never comes out of a text, so it can be trusted as a document's border.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.objects import read_bytes
from data.words import WordEncoder
from runtime.files import replace_text

KINDS = ("bytes", "bpe", "file")
END_OF_TEXT = "<|endoftext|>"
SMALLEST_BPE = 257  # every byte and the end of a document
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


@dataclass(frozen=True)
class TokenizerConfig:
    kind: str = "bytes"  # bytes | bpe (trained on the training documents) | file (any tokenizer.json)
    vocab_size: int = 4096  # of kind=bpe: the bytes, the merges and the end of a document
    path: str | None = None  # of kind=file: the tokenizer.json

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"tokenizer.kind={self.kind}: choose one of {', '.join(KINDS)}")
        if self.kind == "bpe" and self.vocab_size < SMALLEST_BPE:
            raise ValueError(
                f"tokenizer.vocab_size={self.vocab_size}: byte-level BPE needs at least {SMALLEST_BPE} "
                f"= 256 bytes + 1 end of document"
            )
        if self.kind == "file" and not self.path:
            raise ValueError("tokenizer.kind=file needs tokenizer.path=.../tokenizer.json")


class ByteTokenizer:
    """UTF-8 bytes as ids; NUL ends a document, so NULs of a text are dropped."""

    vocab_size = 256
    eos_id = 0
    digest = hashlib.sha256(b"bytes").hexdigest()
    joins_bytes = False

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

    def by_words(self) -> None:
        """There is no faster way."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; broken UTF-8 shows as U+FFFD, the end of a document and foreign ids as nothing."""
        ids = _known(ids, self.vocab_size)
        return ids[ids != self.eos_id].astype(np.uint8).tobytes().decode("utf-8", "replace")

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token, none of the end of a document or a foreign id."""
        return bytes([token]) if 0 <= token < self.vocab_size and token != self.eos_id else b""

    def save(self, path: Path) -> None:
        """Writes nothing: bytes need no file."""


class JsonTokenizer:
    """A tokenizer.json, run by the `tokenizers` library.

    `token_bytes` is exact for byte-level tokenizers without normalisation (GPT-2, Llama 3, those trained here). One
    that rewrites its text (a prefixed space, NFC, lower case) is counted by the text that its tokens spell.
    Special tokens are not looked for in texts, which therefore cannot forge them.
    """

    def __init__(self, spec: str, name: str, vocab_size: int | None = None):
        """spec: the JSON text. name: for messages. vocab_size: at least the ids in use; the rest stay unused."""
        from tokenizers import Tokenizer  # here, so that `bytes` starts without it

        used = _vocab_size_of_json(spec, name)
        try:
            self._tokenizer = Tokenizer.from_str(spec)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{name}: not a tokenizer.json: {error}") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._spec = spec
        self.digest = hashlib.sha256(spec.encode()).hexdigest()
        self.vocab_size = max(used, vocab_size or 0)
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        if max(vocab.values()) >= used:  # the library numbers such tokens anew
            raise ValueError(f"{name}: its added tokens do not follow its vocabulary")
        self.eos_id = next((vocab[eos] for eos in EOS_NAMES if eos in vocab), None)
        if self.eos_id is None:
            raise ValueError(f"{name}: no end-of-document token; looked for {' '.join(EOS_NAMES)}")
        self.token_bytes = self._count_bytes(vocab)
        decoder = json.dumps(json.loads(spec).get("decoder"))
        self._byte_level, self.joins_bytes = '"ByteLevel"' in decoder, '"ByteFallback"' in decoder
        self._special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}

    def _count_bytes(self, vocab: dict[str, int]) -> np.ndarray:
        byte_level = '"ByteLevel"' in self._spec
        added = self._tokenizer.get_added_tokens_decoder()
        counts = np.zeros(self.vocab_size, np.int32)
        for token, i in vocab.items():
            if i in added:
                counts[i] = 0 if added[i].special else len(added[i].content.encode())
            elif byte_level:
                counts[i] = len(token)  # each character of such a vocabulary stands for one byte
            elif BYTE_TOKEN.fullmatch(token):
                counts[i] = 1  # SentencePiece falls back to bytes
            else:
                counts[i] = len(token.replace("▁", " ").encode())
        counts[self.eos_id] = 0
        return counts

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 of (tokens,), without a begin or an end of document."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of every text, on all cores."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        arrays = (np.array(encoding.ids, np.int32) for encoding in encodings)
        # A vocabulary may hold its end of document as an ordinary word.
        return [ids[ids != self.eos_id] for ids in arrays]

    def by_words(self) -> WordEncoder | None:
        """Another `encode_batch` with the same results, on one core and faster there; None where there is none."""
        return WordEncoder(self._tokenizer, self.eos_id) if WordEncoder.fits(self._spec) else None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; broken UTF-8 shows as U+FFFD, special tokens and foreign ids as nothing."""
        return self._tokenizer.decode(_known(ids, self.vocab_size).tolist(), skip_special_tokens=True)

    def bytes_of(self, token: int) -> bytes | None:
        """The bytes that a token adds to those of its neighbours, none of special and foreign ones.

        None where it stands for text of its own. `joins_bytes` says that the decoder takes neighbouring bytes as a
        whole: if they are not UTF-8, all of them are shown as broken.
        """
        if not 0 <= token < self.vocab_size or token in self._special:
            return b""
        spelled = self._tokenizer.id_to_token(token)
        if spelled is None:
            return b""
        if self._byte_level:
            try:
                return bytes(BYTE_OF[character] for character in spelled)
            except KeyError:  # an added token, which stands as it is
                return spelled.encode()
        return bytes([int(spelled[3:5], 16)]) if self.joins_bytes and BYTE_TOKEN.fullmatch(spelled) else None

    def save(self, path: Path) -> None:
        """Writes the tokenizer.json."""
        replace_text(Path(path), self._spec)


Tokenizer = ByteTokenizer | JsonTokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Byte-level BPE with GPT-2's word pattern; the same texts give the same tokenizer.

    A corpus too small for so many merges leaves the last ids unused. (Sennrich et al. 2016; Radford et al. 2019.)
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return JsonTokenizer(tokenizer.to_str(), "trained BPE", vocab_size)


def load_tokenizer(config: TokenizerConfig, saved: Path | None = None) -> Tokenizer:
    """The tokenizer of a config, without its corpus.

    saved: what `save` wrote; kind=bpe needs it, kind=file prefers it to its path. Raises ValueError where the file is
    not there or damaged.
    """
    if config.kind == "bytes":
        return ByteTokenizer()
    if config.kind == "bpe":
        assert saved is not None, "kind=bpe is trained by data.shards.prepare, which saves it"
        return JsonTokenizer(_read(saved), str(saved), config.vocab_size)
    path = saved if saved is not None and Path(saved).exists() else config.path
    return JsonTokenizer(_read(path), str(path))


def vocab_size_of(config: TokenizerConfig) -> int:
    """Number of ids of the tokenizer, known before any corpus is read; equals its `vocab_size`."""
    if config.kind == "bytes":
        return ByteTokenizer.vocab_size
    if config.kind == "bpe":
        return config.vocab_size
    return _vocab_size_of_json(_read(config.path), config.path)


def _vocab_size_of_json(spec: str, name: str) -> int:
    """Highest id + 1: published vocabularies may have holes."""
    try:
        tokenizer = json.loads(spec)
        vocab = tokenizer["model"]["vocab"]
        ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))  # Unigram keeps a list
        added = [token["id"] for token in tokenizer.get("added_tokens") or []]
        return max([*ids, *added]) + 1
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name}: not a tokenizer.json: {type(error).__name__} {error}") from error


def _read(path: Path | str) -> str:
    try:
        return read_bytes(str(path)).decode("utf-8")
    except OSError as error:
        raise ValueError(f"tokenizer file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"tokenizer file {path}: not UTF-8 at byte {error.start}") from error


def _known(ids: Iterable[int], vocab_size: int) -> np.ndarray:
    ids = np.asarray(ids if hasattr(ids, "__len__") else list(ids), np.int64).reshape(-1)
    return ids[(ids >= 0) & (ids < vocab_size)]
