"""Routing, the experts' block against loops and DeepSeek-V3's own, capacity, auxiliary losses, balance by a bias."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.attention_rule import TokenInfo
from model.config import ModelConfig
from model.initialise import draw as draw_parameter
from model.moe import MixtureOfExperts, best, capacity_of, within_capacity
from model.specs import RandomKey, map_specs, mixture_of_experts
from model.transformer import describe
from tests.golden import draw
from training.config import OptimizerConfig, TrainConfig
from training.optimizer import make_optimizer
from training.step import balanced, gradients

REFERENCES = np.load(Path(__file__).parent.parent / "golden" / "references.npz")
B, T, D, E = 3, 10, 16, 8
CONFIG = ModelConfig(layers=2, width=D, heads=2, kv_heads=2, head_dim=8, ffn=12, vocab_size=40, experts=E)
KINDS = {
    "softmax": {},
    "not normalised": {"router_normalize": False, "experts_per_token": 3},
    "sigmoid, shared, scaled": {"router_scores": "sigmoid", "shared_experts": 2, "router_scale": 2.5},
    "two matrices": {"activation": "relu2", "experts_per_token": 1},
    "groups": {"router_groups": 4, "router_groups_per_token": 2, "experts_per_token": 3, "router_scores": "sigmoid"},
}


def block(**fields):
    """A config, the block's parameters, and the block as a function (parameters, x_BTD, positions_BT)."""
    config = replace(CONFIG, **fields)
    specs = mixture_of_experts(config, RandomKey())
    graphdef = nnx.graphdef(MixtureOfExperts(config, specs))
    params = map_specs(lambda spec: draw_parameter(spec, jax.random.key(1)), specs)
    positions_BT = jnp.arange(T)[None]

    def run(params, x_BTD, positions_BT=positions_BT, mask_BT=None):
        counted_B = None if mask_BT is None else mask_BT.sum(1)
        return nnx.merge(graphdef, params)(x_BTD, TokenInfo(positions_BT, mask_BT=mask_BT, counted_B=counted_B))

    return config, params, jax.jit(run)


