"""Fused attention kernels, interpreted or lowered for GPUs, do what the plain form does, and run where they can."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import PartitionSpec as P

from model import attention_kernels as module
from model.attention import attention
from model.attention_rule import TokenInfo
from parallel.mesh import AXES, make_mesh

B, T, N, K, H = 2, 256, 2, 1, 16
GENERATOR = np.random.default_rng(0)
ARRAYS = [GENERATOR.standard_normal((B, T, heads, H), np.float32) for heads in (N, K, K)]
SEGMENTS_BT = np.cumsum(GENERATOR.random((B, T)) < 5 / T, axis=1, dtype=np.int32)
CASES = {
    "causal": {},
    "documents": {"documents": True},
    "full, documents": {"causal": False, "documents": True},
    "window, documents": {"window": 100, "windows": (100,), "documents": True},
    "one of two windows": {"window": 100, "windows": (100, 0)},
    "other of two windows": {"window": 0, "windows": (0, 100)},
    "full, window": {"causal": False, "window": 70, "windows": (70,)},
    "soft-cap": {"softcap": 1.5},
}


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setattr(module, "INTERPRET", True)
    monkeypatch.setattr(module, "SPLASH_BLOCK", 128)  # so that there are tiles to skip


@pytest.fixture
def on(monkeypatch):
    """on(name): as if the devices were of this platform."""
    return lambda name: monkeypatch.setattr(module, "platform", lambda: name)


def on_mesh(**axes: int):
    return jax.set_mesh(make_mesh(dict.fromkeys(AXES, 1) | axes, jax.devices()[: int(np.prod(list(axes.values())))]))


def attend(kernel, *, documents=False, window=None, causal=True, in_order=True, **options):
    """A function of q, k, v."""
    segments_BT = jnp.asarray(SEGMENTS_BT) if documents else None
    info = TokenInfo(jnp.arange(T, dtype=jnp.int32)[None], segments_BT, context_style="ulysses", in_order=in_order)
    window = None if window is None else jnp.int32(window)
    options = {"causal": causal, "window": window, "kernel": kernel, "scale": 0.25} | options
    return lambda q, k, v: attention(q, k, v, info, info, **options)


def value_and_gradients(kernel, dtype=jnp.float32, **options) -> list[np.ndarray]:
    @jax.jit
    def run(*arrays):
        out, pull = jax.vjp(attend(kernel, **options), *arrays)
        return out, *pull(jnp.cos(out))

    return [np.asarray(x, np.float32) for x in run(*(jnp.asarray(x, dtype) for x in ARRAYS))]


def assert_close(ours, expected, tolerance):
    for a, b in zip(ours, expected, strict=True):
        assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("case", CASES)
def test_splash_equals_the_plain_form(case, on):
    on("tpu")
    assert_close(value_and_gradients("fused", **CASES[case]), value_and_gradients("plain", **CASES[case]), 1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_triton_equals_the_plain_form_for_documents(causal, on):
    on("gpu")
    exact = value_and_gradients("plain", causal=causal, documents=True)
    assert_close(value_and_gradients("fused", jnp.bfloat16, causal=causal, documents=True), exact, 0.01)


@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 2}, {"context": 2, "data": 2}], ids=str)
def test_each_device_runs_its_own_part(axes, on):
    """Also with whole sequences of some heads, as ulysses hands them out."""
    on("tpu")
    case = CASES["window, documents"]
    expected = value_and_gradients("plain", **case)
    with on_mesh(**axes):
        assert_close(value_and_gradients("fused", **case), expected, 1e-6)


def test_stages_of_a_pipeline_may_take_different_branches(on):
    on("tpu")

    def staged(kernel, axes):
        def stage(x):
            function = lambda x: attend(kernel)(x, x[:, :, :1], x[:, :, 1:])
            pulled = lambda x: jax.vjp(function, x)[1](jnp.sin(x))[0]
            return jax.lax.cond(jax.lax.axis_index("pipe") == 0, function, pulled, x[0])[None]

        with on_mesh(**axes):
            run = jax.shard_map(
                stage, in_specs=P("pipe", "data"), out_specs=P("pipe", "data"), axis_names={"pipe", "data"}
            )
            return np.asarray(jax.jit(run)(jnp.asarray(np.stack([ARRAYS[0], np.cos(ARRAYS[0])]))))

    assert_close([staged("fused", {"pipe": 2, "fsdp": 2})], [staged("plain", {"pipe": 2})], 1e-6)


@pytest.mark.parametrize(("remat", "kernels"), [("attention", 3), ("nothing", 4)])
def test_a_remat_policy_keeps_what_the_backward_kernels_read(remat, kernels, on):
    """Forward, and two kernels backward; without the policy forward runs once more."""
    on("tpu")
    policy = jax.checkpoint_policies.save_only_these_names(remat)
    function = jax.checkpoint(lambda *x: jnp.sin(attend("fused")(*x)).sum(), policy=policy)
    with on_mesh(fsdp=2):
        text = str(jax.make_jaxpr(jax.grad(function, argnums=(0, 1, 2)))(*ARRAYS))
    assert text.count("pallas_call[") == kernels


# ------------------------------------------------------------------------------------------------------------- cuDNN


def lowered_for_cuda(monkeypatch, **options) -> dict[str, dict]:
    """The configuration of each cuDNN call of value and gradients, by its name."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in ARRAYS)
    run = jax.jit(lambda *x: jax.vjp(attend("fused", **options), *x)[1](q))
    text = run.trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert f"{T}x{T}x" not in text  # no scores, no mask
    calls = re.findall(r'@__cudnn\$(\w+)\(.*?backend_config = "(.*?[^\\])"', text)
    return {name: json.loads(config.replace("\\22", '"'))["cudnn_fmha_backend_config"] for name, config in calls}


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 100, "windows": (100,)}], ids=str)
def test_cudnn_is_told_mask_scale_and_window(options, on, monkeypatch):
    on("gpu")
    calls = lowered_for_cuda(monkeypatch, **options)
    assert calls.keys() == {"fmhaSoftmax", "fmhaSoftmaxBackward"}
    for config in calls.values():
        assert config["mask_type"] == ("CAUSAL" if options.get("causal", True) else "NO_MASK")
        assert (config["fmha_scale"], config["sliding_window_length"]) == (0.25, options.get("window", 0))
        assert config["intermediate_tensor_shape"]["dimensions"] == [str(n) for n in (B, N, T, T)]


