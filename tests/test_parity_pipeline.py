"""Every schedule, alone and with every other axis, trains as one device does."""

import pytest
from every import few_of
from meshes import assert_changes_nothing

from parallel.pipeline import schedules

SIX = ("model.layers=6",)
# (model, mesh, overrides that must not matter, overrides of the model)
CASES = {
    "gpipe": ("llama", {"pipe": 2, "data": 2}, ["pipeline.schedule=gpipe"], ()),
    "1f1b": ("llama", {"pipe": 4, "data": 2}, ["pipeline.schedule=1f1b"], SIX),
    "interleaved": ("llama", {"pipe": 2, "fsdp": 2}, ["pipeline.schedule=interleaved", "pipeline.chunks=3"], SIX),
    "interleaved-uneven": ("llama", {"pipe": 2, "tensor": 2}, ["pipeline.schedule=interleaved"], SIX),
    "zero_bubble": ("llama", {"pipe": 2, "tensor": 2, "fsdp": 2}, ["pipeline.schedule=zero_bubble"], ()),
    "zero_bubble-uneven": ("llama", {"pipe": 4, "tensor": 2}, ["pipeline.schedule=zero_bubble"], SIX),
    "zero_bubble_v": ("llama", {"pipe": 2, "fsdp": 4}, ["pipeline.schedule=zero_bubble_v"], SIX),
    "one microbatch": ("llama", {"pipe": 2}, ["pipeline.microbatches=1"], ()),
    "six stages": ("llama", {"pipe": 6}, ["pipeline.schedule=zero_bubble", "pipeline.microbatches=3"], SIX),
    # two tables, learned positions, dropout, a vocabulary that nothing divides
    "tables": ("gpt2", {"pipe": 2, "data": 2, "tensor": 2}, ["pipeline.schedule=zero_bubble"], ()),
    "a stage of padding rows": ("llama", {"pipe": 2}, [], ("model.vocab_size=256", "model.vocab_multiple=512")),
    "remat": ("gpt2", {"pipe": 2, "fsdp": 2}, ["train.remat=full", "train.loss_chunk=4"], ()),
    "dots": ("gpt2", {"pipe": 2}, ["train.remat=dots", "pipeline.schedule=zero_bubble", "model.scan_layers=false"], ()),
    "unrolled": (
        "gpt2",
        {"pipe": 2, "fsdp": 2},
        ["train.remat=full", "pipeline.schedule=1f1b", "model.scan_layers=false"],
        (),
    ),
    # windows, packed documents, accumulation of pipelines
    "windows": ("gemma", {"pipe": 2, "tensor": 3}, ["pipeline.microbatches=2"], SIX),
    "accumulated": (
        "gemma",
        {"pipe": 2, "data": 3},
        ["pipeline.schedule=interleaved", "train.grad_accumulation=4"],
        SIX,
    ),
    "families": ("families", {"pipe": 2, "tensor": 2, "context": 2}, ["pipeline.schedule=zero_bubble"], ()),
    "expert": ("moe", {"pipe": 2, "expert": 4}, ["pipeline.schedule=zero_bubble"], ()),
    "expert, tensor": ("moe", {"pipe": 2, "expert": 2, "tensor": 2}, [], ()),
    "context": ("llama", {"pipe": 2, "context": 4}, ["pipeline.schedule=zero_bubble"], ()),
    "context, windows": ("gemma", {"pipe": 2, "context": 3}, [], ()),
    "ulysses": ("llama", {"pipe": 2, "context": 2, "data": 2}, ["context.style=ulysses"], ()),
    "gather": ("llama", {"pipe": 2, "context": 2, "tensor": 2}, ["context.style=gather"], ()),
}


FEW = ["interleaved-uneven", "zero_bubble_v", "remat", "unrolled", "expert, tensor", "context, windows"]
LONG = ["tables", "families"]


@pytest.mark.parametrize("case", few_of(CASES, FEW, LONG))
def test_pipeline_changes_nothing(case):
    model, mesh, how, extra = CASES[case]
    assert_changes_nothing(model, mesh, *how, extra=extra)


def test_users_own_table(tmp_path):
    """A table from a file, whose parts of the model lie on the stages in an order of its own."""
    schedules.write_csv(schedules.make("zero_bubble_v", 2, 6), tmp_path / "mine.csv")
    assert_changes_nothing("llama", {"pipe": 2, "data": 2}, f"pipeline.schedule={tmp_path}/mine.csv", extra=SIX)
