"""Generation with a cache against re-running the whole sequence; batches; meshes; ends."""

import functools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference import generate as module
from inference.config import SampleConfig
from inference.generate import decode, generate, prefill
from inference.sampling import sample as draw
from model.config import ModelConfig
from model.kv_cache import make_cache
from model.transformer import describe
from parallel.mesh import AXES, make_mesh

BASE = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ffn=48, vocab_size=61, vocab_multiple=16)
MODELS = {
    "rotary-gqa": BASE,
    "learned-bias-layernorm": replace(
        BASE, positions="learned", max_positions=40, kv_heads=4, norm="layer", bias="all", activation="gelu"
    ),
    "windows": replace(BASE, layers=4, window=5, window_pattern="LG", kv_heads=1, scan_layers=False),
    "qknorm-softcaps-untied": replace(
        BASE,
        qk_norm=True, attention_softcap=5.0, logit_softcap=8.0, norm_position="both", embedding_scale=True,
        activation="geglu", tied_embeddings=False,
    ),
}  # fmt: skip
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8], [2, 7], [1], [6, 2, 8, 3, 1, 8, 5]]
GREEDY = SampleConfig(tokens=12, temperature=0.0)
SAMPLED = SampleConfig(tokens=12, temperature=1.2, top_k=40, top_p=0.95, seed=7)


@functools.cache
def build(config: ModelConfig):
    """A model whose weights are large enough that its text does not end up in one repeated token."""
    description = describe(config)
    large = lambda: jax.tree.map(lambda p: 3 * p if p.ndim > 1 else p, description.init(jax.random.key(0)))
    return description, jax.jit(large)()


@partial(jax.jit, static_argnames=("temperature", "top_k", "top_p"))
def next_tokens(model, tokens_BT, lengths_B, seed, seeds_B2, **options):
    """The token after each row's length, from the whole sequence; causal, so what stands behind it does not count."""
    logits_BTV = model.logits(model(tokens_BT)[0])
    logits_BV = jnp.take_along_axis(logits_BTV, (lengths_B - 1)[:, None, None], axis=1)[:, 0]

    def key(length, seeds_2):
        row = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), seeds_2[0]), seeds_2[1])
        return jax.random.fold_in(row, length)

    return draw(logits_BV, jax.vmap(key)(lengths_B, seeds_B2), **options)


