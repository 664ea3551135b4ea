"""The corpora of a run: one, or the several of a mixture, all with one tokenizer."""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.corpus import DataConfig, Document, split
from data.prepared import Progress
from data.shards import Dataset, digest_of_source, prepare, stamps
from data.tokenizer import ByteTokenizer, Tokenizer, TokenizerConfig, train
from runtime.locks import locked


@dataclass(frozen=True, eq=False)
class Corpora:
    """The corpora of a run by name, all with one tokenizer. One that is read alone has its source's name."""

    by_name: dict[str, Dataset]
    tokenizer: Tokenizer
    digest: str  # of all of them and their names

    @property
    def told(self) -> dict[str, str | int]:
        """What all processes of a run must have found alike, by the settings it comes from."""
        if len(self.by_name) == 1:
            return next(iter(self.by_name.values())).told
        return {f"{name}: {key}": value for name, d in self.by_name.items() for key, value in d.told.items()}

    @property
    def training_tokens(self) -> int:
        """How many training tokens all corpora have together."""
        return sum(len(dataset.train) for dataset in self.by_name.values())


def open_corpora(data: DataConfig, tokenizer: TokenizerConfig, progress: Progress | None = None) -> Corpora:
    """The corpora that a run reads, each prepared if it is not yet; progress: as of `data.shards.prepare`.

    Raises ValueError for a source that cannot be used, and for sources that do not have the same tokenizer.
    """
    if not data.mixture:
        dataset = prepare(data, tokenizer, progress)
        return Corpora({data.source: dataset}, dataset.tokenizer, dataset.digest)
    if tokenizer.is_trained:
        tokenizer = _trained_on_all(data, tokenizer, progress or (lambda what, done, total: None))
    datasets = {}
    for name in sorted(data.mixture):
        told = progress and (lambda what, done, total, name=name: progress(f"{name}: {what}", done, total))
        with naming(data, name):
            datasets[name] = prepare(data.of_mixture(name), tokenizer, told)
    first, *others = datasets
    for other in others:
        if datasets[other].tokenizer.digest != datasets[first].tokenizer.digest:
            raise ValueError(
                f"data.mixture: {first} and {other} were prepared with different tokenizers; prepare both with one, "
                f"tokenizer=file tokenizer.path={datasets[first].directory}/tokenizer.json"
            )
    digest = hashlib.sha256(repr([(name, d.digest) for name, d in datasets.items()]).encode()).hexdigest()[:32]
    return Corpora(datasets, datasets[first].tokenizer, digest)


@contextlib.contextmanager
def naming(data: DataConfig, name: str) -> Iterator[None]:
    """Within it, what is wrong with a source of a mixture is told with its name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"data.mixture.{name}: {error}" if data.mixture else str(error)) from error


def _trained_on_all(data: DataConfig, config: TokenizerConfig, progress: Progress) -> TokenizerConfig:
    """The tokenizer of the training documents of all sources of a mixture, one source after the other; trained once and
    kept in the cache, under the digest of what they hold."""
    cache, alone = Path(data.cache).expanduser(), {name: data.of_mixture(name) for name in sorted(data.mixture)}
    (cache / "sources").mkdir(mode=0o700, parents=True, exist_ok=True)
    content = []
    for name, source in alone.items():
        with naming(data, name):
            stats = stamps(source)
            content.append(digest_of_source(cache, source, TokenizerConfig(), ByteTokenizer(), stats, progress))
    key = hashlib.sha256(repr((content, config.kind, config.vocab_size)).encode()).hexdigest()[:32]
    path = cache / f"tokenizer-{key}.json"
    waiting = lambda: progress("waiting for another process to train the tokenizer", 0, 1)
    with locked(cache / f".lock-tokenizer-{key}", on_wait=waiting):
        if not path.exists():
            train(config, _training_texts(data, alone, progress)).save(path)
    return TokenizerConfig("file", path=str(path))


def _training_texts(data: DataConfig, alone: dict[str, DataConfig], progress: Progress) -> Iterator[str]:
    for number, (name, source) in enumerate(alone.items()):
        progress(f"training the tokenizer on {name}", number, len(alone))
        with naming(data, name):
            for item, heldout in split(source):
                if isinstance(item, Document) and isinstance(item.text, str) and not heldout:
                    yield item.text
    progress("training the tokenizer", len(alone), len(alone))
