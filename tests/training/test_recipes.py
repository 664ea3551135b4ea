"""Published laws: the numbers that their papers print, and what the config makes of them."""

import math

import pytest

from config import compose
from model.config import ModelConfig
from model.counts import parameter_count
from training import recipes

# DeepSeek LLM 7B and 67B (arXiv 2401.02954, table 2): 2e12 tokens, sequences of 4096
DEEPSEEK_7B = ModelConfig(
    layers=30, width=4096, heads=32, kv_heads=32, head_dim=128, ffn=11008, vocab_size=102400, tied_embeddings=False
)


def test_deepseek_gives_the_settings_of_its_7b():
    """4.2e-4 and 2304 sequences; its M, with 72 L d^2, is within 2% of ours, which counts the real ffn."""
    m = recipes.deepseek_flops_per_token(DEEPSEEK_7B, 4096)
    assert m == pytest.approx(72 * 30 * 4096**2 + 12 * 30 * 4096 * 4096, rel=0.02)
    assert recipes.deepseek_lr(m * 2e12) == pytest.approx(4.2e-4, rel=0.02)
    assert recipes.deepseek_batch(m * 2e12) / 4096 == pytest.approx(2304, rel=0.04)


def test_step_law_and_power_lines_are_their_formulas():
    # 1.07e9 parameters without tables on 1e11 tokens
    assert recipes.step_law_lr(1.07e9, 1e11) == pytest.approx(1.79 * 10 ** (-0.713 * math.log10(1.07e9) + 0.307 * 11))
    assert recipes.step_law_lr(1.07e9, 1e11) == pytest.approx(1.556e-3, rel=0.01)
    assert recipes.step_law_batch(1e11) == pytest.approx(1.108e6, rel=0.01)
    assert recipes.power_lines_timescale(20) == pytest.approx(0.2235, rel=0.01)
    assert recipes.power_lines_batch(1e11) / 2048 == pytest.approx(499, rel=0.01)
    assert recipes.critical_batch(1e11) / 2048 == pytest.approx(5691, rel=0.01)
    decay = recipes.power_lines_weight_decay(lr=1e-3, batch=1e6, n=1e9, d=2e10)
    assert 1e6 / (1e-3 * decay * 2e10) == pytest.approx(recipes.power_lines_timescale(20))


@pytest.mark.parametrize("law", recipes.LAWS["train", "batch_size"])
def test_a_batch_is_what_its_law_says_of_the_run_that_it_makes(law):
    model, steps, seq_len = ModelConfig(vocab_size=256), 20000, 64
    batch = recipes.batch_size(law, model, steps, seq_len, multiple=3)
    d = float(steps * batch * seq_len)
    said = {
        "step_law": recipes.step_law_batch(d),
        "deepseek": recipes.deepseek_batch(d * recipes.deepseek_flops_per_token(model, seq_len)),
        "power_lines": recipes.power_lines_batch(d),
        "critical": recipes.critical_batch(d),
    }[law]
    assert batch % 3 == 0
    assert math.log2(batch // 3).is_integer()
    assert 2**-0.51 < said / (batch * seq_len) < 2**0.51


def test_a_config_holds_the_numbers():
    laws = ["train.batch_size=step_law", "optimizer.lr=step_law", "optimizer.weight_decay=power_lines"]
    made = compose.load([*laws, "train.steps=20000"])
    t, o, counts = made.train, made.optimizer, parameter_count(made.model)
    d = t.steps * t.batch_size * t.seq_len
    assert t.batch_size == recipes.batch_size("step_law", made.model, t.steps, t.seq_len, 1)
    assert o.lr == pytest.approx(recipes.step_law_lr(counts.layers, d))
    timescale = t.batch_size * t.seq_len / (o.lr * o.weight_decay * d)
    assert timescale == pytest.approx(recipes.power_lines_timescale(d / counts.total))
    assert "step_law" not in compose.to_yaml(made)
    numbers = [
        f"train.batch_size={t.batch_size}",
        f"optimizer.lr={o.lr!r}",
        f"optimizer.weight_decay={o.weight_decay!r}",
    ]
    assert compose.load([*numbers, "train.steps=20000"]) == made
    assert compose.load(["optimizer.lr=deepseek"]).optimizer.lr != compose.load(["optimizer.lr=step_law"]).optimizer.lr


def test_batches_divide_whatever_the_accumulation():
    made = compose.load(["train.batch_size=deepseek", "train.grad_accumulation=3", "optimizer.lr=deepseek"])
    assert made.train.batch_size % 3 == 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.lr=kaplan"], "optimizer.lr=kaplan is not one of a number, step_law, deepseek"),
        (["train.batch_size=many"], "train.batch_size=many is not one of a number, step_law"),
        (["optimizer.lr=step_law", "model.parametrization=mup"], "use one of the two"),
        (["optimizer.lr=step_law", "optimizer=lion"], "fitted for AdamW"),
        (["optimizer.lr=0", "optimizer.weight_decay=power_lines"], "divides by optimizer.lr=0"),
    ],
)
def test_mistakes_are_told(overrides, words):
    with pytest.raises(ValueError, match=words):
        compose.load(overrides)
