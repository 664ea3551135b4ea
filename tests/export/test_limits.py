"""What a target cannot hold of a family's model is told by the name of the setting, before any weight is read."""

import pytest

from checkpoint.huggingface.opened import open_pretrained
from export.limits import architecture_of, check_onnx
from tests.export.conftest import GOLDEN

LONG = "model.rope_scaling.kind=longrope"  # of different factors for short and long texts
# a family's golden model -> the setting that onnx and that gguf cannot hold; none where it is exported
REFUSED = {
    "bert": ("model.causal=False", "model.causal=False"),
    "distilbert": ("model.causal=False", "model.causal=False"),
    "gemma2": ("model.rope_scaling.kind=dynamic", "windows=5 of pattern LG"),
    "gemma3_text": ("model.rope_scaling.kind=dynamic", "windows=5 of pattern GGL"),
    "gpt2": (None, None),
    "gpt_neox": (None, "model.parallel_block=True"),
    "llama": (None, "as llama model.activation=geglu_exact"),
    "mistral": (LONG, "windows=5 of pattern L"),
    "mixtral": ("model.experts=4", "model.experts=4"),
    "olmo2": (LONG, "model.norm_position=output"),
    "phi3": (LONG, "windows=11 of pattern L"),
    "qwen2": (LONG, f"as llama {LONG}"),
    "qwen3": (None, "as qwen3 model.bias=attention"),
    "qwen3_moe": ("model.experts=6", "model.experts=6"),
    "roberta": ("model.causal=False", "model.causal=False"),
}


def test_every_family_is_here():
    assert set(REFUSED) == {path.name for path in GOLDEN.iterdir() if path.is_dir()}


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_held_is_named(family):
    config = open_pretrained(GOLDEN / family).config
    for target, check, setting in zip(("onnx", "gguf"), (check_onnx, architecture_of), REFUSED[family], strict=True):
        if setting is None:
            check(config)
            continue
        with pytest.raises(ValueError, match=f"^{target} cannot hold") as error:
            check(config)
        assert f"{setting} (known there: " in str(error.value)
