"""The stream of a mixture: pure in (seed, step) whatever the hosts, each source as if it were read alone."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.corpus import DataConfig
from data.loader import Loader
from data.mixture import MixtureSource, Plan
from data.opening import open_corpora
from data.shards import prepare
from data.streams import Mixture, heldout_batches, training_stream
from data.token_files import Tokens
from data.tokenizer import ByteTokenizer, TokenizerConfig

EOS, SEQ_LEN, BATCH = 0, 16, 12
SOURCES = ("prose", "code", "talk")
CURRICULUM = {
    "prose": MixtureSource(weight={0: 3, 7: 1}),
    "code": MixtureSource(weight=1, epochs=1.5),
    "talk": MixtureSource(weight={4: 2}),
}


def texts(number):
    """Documents of a source, whose tokens no other source has."""
    draw = np.random.default_rng(number)
    lengths = draw.integers(1, 40, 120)
    tokens = draw.integers(1 + 1000 * number, 1000 * (number + 1), lengths.sum()).astype(np.uint16)
    ends = np.cumsum(lengths)
    tokens[ends - 1] = EOS
    return Tokens.of([tokens], [ends])


CORPORA = {name: texts(number) for number, name in enumerate(SOURCES)}


def loader(name, packing, seed):
    return Loader(CORPORA[name], seq_len=SEQ_LEN, batch_size=BATCH, seed=seed, eos_id=EOS, packing=packing)


def mixture(packing, seed, sources=CURRICULUM):
    loaders = {name: loader(name, packing, seed) for name in sources}
    rows = {name: one.sequences_per_epoch for name, one in loaders.items()}
    sizes = {name: len(one.tokens) for name, one in loaders.items()}
    return Mixture(loaders, Plan(sources, rows, sizes, temperature=1.0, batch_size=BATCH, seq_len=SEQ_LEN))


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


@settings(max_examples=20, deadline=None)
@given(
    packing=st.sampled_from(["concatenate", "best_fit"]),
    seed=st.integers(0, 2**32 - 1),
    steps=st.lists(st.integers(0, 300), min_size=1, max_size=3),
    hosts=st.sampled_from([1, 2, 4, 12]),
)
def test_a_batch_is_the_same_on_any_hosts_and_after_any_restart(packing, seed, steps, hosts):
    """Mixture, packing, curriculum and caps: every host that starts anew at a step reads its rows of the same batch."""
    undisturbed = mixture(packing, seed)
    for step in steps:
        whole = undisturbed.batch(step)
        assert len(whole["tokens_BT"]) == BATCH
        restarted = [mixture(packing, seed) for _ in range(hosts)]
        size = BATCH // hosts
        parts = [host.batch(step, slice(i * size, (i + 1) * size)) for i, host in enumerate(restarted)]
        same(whole, {name: np.concatenate([part[name] for part in parts]) for name in whole})


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_each_source_is_read_as_if_it_were_alone(packing):
    mixed, seen = mixture(packing, seed=3), {name: [] for name in SOURCES}
    for step in range(40):
        batch = mixed.batch(step)
        for row, name in enumerate(mixed.names(step)):
            seen[name].append({key: array[row] for key, array in batch.items()})
    assert all(map(len, seen.values()))
    for name, rows in seen.items():
        alone = loader(name, packing, seed=3).samples(np.arange(len(rows)))
        same({key: np.stack([row[key] for row in rows]) for key in alone}, alone)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_a_mixture_of_one_is_that_source(packing):
    mixed, alone = mixture(packing, 5, {"code": MixtureSource()}), loader("code", packing, 5)
    for step in (0, 1, 17, 1000):
        same(mixed.batch(step), alone.batch(step))
        assert mixed.epoch(step) == alone.epoch(step)


def test_the_order_in_which_sources_are_named_does_not_matter():
    turned = dict(reversed(CURRICULUM.items()))
    for step in (0, 5, 100):
        same(mixture("best_fit", 0).batch(step), mixture("best_fit", 0, turned).batch(step))


def test_what_is_logged_is_what_was_read():
    mixed = mixture("best_fit", seed=0)
    read = [name for step in range(30) for name in mixed.names(step)]
    logged = mixed.metrics(30)
    for name in SOURCES:
        assert logged[f"data/share/{name}"] == read.count(name) / len(read)
        assert logged[f"data/epoch/{name}"] == read.count(name) / mixed.loaders[name].sequences_per_epoch
    assert mixed.metrics(0)["data/share/code"] == 0
    told = mixed.told(200)
    assert told["mixture"] == "code 25.00%, prose 75.00%, talk 0.00%"
    assert told["mixture after step 4"] == "code 16.67%, prose 50.00%, talk 33.33%"
    assert any("code read to the cap" in line for line in told.values())
    assert "code 1.50" in told["epochs by source"]


# ------------------------------------------------------------------------------------------------------- from settings


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(SOURCES):
        lines = [json.dumps({"text": f"{name} {i} " + name[0] * (3 * i % 50), "n": number}) for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def settings_of(folder, **options):
    sources = {name: MixtureSource("text", f"{folder}/{name}.jsonl") for name in options.pop("names", SOURCES)}
    return DataConfig("mixture", mixture=sources, cache=str(folder / "cache"), heldout=0.2, **options)


def test_sources_are_prepared_as_each_alone_and_their_digests_count(folder):
    data = settings_of(folder, segments=True, packing="best_fit")
    corpora = open_corpora(data, TokenizerConfig())
    assert [*corpora.by_name] == sorted(SOURCES)
    alone = open_corpora(data.of_mixture("code"), TokenizerConfig())
    assert alone.digest == corpora.by_name["code"].digest
    assert corpora.digest not in {dataset.digest for dataset in corpora.by_name.values()}
    assert corpora.told["code: data (training tokens)"] == len(alone.by_name["text"].train)
    other = open_corpora(settings_of(folder, names=SOURCES[:2]), TokenizerConfig())
    assert len({corpora.digest, other.digest, alone.digest}) == 3

    stream = training_stream(data, corpora, seq_len=SEQ_LEN, batch_size=BATCH, seed=0)
    names, batch = stream.names(2), stream.batch(2)
    for name, tokens in zip(names, batch["tokens_BT"], strict=True):
        assert name[0] in ByteTokenizer().decode(tokens)
    sizes = [len(corpora.by_name[name].train) for name in stream.plan.names]
    assert stream.plan.stages[0].shares == pytest.approx(np.array(sizes) / sum(sizes))


def test_each_source_is_evaluated(folder):
    data = settings_of(folder)
    corpora = open_corpora(data, TokenizerConfig())
    found = heldout_batches(data, corpora, seq_len=SEQ_LEN, batch_size=4, batches=4)
    assert [*found] == sorted(SOURCES)
    for name, batches in found.items():
        assert 1 <= len(list(batches)) <= 2  # four for three sources
        for batch in batches:
            assert name[0] in ByteTokenizer().decode(batch["tokens_BT"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "code.jsonl").write_text("{}"),
            "^data.mixture.code: .*code.jsonl:1: no field 'text'",
        ),
        (lambda folder: (folder / "talk.jsonl").unlink(), "^data.mixture.talk: data.path=.* matches no file"),
    ],
)
def test_what_is_wrong_with_a_source_is_told_with_its_name(folder, change, message):
    change(folder)
    with pytest.raises(ValueError, match=message):
        open_corpora(settings_of(folder), TokenizerConfig())


def test_a_source_that_is_too_short_is_told_with_its_name(folder):
    (folder / "code.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    data = settings_of(folder)
    corpora = open_corpora(data, TokenizerConfig())
    for make in (
        lambda: training_stream(data, corpora, seq_len=64, batch_size=4, seed=0),
        lambda: heldout_batches(data, corpora, seq_len=64, batch_size=4, batches=4),
    ):
        with pytest.raises(ValueError, match=r"^data.mixture.code: the .* stream has 2 tokens"):
            make()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_tokenizer_is_trained_on_all_sources_once(kind, folder, monkeypatch):
    data, config = settings_of(folder), TokenizerConfig(kind, vocab_size=300)
    corpora = open_corpora(data, config)
    assert {dataset.tokenizer.digest for dataset in corpora.by_name.values()} == {corpora.tokenizer.digest}
    assert corpora.tokenizer.vocab_size <= 300
    for name in SOURCES:  # words of all sources are learned
        assert len(corpora.tokenizer.encode(name)) < len(name)
    monkeypatch.setattr("data.opening.train", lambda *_: pytest.fail("trained again"))
    assert open_corpora(data, config).digest == corpora.digest


def test_sources_that_were_prepared_with_different_tokenizers_are_not_mixed(folder):
    trained = {}
    for name in SOURCES[:2]:
        alone = settings_of(folder).of_mixture(name)
        trained[name] = prepare(alone, TokenizerConfig("bpe", vocab_size=280))
    sources = {name: MixtureSource("prepared", str(dataset.directory)) for name, dataset in trained.items()}
    data = DataConfig("mixture", mixture=sources, cache=str(folder / "cache"))
    with pytest.raises(ValueError, match="code and prose were prepared with different tokenizers; prepare both"):
        open_corpora(data, TokenizerConfig())