# ---------------------------------------------------------------------------------------------------------- the choice


def chosen(choice="auto", tokens=T, dtype=jnp.bfloat16, segments=None, head_dim=H, **case):
    case = module.Case(**{"causal": True, "windows": (0,), "scale": 1.0, "softcap": 0.0, "in_order": True} | case)
    q, k = (jax.ShapeDtypeStruct((B, tokens, heads, head_dim), dtype) for heads in (N, K))
    return module.choose(choice, case, q, k, segments)


LEFT = [  # what kernels do not cover, on which platform, and how it is said
    ("cpu", {}, "the platform cpu"),
    ("tpu", {"in_order": False}, "tokens with positions"),
    ("tpu", {"tokens": 200}, "200 tokens, not a multiple of 128"),
    ("gpu", {"in_order": False}, "tokens with positions"),
    ("gpu", {"dtype": jnp.float32}, "float32, not bfloat16 or float16"),
    ("gpu", {"head_dim": 256}, "heads of 256, not a multiple of 8 up to 128"),
    ("gpu", {"softcap": 20.0}, "a soft-cap"),
    ("gpu", {"windows": (9,), "causal": False}, "windows that look ahead"),
    ("gpu", {"windows": (9,), "segments": SEGMENTS_BT}, "packed documents with windows"),
    ("gpu", {"tokens": 200, "segments": SEGMENTS_BT}, "packed documents and 200 tokens, not a multiple of 128"),
]


@pytest.mark.parametrize(("name", "case", "said"), LEFT, ids=lambda x: str(x)[:20])
def test_what_no_kernel_covers_is_left_to_the_plain_form(name, case, said, on, caplog):
    on(name)
    module._tell_plain.cache_clear()
    assert [chosen("auto", **case) for _ in range(2)] == [None, None]
    expected = name != "cpu" and case.get("in_order", True)  # generation has always its plain form
    assert [said in record.getMessage() for record in caplog.records] == [True] * expected
    with pytest.raises(ValueError, match=f"model.attention_kernel=fused: no kernel covers {said}; use auto or plain"):
        chosen("fused", **case)


def test_a_window_that_all_tokens_fit_in_is_none(on):
    on("gpu")
    assert chosen(windows=(T, 0), segments=SEGMENTS_BT) is not None
    assert chosen(windows=(T - 1, 0), segments=SEGMENTS_BT) is None


def test_nothing_changes_on_cpus_or_when_it_is_switched_off(on):
    assert module.platform() == "cpu"
    assert chosen("auto") is None
    on("tpu")
    assert chosen("plain") is None


@pytest.mark.parametrize("unknown", [{"in_order": False}, {"window": 3}])
def test_order_and_windows_must_be_known(unknown, on):
    on("tpu")
    with pytest.raises(ValueError, match="tokens with positions"):
        jax.eval_shape(attend("fused", **unknown), *ARRAYS)
