"""A standalone ONNX model through the one module that knows the runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edge_runtime.backends.base import BackendError
from edge_runtime.backends.ort import run_model

A, B = np.array([[1.0, 2.0]], np.float32), np.array([[10.0, 20.0]], np.float32)


def model() -> bytes:
    """a, b -> a - b, a * b; rows are free."""
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 2]) for name in "abde"}
    nodes = [helper.make_node("Sub", ["a", "b"], ["d"]), helper.make_node("Mul", ["a", "b"], ["e"])]
    graph = helper.make_graph(nodes, "g", [values["a"], values["b"]], [values["d"], values["e"]])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString())


def test_inputs_and_outputs_come_in_the_order_of_the_model() -> None:
    difference, product = run_model(model(), (A, B))
    np.testing.assert_array_equal(difference, A - B)
    np.testing.assert_array_equal(product, A * B)


def test_a_model_that_cannot_be_run_is_a_backend_error() -> None:
    with pytest.raises(BackendError, match=r"takes 2 inputs \(a, b\), 1 were given"):
        run_model(model(), (A,))
    with pytest.raises(BackendError, match="cannot load the model"):
        run_model(b"no model", (A,))
    with pytest.raises(BackendError, match="failed in the model"):
        run_model(model(), (A, B[:, :1, np.newaxis]))
