"""Writes tests/golden/huggingface: small random models of every family as transformers saves them, with its logits.

Run from the checkout, in an environment with the packages of the extra `compare`:

python -m tests.golden.make_huggingface
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from checkpoint.huggingface.families import FAMILIES
from tests.checkpoint.huggingface.configurations import ENCODERS, VOCABULARY, configuration

FOLDER = Path(__file__).parent / "huggingface"
TOKENS = 20
SEEDS = {"llama": 3, "mistral": 1, "gemma3_text": 3, "phi3": 1}  # configurations that show most; others 0


def randomised(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The model with noise on every parameter, so that no bias is 0 and no scale 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise / (parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1))
    return model.eval()


def made(family: str, seed: int) -> torch.nn.Module:
    """A random model of a family."""
    torch.manual_seed(seed)
    maker = AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM
    return randomised(maker.from_config(AutoConfig.for_model(family, **configuration(family, seed))), seed)


def main() -> None:
    """Replaces the folder."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    tokens_BT = np.random.default_rng(0).integers(3, VOCABULARY, size=(2, TOKENS))
    for family in (family.model_type for family in FAMILIES):
        model = made(family, SEEDS.get(family, 0))
        model.save_pretrained(FOLDER / family)
        with torch.no_grad():
            logits = model(torch.tensor(tokens_BT)).logits.numpy()
        np.savez_compressed(FOLDER / family / "expected.npz", tokens_BT=tokens_BT.astype(np.int32), logits_BTV=logits)


if __name__ == "__main__":
    main()
