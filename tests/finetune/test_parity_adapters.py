"""The mesh is no hyperparameter of adapters: with them a model trains on a product of axes as on one device.

More of them are in tests/long/test_adapters_on_meshes.py.
"""

import pytest
from every import few_of
from meshes import assert_changes_nothing

ADAM = ("optimizer=adamw",)
CASES = {
    "stages": ("llama", {"pipe": 2, "fsdp": 2, "tensor": 2}, ["pipeline.schedule=zero_bubble"], ["adapter=lora"]),
    "nf4": ("llama", {"fsdp": 2, "tensor": 2}, [], ["adapter=qlora", "adapter.group=8"]),
    "adalora": ("llama", {"data": 2, "fsdp": 2}, [], ["adapter=adalora", "adapter.begin=0", "adapter.targets=[ffn/*]"]),
}


@pytest.mark.parametrize("case", few_of(CASES, ["stages", "nf4"]))
def test_a_mesh_changes_nothing(case):
    model, mesh, how, adapter = CASES[case]
    assert_changes_nothing(model, mesh, *how, extra=(*ADAM, *adapter))
