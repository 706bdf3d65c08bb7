"""What an artifact holds and what a step of it needs: tensors, operators, memory. Without torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from edge_runtime.protocol.artifact import OPTIMIZERS, Artifact, ValueSpec

BATCHES = (1, 8, 32, 128, 512)
_FLOAT = 4  # bytes
# Their output is the input under another shape: the runtime copies nothing.
_VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step. ``unknown``: values whose size cannot be told before it runs, so not counted."""

    activations: int
    vectors: Mapping[str, int]
    unknown: int = 0

    def total(self, optimizer: str) -> int:
        """``optimizer``: a family of OPTIMIZERS."""
        return self.activations + self.vectors[optimizer]


def operators(artifact: Artifact) -> dict[str, Counter[str]]:
    """{graph file: how often each operator is in it}."""
    return {
        name: Counter(node.op_type for node in onnx.ModelProto.FromString(content).graph.node)
        for name, content in artifact.files.items()
        if name.endswith(".onnx")
    }


def step_memory(artifact: Artifact, batch: int) -> Memory:
    """Of one fused step at a batch size: the most that is alive at once, and the vectors of a session.

    An estimate: the runtime may write in place, and adds its own buffers; the process comes on top.
    """
    d, p = artifact.manifest.parameter_count, artifact.manifest.trainable_count
    vectors = {  # each twice: a step reads one and writes the other
        name: 2 * _FLOAT * (d + p * len(state)) for name, state in OPTIMIZERS.items()
    }
    model = onnx.ModelProto.FromString(artifact.files["step_sgd.onnx"])
    activations, unknown = _peak(model.graph, _sizes(model, batch))
    return Memory(activations, vectors, unknown)


def _sizes(model: onnx.ModelProto, batch: int) -> dict[str, int]:
    """Bytes of each value at this batch size, where it can be told; ``model`` is changed."""
    for value in (*model.graph.input, *model.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_value = batch
    while True:
        types = _types(model)
        if not _fold(model.graph, types):
            break
    return {
        name: helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize * math.prod(shape)
        for name, kind in types.items()
        if (shape := _shape(kind)) is not None
    }


def _types(model: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    inferred = shape_inference.infer_shapes(model, data_prop=True).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    return {value.name: value.type.tensor_type for value in values}


def _shape(kind: onnx.TypeProto.Tensor) -> list[int] | None:
    if not kind.HasField("shape") or not all(size.HasField("dim_value") for size in kind.shape.dim):
        return None
    return [size.dim_value for size in kind.shape.dim]


def _fold(graph: onnx.GraphProto, types: Mapping[str, onnx.TypeProto.Tensor]) -> bool:
    """Makes constants of the sizes that the graph computes: shape inference alone does not follow them all."""
    known = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if _small(tensor.dims)
    }
    kept = []
    for node in graph.node:
        result = _size_value(node, known, types)
        if result is None:
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
        else:
            known[node.output[0]] = result
            graph.initializer.append(numpy_helper.from_array(result, node.output[0]))
    folded = len(kept) < len(graph.node)
    del graph.node[:]
    graph.node.extend(kept)
    return folded


def _size_value(
    node: onnx.NodeProto, known: Mapping[str, Any], types: Mapping[str, onnx.TypeProto.Tensor]
) -> npt.NDArray[Any] | None:
    """What a node computes if that is a few integers made of sizes and constants."""
    if not node.input or len(node.output) != 1:
        return None
    operands: dict[str, Any] = {name: known[name] for name in node.input if name in known}
    if node.op_type in ("Shape", "Size"):
        source = types.get(node.input[0])
        shape = _shape(source) if source is not None else None
        if shape is None:
            return None
        operands = {node.input[0]: np.broadcast_to(np.int64(0), shape)}
    if len(operands) < len(set(node.input)) or any(
        array.dtype.kind not in "iu" for array in operands.values()
    ):
        return None
    results: Any = ReferenceEvaluator(node).run(None, operands)
    result = np.asarray(results[0])
    return result if result.dtype.kind in "iu" and _small(result.shape) else None


def _small(shape: Sequence[int]) -> bool:
    return math.prod(shape) <= 64


def _peak(graph: onnx.GraphProto, sizes: Mapping[str, int]) -> tuple[int, int]:
    """The most bytes alive at once, node after node, and how many values have no known size.

    A value lives from its node to its last use. Vectors and scalars that the host holds are not counted: inputs and
    outputs of the graph but for the batch.
    """
    constants = {tensor.name for tensor in graph.initializer}
    held = {value.name for value in graph.output} | constants
    held |= {value.name for value in graph.input if not value.type.tensor_type.shape.dim}
    held |= {name for state in OPTIMIZERS.values() for name in state} | {"theta"}
    owner: dict[str, str] = {}  # of a view: the value whose memory it is
    last: dict[str, int] = {}
    for i, node in enumerate(graph.node):
        for name in node.input:
            last[owner.get(name, name)] = i
        if node.op_type in _VIEWS:
            owner[node.output[0]] = owner.get(node.input[0], node.input[0])
    alive = {value.name for value in graph.input} - held
    now = peak = sum(sizes.get(name, 0) for name in alive)
    unknown = 0
    for i, node in enumerate(graph.node):
        made = [name for name in node.output if name and name not in owner and name not in held]
        unknown += sum(name not in sizes for name in made)
        alive.update(made)
        now += sum(sizes.get(name, 0) for name in made)
        peak = max(peak, now)
        for name in {owner.get(name, name) for name in (*node.input, *made)} & alive:
            if last.get(name, i) <= i:
                alive.remove(name)
                now -= sizes.get(name, 0)
    return peak, unknown


def describe(artifact: Artifact, batches: Sequence[int] = BATCHES) -> dict[str, Any]:
    """All of it as one document for JSON: sizes in bytes, shapes of one sample, memory by batch size."""
    manifest = artifact.manifest
    memory = {batch: step_memory(artifact, batch) for batch in batches}
    first_buffer = len(manifest.parameters) - manifest.buffers
    return {
        "name": manifest.name,
        "digest": artifact.digest.hex(),
        "opset": manifest.opset,
        "loss": manifest.loss,
        "dropout": manifest.dropout,
        "parameters": manifest.parameter_count,
        "trainable": manifest.trainable_count,
        "tensors": [
            {
                "name": spec.name,
                "shape": list(spec.shape),
                "count": spec.size,
                "kind": "trainable" if i < first_buffer else "buffer",
            }
            for i, spec in enumerate(manifest.parameters)
        ],
        "inputs": [_value(spec) for spec in manifest.inputs],
        "target": {**_value(manifest.target), "classes": manifest.target.classes},
        "outputs": [_value(spec) for spec in manifest.outputs],
        "graphs": {
            name: {"bytes": len(artifact.files[name]), "operators": dict(sorted(counts.items()))}
            for name, counts in sorted(operators(artifact).items())
        },
        "memory": [
            {
                "batch": batch,
                "activations": found.activations,
                "unknown_values": found.unknown,
                **{f"total_{optimizer}": found.total(optimizer) for optimizer in sorted(OPTIMIZERS)},
            }
            for batch, found in memory.items()
        ],
    }


def _value(spec: ValueSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}
