"""An ONNX graph as plain values: the passes and gradient rules work on this, never on protobuf."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper, shape_inference

from model_export.errors import UnsupportedModel

OPSET = 18
IR_VERSION = 9  # runtimes since 2023 load it

Array = npt.NDArray[Any]
Dimension = int | str | None  # str: a symbol such as "batch"; None: unknown
Shape = tuple[Dimension, ...]


@dataclass(frozen=True, slots=True)
class ValueType:
    """dtype and shape of a value."""

    dtype: np.dtype[Any]
    shape: Shape


@dataclass(slots=True)
class Node:
    """One operator of the domain ai.onnx; "" stands for an omitted input or output.

    ``module`` is the torch module it came from and ``torch_op`` the torch operator, for errors and
    for the few operators whose torch forms share an ONNX form but not a gradient; both may be empty.
    """

    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any] = field(default_factory=dict)
    module: str = ""
    torch_op: str = ""


@dataclass(slots=True)
class Graph:
    """Nodes in topological order. ``types`` covers inputs, outputs and what shape inference knows."""

    inputs: dict[str, ValueType]
    outputs: dict[str, ValueType]
    constants: dict[str, Array] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    types: dict[str, ValueType] = field(default_factory=dict)

    def copy(self) -> Graph:
        """A copy whose nodes and tables may be changed; constants are shared."""
        return Graph(
            dict(self.inputs),
            dict(self.outputs),
            dict(self.constants),
            [copy.deepcopy(node) for node in self.nodes],
            dict(self.types),
        )

    def names(self) -> Iterator[str]:
        """Every value's name, with repetitions."""
        yield from self.inputs
        yield from self.outputs
        yield from self.constants
        for node in self.nodes:
            yield from node.inputs
            yield from node.outputs

    def rename(self, names: Mapping[str, str]) -> None:
        """Renames values everywhere, at once (so names may be swapped)."""
        self.inputs = {names.get(name, name): kind for name, kind in self.inputs.items()}
        self.outputs = {names.get(name, name): kind for name, kind in self.outputs.items()}
        self.constants = {names.get(name, name): value for name, value in self.constants.items()}
        self.types = {names.get(name, name): kind for name, kind in self.types.items()}
        for node in self.nodes:
            node.inputs = [names.get(name, name) for name in node.inputs]
            node.outputs = [names.get(name, name) for name in node.outputs]


def from_proto(model: onnx.ModelProto) -> Graph:
    """Reads a model with one opset import, no functions and no subgraphs. Raises UnsupportedModel."""
    if model.functions:
        raise UnsupportedModel(
            f"the exported graph holds the function {model.functions[0].name}, which is not inlined"
        )
    proto = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.initializer}
    types = {
        value.name: _type(value)
        for value in (*proto.input, *proto.output, *proto.value_info)
        if value.type.HasField("tensor_type") and value.type.tensor_type.elem_type
    }
    nodes = []
    for node in proto.node:
        read = _node(node)
        if read.op == "Constant":
            constants[read.outputs[0]] = _constant_value(read)
        else:
            nodes.append(read)
    types.update({name: ValueType(value.dtype, value.shape) for name, value in constants.items()})
    return Graph(
        {value.name: types[value.name] for value in proto.input},
        {value.name: types[value.name] for value in proto.output},
        constants,
        nodes,
        types,
    )


def to_proto(graph: Graph) -> onnx.ModelProto:
    """The model without names, paths or versions of the programs that made it."""
    proto = helper.make_graph(
        [_make_node(node) for node in graph.nodes],
        "graph",
        [_value_info(name, kind) for name, kind in graph.inputs.items()],
        [_value_info(name, kind) for name, kind in graph.outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in graph.constants.items()],
    )
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def to_bytes(graph: Graph) -> bytes:
    """The same graph gives the same bytes. Raises UnsupportedModel if the graph is not valid ONNX: our bug."""
    model = to_proto(graph)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise UnsupportedModel(f"the graph made is not valid ONNX, please report this: {error}") from error
    return model.SerializeToString(deterministic=True)


def infer_types(graph: Graph) -> None:
    """Fills ``types`` by ONNX shape inference, constants propagated."""
    model = shape_inference.infer_shapes(to_proto(graph), data_prop=True)
    for value in (*model.graph.value_info, *model.graph.output):
        if value.type.tensor_type.elem_type:
            graph.types.setdefault(value.name, _type(value))


def _type(value: onnx.ValueInfoProto) -> ValueType:
    tensor = value.type.tensor_type
    shape = tuple(
        dimension.dim_value if dimension.HasField("dim_value") else (dimension.dim_param or None)
        for dimension in tensor.shape.dim
    )
    return ValueType(helper.tensor_dtype_to_np_dtype(tensor.elem_type), shape)


def _value_info(name: str, kind: ValueType) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(kind.dtype), kind.shape)


def _node(proto: onnx.NodeProto) -> Node:
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    if proto.domain:
        raise UnsupportedModel(
            f"the exported graph uses {proto.domain}.{proto.op_type}, no standard ONNX operator"
        )
    attributes: dict[str, Any] = {}
    for attribute in proto.attribute:
        if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
            raise UnsupportedModel(
                f"the model holds control flow ({proto.op_type}); write it without branches on tensor values"
            )
        value = helper.get_attribute_value(attribute)
        if isinstance(value, onnx.TensorProto):
            value = numpy_helper.to_array(value)
        elif isinstance(value, bytes):
            value = value.decode()
        elif not isinstance(value, int | float | str):
            value = list(value)
        attributes[attribute.name] = value
    return Node(
        proto.op_type,
        list(proto.input),
        list(proto.output),
        attributes,
        metadata.get("module", ""),
        metadata.get("torch_op", ""),
    )


def _make_node(node: Node) -> onnx.NodeProto:
    attributes: dict[str, Any] = {
        name: numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
        for name, value in sorted(node.attributes.items())
    }
    return helper.make_node(node.op, node.inputs, node.outputs, **attributes)


def _constant_value(node: Node) -> Array:
    ((kind, value),) = node.attributes.items()
    dtype = {"value_float": np.float32, "value_floats": np.float32}.get(kind, np.int64)
    return value if kind == "value" else np.asarray(value, dtype)
