"""Files that hold tokens already: Megatron's NAME.bin with NAME.idx, OLMo's .npy. Nothing is tokenised again.

Documents are cut at the tokenizer's end-of-document token, which they need not have: it is put behind each of them.
"""

import itertools
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from data.sources.files import File, sibling
from data.sources.readers import Bad, Content, Read, Reading

BLOCK = 1 << 22  # bytes read at a time
MEGATRON = b"MMIDIDX\x00\x00"  # how an .idx begins
HEADER = 9 + 8 + 1 + 8 + 8  # magic, version, kind of token, number of sequences, number of documents + 1
KINDS = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
NUMPY = b"\x93NUMPY"


def read_index(path: File, raw: BinaryIO, how: Reading) -> Read:
    """An .idx holds no documents of its own: its .bin is read with it."""
    return iter(())


def read_megatron(path: File, raw: BinaryIO, how: Reading) -> Read:
    """The documents of a Megatron file, each of one or several sequences of tokens.

    Source: `IndexedDataset` of Megatron-LM (megatron/core/datasets/indexed_dataset.py).
    Raises ValueError where the index does not fit the file; a document with tokens of another tokenizer is a `Bad`.
    """
    tokenizer = _tokenizer(path, how)
    index = sibling(path, ".idx")
    with index.open("rb") as file:
        dtype, lengths, pointers, borders = _index(index, file.read())
    size = raw.seek(0, 2)
    ends = pointers + lengths.astype(np.int64) * dtype.itemsize
    if len(ends) and (ends.max() > size or pointers.min() < 0 or lengths.min() < 0):
        raise ValueError(
            f"{path}: {size:,} bytes, and {index} speaks of {ends.max():,}: the two do not belong together"
        )
    for number, (first, last) in enumerate(itertools.pairwise(borders)):
        pieces = []
        for sequence in range(first, last):
            raw.seek(int(pointers[sequence]))
            pieces.append(np.frombuffer(raw.read(int(lengths[sequence]) * dtype.itemsize), dtype))
        tokens = np.concatenate(pieces) if pieces else np.empty(0, dtype)
        for part in _parts(tokens, tokenizer.eos_id):
            yield f"{path}:document {number}", _checked(part, tokenizer), int(ends[last - 1]) if last > first else 0


def _index(path: File, content: bytes) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Kind of token; length and first byte of each sequence; the sequence with which each document begins."""
    if content[:9] != MEGATRON or len(content) < HEADER:
        raise ValueError(f"{path}: not an index of Megatron: it does not begin with {MEGATRON[:7].decode()}")
    version, code = int.from_bytes(content[9:17], "little"), content[17]
    if version != 1 or code not in KINDS:
        raise ValueError(f"{path}: version {version} with tokens of kind {code}; can read version 1, integers")
    sequences, borders = (int.from_bytes(content[at : at + 8], "little") for at in (18, 26))
    needed = HEADER + sequences * (4 + 8) + borders * 8
    if len(content) < needed or borders < 1:
        raise ValueError(f"{path}: {len(content):,} bytes, and its counts need {needed:,}: it is cut short")
    lengths = np.frombuffer(content, "<i4", sequences, HEADER)
    pointers = np.frombuffer(content, "<i8", sequences, HEADER + 4 * sequences)
    starts = np.frombuffer(content, "<i8", borders, HEADER + 12 * sequences)
    if (np.diff(starts) < 0).any() or starts[0] != 0 or starts[-1] != sequences:
        raise ValueError(f"{path}: its documents do not cover its {sequences:,} sequences")
    return np.dtype(KINDS[code]), lengths, pointers, starts


def read_npy(path: File, raw: BinaryIO, how: Reading) -> Read:
    """The documents of an array of tokens, cut at their ends: a real .npy, or as OLMo has it the bare numbers.

    Bare numbers take two bytes each where the vocabulary allows, else four.
    Raises ValueError for other arrays and for a file cut short; a document with tokens of another tokenizer is a `Bad`.
    """
    tokenizer = _tokenizer(path, how)
    dtype, first = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"), 0
    if raw.read(len(NUMPY)) == NUMPY:
        dtype, first = _npy_header(path, raw)
    size = raw.seek(0, 2)
    if (size - first) % dtype.itemsize:
        raise ValueError(f"{path}: {size:,} bytes are no whole number of {dtype.itemsize}-byte tokens")
    raw.seek(first)
    for number, (tokens, read) in enumerate(_documents(raw, dtype, tokenizer.eos_id)):
        yield f"{path}:document {number}", _checked(tokens, tokenizer), read


def _npy_header(path: File, raw: BinaryIO) -> tuple[np.dtype, int]:
    raw.seek(0)
    try:
        version = np.lib.format.read_magic(raw)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(raw)
    except ValueError as error:
        raise ValueError(f"{path}: not a .npy file: {' '.join(str(error).split())}") from None
    if len(shape) != 1 or dtype.kind not in "iu":
        raise ValueError(f"{path}: an array of {dtype} with {len(shape)} dims; tokens are integers in one dim")
    return dtype, raw.tell()


def _documents(raw: BinaryIO, dtype: np.dtype, eos_id: int) -> Iterator[tuple[np.ndarray, int]]:
    waiting: list[np.ndarray] = []
    while block := raw.read(BLOCK):
        tokens = np.frombuffer(block, dtype)
        ends = np.flatnonzero(tokens == eos_id)
        begin = 0
        for end in ends:
            yield np.concatenate([*waiting, tokens[begin:end]]), raw.tell()
            waiting, begin = [], end + 1
        if begin < len(tokens):
            waiting.append(tokens[begin:])
    if waiting:
        yield np.concatenate(waiting), raw.tell()


def _parts(tokens: np.ndarray, eos_id: int) -> list[np.ndarray]:
    """A document without the end that it may have, and cut where it has one inside."""
    ends = np.flatnonzero(tokens == eos_id)
    if len(ends) == 0:
        return [tokens]
    pieces = np.split(tokens, ends)
    pieces = [pieces[0], *(piece[1:] for piece in pieces[1:])]
    return pieces if len(pieces[-1]) else pieces[:-1]


def _checked(tokens: np.ndarray, tokenizer) -> Content:
    if len(tokens) and (wrong := int(tokens.min())) < 0:
        return Bad(f"a token {wrong}: not of this tokenizer")
    if len(tokens) and (wrong := int(tokens.max())) >= tokenizer.vocab_size:
        return Bad(f"a token {wrong}, and the tokenizer has ids below {tokenizer.vocab_size}: made with another one")
    return tokens


def _tokenizer(path: File, how: Reading):
    if how.tokenizer is None:
        raise ValueError(f"{path} holds tokens: give the tokenizer that made them, tokenizer=file tokenizer.path=FILE")
    return how.tokenizer
