"""Adapters in peft's files against peft itself: what it saved gives its logits here, and what is saved here, there."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tokenizers
import torch
from tokenizers.models import WordLevel

from finetune.__main__ import main
from finetune.options import parse
from inference.opening import find_model
from tests.checkpoint.huggingface.configurations import VOCABULARY
from tests.golden.make_huggingface import made

TOKENS_BT = np.random.default_rng(0).integers(0, VOCABULARY, (2, 24)).astype(np.int32)
LLAMA = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
CASES = {
    "lora": ("llama", peft.LoraConfig(r=4, lora_alpha=12, target_modules=LLAMA)),
    "rslora": ("qwen2", peft.LoraConfig(r=6, lora_alpha=5, use_rslora=True, target_modules=["k_proj", "gate_proj"])),
    "dora": ("llama", peft.LoraConfig(r=4, use_dora=True, target_modules=LLAMA)),
    "ranks by pattern": (
        "gemma2",
        peft.LoraConfig(r=4, rank_pattern={"q_proj": 7}, alpha_pattern={"v_proj": 3}, target_modules=LLAMA),
    ),
    "some layers": ("llama", peft.LoraConfig(r=2, target_modules=LLAMA, layers_to_transform=[1])),
    "dora in some layers": (
        "llama",
        peft.LoraConfig(r=2, use_dora=True, target_modules=LLAMA, layers_to_transform=[1]),
    ),
    "alphas by pattern": (
        "llama",
        peft.LoraConfig(r=4, alpha_pattern={r"layers\.0\..*q_proj": 24, "q_proj": 3}, target_modules=LLAMA),
    ),
    "fused": ("gpt2", peft.LoraConfig(r=4, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)),
    "ia3": (
        "llama",
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
}


def saved(family: str, config: peft.PeftConfig, folder: Path) -> tuple[torch.nn.Module, np.ndarray]:
    """A random base and a random adapter on it, both saved; the logits with it."""
    base = made(family, 3)
    base.save_pretrained(folder / "base")
    words = WordLevel({"</s>": 0, **{str(token): token for token in range(1, VOCABULARY)}}, unk_token="</s>")
    tokenizers.Tokenizer(words).save(str(folder / "base" / "tokenizer.json"))
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    model.save_pretrained(folder / "adapter")
    return model, theirs(model)


def theirs(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS_BT).long()).logits.numpy()


HERE = ["runtime.cpu_devices=8", "mesh.data=8", "mesh.fsdp=1"]  # the devices of tests/conftest.py


def ours(path: Path) -> np.ndarray:
    opened = find_model(path, HERE).open()
    with jax.set_mesh(opened.mesh):

        @jax.jit
        def run(params, tokens_BT):
            model = opened.description.bind(params)
            return model.logits(model(tokens_BT, dtype=jnp.float32)[0])

        with jax.default_matmul_precision("float32"):
            return np.asarray(run(opened.params, jnp.asarray(TOKENS_BT)))[..., :VOCABULARY]


@pytest.mark.parametrize("case", CASES)
def test_in_and_out(case, tmp_path, capsys):
    family, config = CASES[case]
    _, logits = saved(family, config, tmp_path)
    arguments = ["import", str(tmp_path / "adapter"), str(tmp_path / "run"), "--base", str(tmp_path / "base")]
    assert main(parse([*arguments, *HERE])) == 0, capsys.readouterr().err
    error = np.abs(ours(tmp_path / "run") - logits).max() / np.abs(logits).max()
    print(f"{case}: in {error:.1e}")
    assert error < 1e-4
    # merged, it is a model like any other
    assert main(parse(["merge", str(tmp_path / "run"), str(tmp_path / "merged"), *HERE])) == 0
    error = np.abs(ours(tmp_path / "merged") - logits).max() / np.abs(logits).max()
    print(f"{case}: merged {error:.1e}")
    assert error < 1e-4
    code = main(parse(["export", str(tmp_path / "run"), str(tmp_path / "again"), *HERE]))
    if case == "fused":
        assert code == 2
        return
    assert code == 0, capsys.readouterr().err
    again = peft.PeftModel.from_pretrained(made(family, 3), tmp_path / "again")
    error = np.abs(theirs(again) - logits).max() / np.abs(logits).max()
    print(f"{case}: out {error:.1e}")
    assert error < 1e-4