def without_cache(description, params, prompts: list[list[int]], sample: SampleConfig) -> list[list[int]]:
    """The slow way: every step runs the whole sequences."""
    model, rows = description.bind(params), np.arange(len(prompts))
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens_BT = np.zeros((len(prompts), lengths_B.max() + sample.tokens), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
    seeds_B2 = module._row_seeds(prompts, len(prompts))
    options = {name: getattr(sample, name) for name in ("temperature", "top_k", "top_p")}
    for step in range(sample.tokens):
        at_B = lengths_B + step
        tokens_BT[rows, at_B] = next_tokens(model, tokens_BT, at_B, np.uint32(sample.seed), seeds_B2, **options)
    return [tokens_BT[row, n : n + sample.tokens].tolist() for row, n in enumerate(lengths_B)]


@pytest.mark.parametrize(("name", "sample"), [("rotary-gqa", GREEDY), *((name, SAMPLED) for name in MODELS)])
def test_cached_equals_uncached(name, sample):
    description, params = build(MODELS[name])
    texts = generate(description, params, PROMPTS, sample)
    assert texts == without_cache(description, params, PROMPTS, sample)
    assert len({token for text in texts for token in text}) > 6, "the test would hardly see a difference"


@pytest.mark.parametrize("name", MODELS)
def test_prefill_and_decode_give_the_logits_of_training(name):
    description, params = build(MODELS[name])
    model = description.bind(params)
    tokens_BT = np.random.default_rng(0).integers(0, 61, (3, 16), np.int32)
    lengths_B = np.array([5, 16, 1], np.int32)
    position_B = np.minimum(lengths_B, 15)  # the full row rewrites its last token

    @jax.jit
    def both(model):
        expected = model.logits(model(tokens_BT)[0])
        first_BV, cache = prefill(model, tokens_BT, lengths_B, make_cache(description.config, 3, 20))
        second_BV, _ = decode(model, tokens_BT[np.arange(3), position_B], position_B, cache)
        return expected, first_BV, second_BV

    expected_BTV, first_BV, second_BV = both(model)
    for row, (length, position) in enumerate(zip(lengths_B, position_B, strict=True)):
        np.testing.assert_allclose(first_BV[row], expected_BTV[row, length - 1], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(second_BV[row], expected_BTV[row, position], rtol=1e-5, atol=1e-5)


def test_a_text_does_not_depend_on_the_batch():
    description, params = build(BASE)
    together = generate(description, params, PROMPTS, SAMPLED)
    assert generate(description, params, PROMPTS[::-1], SAMPLED) == together[::-1]
    for prompt, text in zip(PROMPTS, together, strict=True):
        assert generate(description, params, [prompt], SAMPLED) == [text]


def test_seeds_and_repeated_prompts_give_other_texts():
    description, params = build(BASE)
    prompt = PROMPTS[0]
    first, second, *_ = generate(description, params, [prompt] * 4, SAMPLED)  # four, as in the programs of other tests
    assert first != second
    assert generate(description, params, [prompt], SAMPLED) == [first]
    assert generate(description, params, [prompt], replace(SAMPLED, seed=8)) != [first]
    greedy = generate(description, params, [prompt] * 4, GREEDY)
    assert greedy == [greedy[0]] * 4


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("rotary-gqa", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("learned-bias-layernorm", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("windows", {"fsdp": 2, "tensor": 4}),  # one kv head for four tensor shards
        ("qknorm-softcaps-untied", {"fsdp": 8}),
    ],
)
def test_a_mesh_gives_the_text_of_one_device(name, sizes):
    config = MODELS[name]
    description, params = build(config)
    expected = generate(description, params, PROMPTS, SAMPLED)
    mesh = make_mesh({axis: sizes.get(axis, 1) for axis in AXES}, jax.devices())
    with jax.set_mesh(mesh):
        description = describe(config)
        sharded = jax.device_put(params, description.shardings(mesh))
        assert generate(description, sharded, PROMPTS, SAMPLED) == expected


def test_a_row_ends_before_its_end_of_document():
    description, params = build(BASE)
    free = generate(description, params, PROMPTS, GREEDY)
    eos = free[0][4]  # some row draws it
    ended = generate(description, params, PROMPTS, GREEDY, eos_id=eos)
    assert ended == [text[: text.index(eos)] if eos in text else text for text in free]
    assert len(ended[0]) < len(free[0])


def test_the_loop_stops_when_every_row_has_ended(monkeypatch):
    description, params = build(BASE)
    steps = []

    def counted(model, tokens_B, *rest):
        jax.debug.callback(lambda _: steps.append(1), tokens_B)
        return decode(model, tokens_B, *rest)

    monkeypatch.setattr(module, "decode", counted)
    sample = replace(GREEDY, tokens=9)  # as nowhere else, so that the program is traced here
    free = generate(description, params, PROMPTS[:1], sample)[0]
    jax.effects_barrier()
    assert len(steps) == sample.tokens - 1  # the prompt gives the first token
    steps.clear()
    generate(description, params, PROMPTS[:1], sample, eos_id=free[3])
    jax.effects_barrier()
    assert len(steps) == free.index(free[3])


def test_prompts_of_one_bucket_share_a_program():
    (description, params), sample = build(BASE), replace(SAMPLED, tokens=2)
    generate(description, params, [[1] * 3], sample)
    compiled = module._generate._cache_size()
    for other, prompt in [(sample, [2] * 16), (replace(sample, seed=9), [1]), (replace(sample, prompts=()), [1])]:
        generate(describe(BASE), params, [prompt], other, eos_id=5)
    assert module._generate._cache_size() == compiled
    generate(description, params, [[1] * 17], sample)
    assert module._generate._cache_size() == compiled + 1


def test_an_empty_prompt_starts_a_document():
    description, params = build(BASE)
    assert generate(description, params, [[]], GREEDY, eos_id=60) == generate(
        description, params, [[60]], GREEDY, eos_id=60
    )
    with pytest.raises(ValueError, match="an empty prompt needs an end-of-document token"):
        generate(description, params, [[1], []], GREEDY)


def test_nothing_asked_is_nothing_given():
    description, params = build(BASE)
    assert generate(description, params, [], GREEDY) == []
    assert generate(description, params, PROMPTS, replace(GREEDY, tokens=0)) == [[], [], [], []]


def test_learned_positions_are_filled_to_the_last_and_no_further():
    config = replace(MODELS["learned-bias-layernorm"], max_positions=22)
    description, params = build(config)
    sample, prompt = replace(GREEDY, tokens=3), PROMPTS[0]
    assert generate(description, params, [prompt], sample) == without_cache(description, params, [prompt], sample)
    with pytest.raises(ValueError, match=r"19 prompt tokens \+ 4 new ones = 23 are more than the model's 22"):
        generate(description, params, [prompt], replace(sample, tokens=4))


def test_what_cannot_be_generated_from_is_told():
    description, params = build(BASE)
    with pytest.raises(ValueError, match="token 61 of a prompt is outside of the vocabulary, 0 to 60"):
        generate(description, params, [[3], [4, 61]], GREEDY)
    encoder = describe(replace(BASE, causal=False))
    with pytest.raises(ValueError, match="an encoder does not generate"):
        generate(encoder, params, PROMPTS, GREEDY)


def test_bfloat16_runs_and_repeats():
    description, params = build(BASE)
    texts = [generate(description, params, PROMPTS, SAMPLED, dtype="bfloat16") for _ in range(2)]
    assert texts[0] == texts[1]
    assert [len(text) for text in texts[0]] == [SAMPLED.tokens] * 4