def tokens_BTD(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((B, T, D), np.float32)


def scores_of(config: ModelConfig, params: dict, x: np.ndarray) -> np.ndarray:
    logits = x.astype(np.float64) @ np.asarray(params["router"]["weight"], np.float64)
    if config.router_scores == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def chosen_of(config: ModelConfig, scores_E: np.ndarray) -> list[int]:
    groups = scores_E.reshape(config.router_groups, -1)
    rank = np.argsort(-np.sort(groups, axis=1)[:, -2:].sum(1), kind="stable")
    is_open = np.isin(np.arange(config.router_groups), rank[: config.router_groups_per_token])
    ranked = np.where(is_open[:, None], groups, -np.inf).ravel()
    return np.argsort(-ranked, kind="stable")[: config.experts_per_token].tolist()


def feed(config: ModelConfig, x_D: np.ndarray, up, down, gate=None) -> np.ndarray:
    u = x_D @ up
    if gate is None:
        return np.maximum(u, 0) ** 2 @ down
    g = x_D @ gate
    return (u * g / (1 + np.exp(-g))) @ down


def loop(config: ModelConfig, params: dict, x: np.ndarray) -> np.ndarray:
    """The block token by token, with no drops."""
    matrices = [np.asarray(params[n]["weight"], np.float64) for n in ("up", "down", "gate") if n in params]
    scores, y = scores_of(config, params, x), np.zeros(x.shape)
    for b, t in np.ndindex(x.shape[:2]):
        chosen = chosen_of(config, scores[b, t])
        weights = scores[b, t, chosen] / (scores[b, t, chosen].sum() if config.router_normalize else 1)
        for e, w in zip(chosen, weights * config.router_scale, strict=True):
            y[b, t] += w * feed(config, x[b, t], *(m[e] for m in matrices))
        if config.shared_experts:
            shared = params["shared"]
            y[b, t] += feed(config, x[b, t], *(shared[name]["weight"] for name in ("up", "down", "gate")))
    return y


@pytest.mark.parametrize("kind", KINDS)
def test_block_equals_a_loop_over_tokens(kind):
    config, params, run = block(**KINDS[kind])
    y, sums = run(params, tokens_BTD())
    np.testing.assert_allclose(y, loop(config, params, tokens_BTD()), atol=2e-5)
    assert sums.tokens == B * T
    assert sums.load_E.sum() == B * T * config.experts_per_token
    assert sums.dropped == 0


def test_block_equals_that_of_deepseek_v3():
    """Sigmoid scores, a bias that only chooses, groups, normalised and scaled weights, shared experts."""
    fields = {"width": 32, "ffn": 16, "experts_per_token": 3, "shared_experts": 2, "router_scale": 2.5}
    groups = {"router_scores": "sigmoid", "router_groups": 4, "router_groups_per_token": 2, "balance_bias": 0.001}
    _, params, run = block(**fields, **groups)
    take = lambda name, *shape: draw.weight("deepseek_v3", name, shape)
    gate, up = np.split(take("experts.gate_up_proj", 8, 32, 32), 2, axis=1)
    turned = lambda w: np.swapaxes(w, -1, -2)
    theirs = {
        "router": {"weight": take("gate.weight", 8, 32).T, "balance_bias": take("gate.e_score_correction_bias", 8)},
        "gate": {"weight": turned(gate)},
        "up": {"weight": turned(up)},
        "down": {"weight": turned(take("experts.down_proj", 8, 32, 16))},
        "shared": {
            name: {"weight": take(f"shared_experts.{name}_proj.weight", 32, 32).T} for name in ("gate", "up", "down")
        },
    }
    assert jax.tree.map(np.shape, theirs) == jax.tree.map(np.shape, params)
    x, y = REFERENCES["deepseek_v3/x"], REFERENCES["deepseek_v3/y"]
    np.testing.assert_array_equal(x, take("x", 24, 32))
    np.testing.assert_allclose(run(theirs, x[None], jnp.arange(24)[None])[0][0], y, atol=2e-6, rtol=1e-5)


def test_best_breaks_ties_by_index():
    values = jnp.asarray([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(best(values, 3), [[1, 2, 4], [0, 1, 2]])


def test_weights_of_an_expert_do_not_depend_on_how_many_there_are():
    few, many = (block(experts=n)[1] for n in (4, 8))
    for name in ("gate", "up", "down"):
        np.testing.assert_array_equal(few[name]["weight"], many[name]["weight"][:4])
        assert len(np.unique(np.asarray(many[name]["weight"])[:, 0, 0])) == 8


# ------------------------------------------------------------------------------------------------------------ capacity


def test_capacity_takes_the_first_of_a_sequence():
    config, params, run = block(expert_capacity=0.5)
    capacity = capacity_of(config, T)
    assert capacity == 2  # ceil(0.5 * 10 * 2 / 8)
    x = tokens_BTD()
    y, sums = run(params, x)
    matrices = [params[name]["weight"] for name in ("up", "down", "gate")]
    scores, expected, dropped = scores_of(config, params, x), np.zeros(x.shape), 0
    for b in range(B):
        taken = np.zeros(E, int)
        for t in range(T):
            chosen = chosen_of(config, scores[b, t])
            for e in chosen:
                if taken[e] < capacity:
                    w = scores[b, t, e] / scores[b, t, chosen].sum()
                    expected[b, t] += w * feed(config, x[b, t], *(m[e] for m in matrices))
                    taken[e] += 1
                else:
                    dropped += 1
    assert dropped > 5
    assert sums.dropped == dropped
    np.testing.assert_allclose(y, expected, atol=2e-5)


def test_drops_follow_positions_not_storage():
    """Tokens stored in another order, as context parallelism does, lose the same assignments."""
    _, params, run = block(expert_capacity=0.5)
    order = np.random.default_rng(0).permutation(T)
    y, sums = run(params, tokens_BTD())
    stored, again = run(params, tokens_BTD()[:, order], jnp.asarray(order)[None])
    np.testing.assert_allclose(stored, y[:, order], atol=1e-6)
    assert sums.dropped == again.dropped > 0
    with_capacity = within_capacity(jnp.ones((1, T, 1), bool), jnp.asarray(order)[None], 4)
    np.testing.assert_array_equal(with_capacity[0, :, 0], order < 4)


# ---------------------------------------------------------------------------------------------------- auxiliary losses


def test_losses_by_their_formulas():
    config, params, run = block(balance_loss=0.3, router_z_loss=0.01, router_scores="sigmoid")
    x = tokens_BTD()
    scores = scores_of(config, params, x)
    share = scores / scores.sum(-1, keepdims=True)
    balance = 0.0
    for b in range(B):
        chosen = np.bincount(np.concatenate([chosen_of(config, s) for s in scores[b]]), minlength=E)
        f, p = chosen * E / (config.experts_per_token * T), share[b].mean(0)
        balance += T * (f * p).sum()
    logits = x @ np.asarray(params["router"]["weight"])
    z = (np.log(np.exp(logits).sum(-1)) ** 2).sum()
    sums = run(params, x)[1]
    np.testing.assert_allclose(sums.objective, 0.3 * balance + 0.01 * z, rtol=1e-5)
    np.testing.assert_allclose(sums.entropy, -(share * np.log(share)).sum(), rtol=1e-5)


def test_tokens_that_the_loss_leaves_out_have_no_auxiliary_losses():
    """By formula, sequence by sequence, with all but the counted tokens cut away; one sequence counts nowhere."""
    config, params, run = block(balance_loss=0.3, router_z_loss=0.01)
    x = tokens_BTD()
    mask = np.random.default_rng(1).integers(2, size=(B, T)).astype(np.float32)
    mask[1] = 0
    scores, logits = scores_of(config, params, x), x @ np.asarray(params["router"]["weight"])
    expected = 0.0
    for b in (0, 2):
        at = np.flatnonzero(mask[b])
        chosen = np.bincount(np.concatenate([chosen_of(config, s) for s in scores[b, at]]), minlength=E)
        f, p = chosen * E / (config.experts_per_token * len(at)), scores[b, at].mean(0)
        expected += 0.3 * len(at) * (f * p).sum() + 0.01 * (np.log(np.exp(logits[b, at]).sum(-1)) ** 2).sum()
    sums = run(params, x, mask_BT=jnp.asarray(mask))[1]
    np.testing.assert_allclose(sums.objective, expected, rtol=1e-5)
    gradient = jax.grad(lambda x: run(params, x, mask_BT=jnp.asarray(mask))[1].objective)(x)
    assert not np.asarray(gradient)[mask == 0].any()
    assert np.asarray(gradient)[mask == 1].any()
    unmasked, whole = run(params, x)[1], run(params, x, mask_BT=jnp.ones((B, T)))[1]
    jax.tree.map(np.testing.assert_array_equal, unmasked, whole)
    np.testing.assert_array_equal(sums.load_E, whole.load_E)  # experts work for all tokens


def test_sums_of_sequences_add_up():
    _, params, run = block(balance_loss=0.3, router_z_loss=0.01, expert_capacity=0.5)
    whole = run(params, tokens_BTD())[1]
    parts = [run(params, tokens_BTD()[b : b + 1])[1] for b in range(B)]
    total = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), total, whole)


def test_accumulation_does_not_change_gradients():
    config = replace(CONFIG, balance_loss=0.3, router_z_loss=0.01, expert_capacity=1.0)
    description = describe(config)
    params = description.init(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(40, size=(4, T), dtype=np.int32)
    batch = {"tokens_BT": tokens, "targets_BT": np.roll(tokens, -1, 1), "mask_BT": np.ones((4, T), np.float32)}
    run = lambda parts: gradients(description, TrainConfig(batch_size=4, grad_accumulation=parts), params, batch)
    whole, cut = (jax.jit(run, static_argnums=0)(parts) for parts in (1, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), whole, cut)
    assert whole[0].router.load_E.shape == (2, E)


# -------------------------------------------------------------------------------------------------------- balance bias


def test_bias_balances_without_touching_weights():
    """Vectors that all like the same experts are spread evenly after some hundred moves of the bias."""
    config, params, run = block(balance_bias=0.01, router_scores="sigmoid")
    x = np.random.default_rng(0).standard_normal((24, T, D), np.float32)
    x = x + 2 * np.asarray(params["router"]["weight"])[:, 0]  # all like expert 0
    load = lambda params: np.asarray(run(params, x)[1].load_E)
    before = load(params)
    assert before.max() > 3 * before.mean()
    for _ in range(150):
        layers = {"layers": {"moe": jax.tree.map(lambda p: p[None], params)}}
        moved = balanced(layers, jnp.asarray(load(params))[None], config.balance_bias)
        params = jax.tree.map(lambda p: p[0], moved["layers"]["moe"])
    after = load(params)
    assert after.max() < 1.2 * after.mean()
    bias = np.asarray(params["router"]["balance_bias"])
    np.testing.assert_allclose(bias / 0.01, np.round(bias / 0.01), atol=1e-3)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_optimizers_leave_the_bias_alone(name):
    """Its gradient is zero, and it does not decay."""
    config = replace(CONFIG, balance_bias=0.1)
    description = describe(config)
    params = description.init(jax.random.key(0))
    params["layers"]["moe"]["router"]["balance_bias"] += 0.25
    tokens = jnp.arange(2 * T, dtype=jnp.int32).reshape(2, T)
    batch = {"tokens_BT": tokens, "targets_BT": tokens, "mask_BT": jnp.ones((2, T))}
    optimizer = make_optimizer(OptimizerConfig(name=name), description.specs)

    @jax.jit
    def direction(params):
        grads = gradients(description, TrainConfig(), params, batch)[1]
        return optimizer.update(grads, optimizer.init(params), params)[0]

    router = direction(params)["layers"]["moe"]["router"]
    np.testing.assert_array_equal(router["balance_bias"], 0)
    assert np.abs(router["weight"]).max() > 1e-4


# -------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts_per_token": 9}, "experts_per_token=9 must be 1 to model.experts=8"),
        ({"router_groups": 3}, "does not divide model.experts=8; use 1, 2, 4, 8"),
        ({"router_groups": 4, "router_groups_per_token": 5}, "must be 1 to model.router_groups=4"),
        ({"router_groups": 4, "experts_per_token": 3}, "1 groups of 8 / 4 = 2 experts hold 2"),
        ({"balance_loss": -1.0}, "must be 0 (off) or more"),
        ({"bias": "all"}, "use none, qkv or attention"),
        ({"router_scores": "tanh"}, "not one of softmax, sigmoid"),
    ],
)
def test_mistakes_are_told(fields, message):
    with pytest.raises(ValueError) as error:
        replace(CONFIG, **fields)
    assert message in str(error.value)
