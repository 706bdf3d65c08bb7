"""A whole artifact in a page, made without torch: y = dropout(x) . weight; its buffer is a running mean of x."""

from __future__ import annotations

import numpy as np

from edge_runtime.protocol.artifact import (
    FILES,
    OPTIMIZERS,
    PARAMETERS_FILE,
    Artifact,
    ArtifactManifest,
    FileEntry,
    TargetSpec,
    ValueSpec,
)
from edge_runtime.protocol.ids import sha256
from edge_runtime.protocol.tensors import layout, vector_to_bytes
from model_export.autodiff.builder import Builder
from model_export.dropout import SEED, write_mask
from model_export.graph import OPSET, Graph, ValueType, to_bytes
from model_export.optimizers import SCALAR, optimizer_inputs, update
from model_export.passes import tidy

P, D = 4, 5
DROPPED, DECAY = 0.5, 0.9  # of the features; of the running mean

_FLOAT = np.dtype(np.float32)
_HEAD, _THETA = ValueType(_FLOAT, (P,)), ValueType(_FLOAT, (D,))
_SEED = ValueType(np.dtype(np.int64), ())
_X, _Y = ValueType(_FLOAT, ("batch", P)), ValueType(_FLOAT, ("batch", 1))


def tiny_artifact() -> Artifact:
    """theta: weight (4,), running_mean (1,); x float32 (batch, 4), y float32 (batch, 1), mean squared error."""
    graphs = {
        "grad.onnx": _grad(),
        "eval.onnx": _evaluation(),
        "infer.onnx": _inference(),
        **{f"step_{optimizer}.onnx": _step(optimizer) for optimizer in OPTIMIZERS},
        **{f"apply_{optimizer}.onnx": _apply(optimizer) for optimizer in OPTIMIZERS},
    }
    files = {name: to_bytes(tidy(graph)) for name, graph in graphs.items()}
    files[PARAMETERS_FILE] = vector_to_bytes(np.linspace(-1, 1, D, dtype=np.float32))
    manifest = ArtifactManifest(
        name="tiny",
        opset=OPSET,
        parameters=layout([("weight", (P,)), ("running_mean", (1,))]),
        inputs=(ValueSpec("x", "float32", (P,)),),
        target=TargetSpec("y", "float32", (1,)),
        outputs=(ValueSpec("output", "float32", (1,)),),
        loss="mse",
        buffers=1,
        dropout=True,
        files={name: FileEntry(sha256(files[name]), len(files[name])) for name in FILES},
    )
    return Artifact(manifest, files)


def _split(b: Builder, vector: str) -> list[str]:
    """Its head (4,) and its tail (1,)."""
    return b.ops("Split", vector, b.ints(P, D - P), outputs=2, axis=0)


def _error(b: Builder, features: str, weight: str) -> str:
    """Writes output and %loss."""
    output = b.named("output", "MatMul", features, b.op("Reshape", weight, b.ints(P, 1)))
    error = b.op("Sub", output, "y")
    b.named("%loss", "ReduceMean", b.op("Mul", error, error), keepdims=0)
    return error


def _training(b: Builder) -> tuple[str, str, str, str]:
    """Writes %loss; names weight, its gradient, the running mean and its change."""
    weight, mean = _split(b, "theta")
    kept = b.op("Mul", "x", write_mask(b, 0, DROPPED, b.op("Shape", "x")))
    product = b.op("Mul", kept, _error(b, kept, weight))
    gradient = b.op("Mul", b.op("ReduceMean", product, b.ints(0), keepdims=0), 2.0)
    of_batch = b.op("Reshape", b.op("ReduceMean", "x", keepdims=0), b.ints(1))
    return weight, gradient, mean, b.op("Mul", b.op("Sub", of_batch, mean), 1 - DECAY)


def _step(optimizer: str) -> Graph:
    graph = Graph({"theta": _THETA, "x": _X, "y": _Y, SEED: _SEED, **optimizer_inputs(optimizer, _HEAD)}, {})
    b = Builder(graph)
    weight, gradient, mean, change = _training(b)
    new = update(b, optimizer, weight, gradient, _HEAD)
    b.named("loss", "Identity", "%loss")
    b.named("new_theta", "Concat", new.parameters, b.op("Add", mean, change), axis=0)
    graph.outputs = {"loss": SCALAR, "new_theta": _THETA, **new.outputs}
    return graph


def _grad() -> Graph:
    inputs = {"theta": _THETA, "accumulator": _THETA, "x": _X, "y": _Y, "scale": SCALAR, SEED: _SEED}
    graph = Graph(inputs, {})
    b = Builder(graph)
    _, gradient, _, change = _training(b)
    b.named("loss", "Mul", "%loss", "scale")
    scaled = b.op("Mul", b.op("Concat", gradient, change, axis=0), "scale")
    b.named("new_accumulator", "Add", "accumulator", scaled)
    graph.outputs = {"loss": SCALAR, "new_accumulator": _THETA}
    return graph


def _apply(optimizer: str) -> Graph:
    graph = Graph({"theta": _THETA, "gradient": _THETA, **optimizer_inputs(optimizer, _HEAD)}, {})
    b = Builder(graph)
    weight, mean = _split(b, "theta")
    gradient, change = _split(b, "gradient")
    new = update(b, optimizer, weight, gradient, _HEAD)
    b.named("new_theta", "Concat", new.parameters, b.op("Add", mean, change), axis=0)
    graph.outputs = {"new_theta": _THETA, **new.outputs}
    return graph


def _evaluation() -> Graph:
    graph = Graph({"theta": _THETA, "x": _X, "y": _Y}, {})
    b = Builder(graph)
    _error(b, "x", _split(b, "theta")[0])
    b.named("loss", "Identity", "%loss")
    graph.outputs = {"loss": SCALAR, "output": _Y}
    return graph


def _inference() -> Graph:
    graph = _evaluation()
    del graph.inputs["y"], graph.outputs["loss"]
    return graph
