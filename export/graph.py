"""Nodes of an ONNX graph as they are added; what the decoder of export/decoder.py is spelled with."""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET, IR = 20, 10  # of September 2023: ONNX Runtime from 1.17 on


class Graph:
    """A graph that grows. Values are named by texts; a weight is one whose numbers are known."""

    def __init__(self):
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, onnx.TensorProto] = {}
        self._constants: dict[tuple, str] = {}

    def weight(self, name: str, array: np.ndarray) -> str:
        """A named array."""
        self._weights[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def ints(self, *numbers: int) -> str:
        """A vector of int64."""
        return self._constant(np.array(numbers, np.int64))

    def number(self, value: float) -> str:
        """A float32 scalar."""
        return self._constant(np.array(value, np.float32))

    def index(self, value: int) -> str:
        """An int64 scalar."""
        return self._constant(np.array(value, np.int64))

    def _constant(self, array: np.ndarray) -> str:
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self._constants:
            self._constants[key] = self.weight(f"constant_{len(self._constants)}", array)
        return self._constants[key]

    def add(self, op: str, *inputs: str, name: str | None = None, **attributes) -> str:
        """The value of an operator; `name` is that of an output of the graph."""
        name = name or f"{op}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def split(self, x: str, sizes: Sequence[int]) -> list[str]:
        """The last dim of x in parts of these sizes."""
        names = [f"Split_{len(self._nodes)}_{part}" for part in range(len(sizes))]
        self._nodes.append(helper.make_node("Split", [x, self.ints(*sizes)], names, axis=-1))
        return names

    def reshape(self, x: str, *dims: int) -> str:
        """x in other dims: 0 is as it was, -1 what is left."""
        return self.add("Reshape", x, self.ints(*dims))

    def transpose(self, x: str, *order: int) -> str:
        """x with its dims in another order."""
        return self.add("Transpose", x, perm=list(order))

    def model(self, inputs: dict[str, tuple], outputs: dict[str, tuple]) -> onnx.ModelProto:
        """The whole graph. inputs and outputs: name -> (onnx.TensorProto type, dims), a dim a number or a name."""
        infos = [
            [helper.make_tensor_value_info(name, kind, dims) for name, (kind, dims) in values.items()]
            for values in (inputs, outputs)
        ]
        graph = helper.make_graph(self._nodes, "decoder", *infos, initializer=list(self._weights.values()))
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=IR, producer_name="isomesh")


FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
