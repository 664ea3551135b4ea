"""Every kind of adapter on products of axes, and every axis under several kinds, trains as on one device."""

import pytest
from every import few_of
from meshes import assert_changes_nothing

KINDS = {
    "lora": ("adapter=lora",),
    "rslora": ("adapter=rslora", "adapter.rank=4"),
    "dora": ("adapter=dora",),
    "int8": ("adapter=lora", "adapter.base=int8"),
    "int4": ("adapter=lora", "adapter.base=int4", "adapter.group=8"),
    "nf4": ("adapter=qlora", "adapter.group=8"),
    "adalora": ("adapter=adalora", "adapter.begin=0"),
    "ia3": ("adapter=ia3",),
    "bottleneck": ("adapter=bottleneck", "adapter.size=8"),
    "prefix": ("adapter=prefix",),
    "freeze": ("adapter=freeze", "adapter.train=[layers/attention/*,final_norm/*]"),
}
MESHES = {
    "data x fsdp x tensor": ("llama", {"data": 2, "fsdp": 2, "tensor": 2}, ()),
    "stages": ("llama", {"pipe": 2, "fsdp": 2, "tensor": 2}, ("pipeline.schedule=1f1b",)),
    "context": ("gemma", {"context": 3, "fsdp": 2}, ()),
    "uneven stages": ("gpt2", {"pipe": 2, "tensor": 2}, ("pipeline.schedule=zero_bubble",)),
    "experts": ("moe", {"expert": 2, "fsdp": 2, "tensor": 2}, ()),
    "stages of experts": ("moe", {"pipe": 2, "expert": 4}, ("pipeline.schedule=zero_bubble",)),
}


# each kind on two meshes: so each mesh has three kinds or four
PAIRS = [(kind, list(MESHES)[(number + shift) % len(MESHES)]) for number, kind in enumerate(KINDS) for shift in (0, 3)]


FEW = [
    *(("dora", "context"), ("nf4", "stages of experts"), ("prefix", "data x fsdp x tensor")),
]


@pytest.mark.parametrize(("kind", "mesh"), few_of(PAIRS, FEW))
def test_a_mesh_changes_nothing(kind, mesh):
    model, sizes, how = MESHES[mesh]
    layers = ("model.layers=3",) if mesh == "uneven stages" else ()
    group = ("adapter.group=4", "model.head_dim=8") if "adapter.group=8" in KINDS[kind] else ()
    assert_changes_nothing(model, sizes, *how, extra=("optimizer=adamw", *layers, *KINDS[kind], *group))
