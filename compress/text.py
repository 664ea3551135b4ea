"""Rows of tokens: some to calibrate with, and others, which were kept for evaluation, to measure with."""

from pathlib import Path

import numpy as np

from compress.options import CORPORA
from data.corpus import DataConfig
from data.opening import Corpora, open_corpora
from data.prepared import INDEX
from data.tokenizer import Tokenizer, TokenizerConfig


def data_of(asked: str | None, own: DataConfig | None, cache: str) -> DataConfig:
    """The corpus that --data names, or a model's own if it has one, or this Python's library."""
    if asked is None:
        return own or DataConfig(source="stdlib", cache=cache)
    if asked in CORPORA:
        return DataConfig(source=asked, cache=cache)
    prepared = Path(asked, INDEX).is_file()
    return DataConfig(source="prepared" if prepared else "text", path=asked, cache=cache)


def open_text(data: DataConfig, config: TokenizerConfig, tokenizer: Tokenizer, saved: Path) -> Corpora:
    """The corpus in the model's tokens; `saved` is its tokenizer on disk. Raises ValueError for one with others."""
    if config.kind != "bytes" and saved.exists():
        config = TokenizerConfig("file", path=str(saved))
    corpora = open_corpora(data, config)
    if corpora.tokenizer.digest != tokenizer.digest:
        raise ValueError(
            f"data.source={data.source} has tokens of another tokenizer ({corpora.tokenizer.digest[:12]}) than the "
            f"model's ({tokenizer.digest[:12]}): give its text, or prepare it with the model's tokenizer"
        )
    return corpora


def rows_of_text(corpora: Corpora, split: str, count: int, length: int) -> np.ndarray:
    """So many rows of `length` + 1 tokens, evenly spread over each corpus: int32. Raises ValueError for too few tokens.

    Rows overlap where the text is shorter than all of them.
    """
    found, names = [], sorted(corpora.by_name)
    for number, name in enumerate(names):
        stream, wanted = getattr(corpora.by_name[name], split), len(range(number, count, len(names)))
        if wanted and len(stream) < length + 1:
            raise ValueError(
                f"{name} has {len(stream):,} {split} tokens, and a row is {length} + 1: give a lower --length"
            )
        if wanted:
            starts = np.linspace(0, len(stream) - length - 1, wanted).astype(np.int64)
            found.append(stream.read(starts, length + 1).astype(np.int32))
    return np.concatenate(found)


def rows_of_tokens(tokens: dict[str, np.ndarray], split: str, count: int, length: int) -> np.ndarray:
    """The same of a task's rows: of the tokens of a split one after the other. Raises ValueError for too few."""
    if len(tokens[split]) < length + 1:
        said = f"the task's {split} rows have {len(tokens[split]):,} tokens, and a row of text is {length} + 1"
        raise ValueError(f"{said}: give a lower --length, or other text with --data")
    starts = np.linspace(0, len(tokens[split]) - length - 1, count).astype(np.int64)
    return tokens[split][starts[:, None] + np.arange(length + 1)].astype(np.int32)
