"""What a user takes home: a model version as a standalone ONNX model and as an .npz of named arrays."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from edge_runtime.protocol.errors import Fault, FleetgradError
from edge_runtime.protocol.tensors import TensorSpec, Vector, unflatten


class ModelFileError(
    FleetgradError, fault=Fault.MODELLER, remedy="build the artifact again with `model-export build`"
):
    """The inference graph does not hold the parameters of its manifest."""


def publish_model(infer_onnx: bytes, specs: Sequence[TensorSpec], theta: Vector) -> bytes:
    """``infer.onnx`` with ``theta``, float32 of shape (d,), inside as initializers under their torch names.

    The input ``theta`` and the nodes that cut it up go; the result loads in stock onnxruntime and is a
    function of the arguments. Raises TensorError for a vector of another shape, ModelFileError.
    """
    try:
        model = onnx.ModelProto.FromString(infer_onnx)
    except DecodeError as error:
        raise ModelFileError("the inference graph does not parse: build the artifact again") from error
    graph = model.graph
    arrays = unflatten(specs, theta)
    used = {name for node in graph.node for name in node.input} & arrays.keys()
    # walking backwards, a node is needed if a later one uses what it makes; the cutting of theta no longer is
    needed = {value.name for value in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if needed.intersection(node.output) - arrays.keys():
            needed.update(node.input)
            nodes.append(node)
    if "theta" in needed:
        raise ModelFileError("the inference graph uses theta otherwise than by its named parameters")
    initializers = [tensor for tensor in graph.initializer if tensor.name in needed]
    initializers += [
        numpy_helper.from_array(np.ascontiguousarray(arrays[name]), name) for name in sorted(used)
    ]
    inputs = [value for value in graph.input if value.name != "theta"]
    published = onnx.helper.make_graph(nodes[::-1], graph.name, inputs, list(graph.output), initializers)
    result = onnx.helper.make_model(
        published, opset_imports=list(model.opset_import), ir_version=model.ir_version
    )
    return result.SerializeToString(deterministic=True)


def parameters_npz(specs: Sequence[TensorSpec], theta: Vector) -> bytes:
    """An .npz of float32 arrays by torch parameter name.

    It loads into the module with ``module.load_state_dict({k: torch.from_numpy(v) for k, v in npz.items()})``.
    Raises TensorError for a vector of another shape.
    """
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **unflatten(specs, theta))
    return buffer.getvalue()
