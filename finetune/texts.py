"""Texts of rows as the tokens that a model was trained on: with its special tokens around, cut to a length."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.table import LeftOut, Row
from finetune.task import Example, Setup


def around(setup: Setup, rows: Sequence[Row], roles: Sequence[str], left_out: LeftOut) -> list[dict | None]:
    """Each row's texts as one sequence {tokens_T, types_T}, special tokens around each; None for an empty first text.

    Texts that are too long are cut, the longest one first, as transformers' `longest_first` does. A second text has the
    token type 1, where the model has types.
    """
    first, *others = roles
    asked = [role for role in roles if role == first or any(row.text(role) for row in rows)]
    tokens = {role: setup.tokenizer.encode_batch([row.text(role) for row in rows]) for role in asked}
    made: list[dict | None] = []
    for number, row in enumerate(rows):
        if not row.text(first):
            left_out.add(f"with an empty {first}: left out", row.name)
            made.append(None)
            continue
        parts = [tokens[role][number] for role in asked if role == first or row.text(role)]
        made.append(sequence(setup, parts, row.name, left_out))
    return made


def sequence(setup: Setup, parts: list[np.ndarray], name: str, left_out: LeftOut) -> dict:
    """Parts of one sequence with what belongs around them, cut to the run's length."""
    begin, end = setup.tokenizer.begin_ids, setup.tokenizer.end_ids
    room = setup.seq_len - len(begin) - len(end) * len(parts)
    if room < len(parts):
        raise ValueError(f"train.seq_len={setup.seq_len} leaves no room for text beside the special tokens")
    lengths = np.array([len(part) for part in parts])
    if lengths.sum() > room:
        left_out.add(f"longer than train.seq_len={setup.seq_len} tokens: cut", name)
        lengths = shortened(lengths, room)
    tokens, types, last = list(begin), [0] * len(begin), max(0, setup.model.token_types - 1)
    for number, (part, length) in enumerate(zip(parts, lengths.tolist(), strict=True)):
        tokens += [*part[:length].tolist(), *end]
        types += [min(number, 1, last)] * (length + len(end))
    arrays = {"tokens_T": np.array(tokens, np.int32)}
    return arrays | ({"types_T": np.array(types, np.int32)} if setup.model.token_types else {})


def shortened(lengths: np.ndarray, room: int) -> np.ndarray:
    """Lengths that fit into `room` together: tokens are taken from the longest first."""
    kept = np.zeros_like(lengths)
    for rank, part in enumerate(np.argsort(lengths, kind="stable")):
        kept[part] = min(lengths[part], (room - kept.sum()) // (len(lengths) - rank))
    return kept


def of_words(setup: Setup, words: Sequence[Sequence[str]]) -> list[list[np.ndarray]]:
    """The tokens of each word of each row, as they are where a space stands before it."""
    space = " " if getattr(setup.tokenizer, "is_byte_level", True) else ""  # others begin a word with a mark of theirs
    flat = setup.tokenizer.encode_batch([f"{space}{word}" for row in words for word in row])
    made, at = [], 0
    for row in words:
        made.append(flat[at : at + len(row)])
        at += len(row)
    return made


def cut_to(setup: Setup, tokens: np.ndarray, room: int, name: str, left_out: LeftOut) -> np.ndarray:
    """One text with the model's special tokens around it, of `room` tokens at most."""
    begin, end = setup.tokenizer.begin_ids, setup.tokenizer.end_ids
    if (own := room - len(begin) - len(end)) < 1:
        raise ValueError(f"train.seq_len={setup.seq_len} leaves no room for text beside the special tokens")
    if len(tokens) > own:
        left_out.add(f"with a part longer than {own} tokens: cut", name)
    return np.array([*begin, *tokens[:own].tolist(), *end], np.int32)


def next_tokens(
    setup: Setup, row: int, name: str, ids: np.ndarray, counts: np.ndarray, left_out: LeftOut, about: Any = None
) -> list[Example]:
    """The example of a decoder that reads `ids` and is to tell those that count (bool): the token after each.

    A text that is too long is cut behind its last token that fits; none is left of one in which then nothing counts.
    """
    if len(ids) > setup.seq_len + 1:
        left_out.add(f"longer than train.seq_len={setup.seq_len} tokens: cut", name)
    ids, counts = ids[: setup.seq_len + 1], counts[: setup.seq_len + 1]
    if not counts[1:].any():
        left_out.add("in which nothing counts any more: left out", name)
        return []
    arrays = {"tokens_T": ids[:-1].astype(np.int32), "targets_T": ids[1:].astype(np.int32)}
    return [Example(row, {**arrays, "mask_T": counts[1:].astype(np.float32)}, about)]
