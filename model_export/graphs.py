"""The graphs of an artifact, made of the forward graph: all over one flat float32 vector theta (d,)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_runtime.protocol.artifact import OPTIMIZERS
from edge_runtime.protocol.tensors import TensorSpec, parameter_count
from model_export.autodiff import add_gradients
from model_export.autodiff.builder import Builder
from model_export.decompositions import decompose
from model_export.errors import UnsupportedModel
from model_export.forward import parameter_value
from model_export.graph import Graph, Node, ValueType, to_bytes
from model_export.optimizers import SCALAR, optimizer_inputs, update
from model_export.passes import tidy

_FLOAT = np.dtype(np.float32)


@dataclass(frozen=True)
class _Theta:
    """How theta is cut up: the tensors of ``specs``, of which the last ``buffers`` are no parameters."""

    specs: Sequence[TensorSpec]
    buffers: int

    @property
    def trained(self) -> Sequence[TensorSpec]:
        return self.specs[: len(self.specs) - self.buffers]

    @property
    def statistics(self) -> Sequence[TensorSpec]:
        return self.specs[len(self.specs) - self.buffers :]

    @property
    def vector(self) -> ValueType:
        """float32 (d,)."""
        return ValueType(_FLOAT, (parameter_count(self.specs),))

    @property
    def head(self) -> ValueType:
        """float32 (p,)."""
        return ValueType(_FLOAT, (parameter_count(self.trained),))

    def split(self, b: Builder, vector: str) -> tuple[str, str]:
        """The p trainable entries of a (d,) vector, and the rest: "" where there are no buffers."""
        if not self.buffers:
            return vector, ""
        p, d = parameter_count(self.trained), parameter_count(self.specs)
        head, tail = b.ops("Split", vector, b.ints(p, d - p), outputs=2, axis=0)
        return head, tail


def make_graphs(forward: Graph, specs: Sequence[TensorSpec], buffers: int = 0) -> dict[str, bytes]:
    """{file name: serialized model} of GRAPH_FILES. Raises MissingRule, UnsupportedModel.

    The last ``buffers`` of ``specs`` are running statistics. For each optimizer of OPTIMIZERS, with its <state> and
    <scalars> (optimizers.py):

    - ``step_<optimizer>``: theta, <state>, <inputs>, target, <scalars>, dropout_seed
      -> loss, grad_norm, new_theta, new_<state>
    - ``grad``: theta, accumulator, <inputs>, target, scale, dropout_seed -> loss (times scale), new_accumulator;
      to the accumulator's end it adds ``scale`` times the change of the buffers
    - ``apply_<optimizer>``: theta, gradient, <state>, <scalars> -> grad_norm, new_theta, new_<state>
    - ``eval``: theta, <inputs>, target -> loss, <outputs>; ``infer``: theta, <inputs> -> <outputs>

    In ``infer`` the pieces of theta bear their torch names, so that they can be exchanged for initializers.
    Vectors are float32 (d,), those of <state> (p,); loss, norm and scalars are float32 (); dropout_seed is int64
    (), and there only if the model drops something. Loss is the mean over the batch.
    """
    theta = _Theta(specs, buffers)
    graph, data, gradient, changed = _with_gradient(forward, theta)
    made = {
        "grad.onnx": _grad(graph.copy(), data, gradient, changed, theta),
        "eval.onnx": _evaluation(forward, theta),
        "infer.onnx": _inference(forward, theta),
    }
    for optimizer in OPTIMIZERS:
        made[f"step_{optimizer}.onnx"] = _step(graph.copy(), data, gradient, changed, theta, optimizer)
        made[f"apply_{optimizer}.onnx"] = _apply(theta, optimizer)
    torch_names = {spec.name for spec in specs}
    return {name: to_bytes(tidy(graph, torch_names)) for name, graph in made.items()}


def _over_theta(graph: Graph, theta: _Theta) -> dict[str, ValueType]:
    """Cuts the parameters of the graph out of an input ``theta``; returns the types of its other inputs."""
    specs = theta.specs
    parameters = {parameter_value(spec.name) for spec in specs}
    data = {name: kind for name, kind in graph.inputs.items() if name not in parameters}
    graph.inputs = {"theta": theta.vector, **data}
    prologue: list[Node] = []
    builder = Builder(graph, prologue)
    if len(specs) == 1:
        parts = ["theta"]
    else:
        parts = builder.ops(
            "Split", "theta", builder.ints(*(spec.size for spec in specs)), outputs=len(specs), axis=0
        )
    for spec, part in zip(specs, parts, strict=True):
        builder.named(parameter_value(spec.name), "Reshape", part, builder.ints(*spec.shape))
    graph.nodes = prologue + graph.nodes
    return data


def _with_gradient(forward: Graph, theta: _Theta) -> tuple[Graph, dict[str, ValueType], str, str]:
    """The training graph, its inputs besides theta, and the names of the gradient (p,) and the new buffers (b,).

    The last is "" where there are no buffers.
    """
    graph, changed = decompose(forward, training=True)
    data = _over_theta(graph, theta)
    gradients = add_gradients(graph, "loss", [parameter_value(spec.name) for spec in theta.trained])
    if missing := [spec.name for spec in theta.trained if parameter_value(spec.name) not in gradients]:
        raise UnsupportedModel(
            f"no gradient flows from the loss to {', '.join(missing[:10])}: "
            "use these parameters on a differentiable way to the loss, or remove them"
        )
    b = Builder(graph)
    parts = [gradients[parameter_value(spec.name)] for spec in theta.trained]
    buffers = [parameter_value(spec.name) for spec in theta.statistics]
    return graph, data, _joined(b, parts), _joined(b, [changed.get(name, name) for name in buffers])


def _joined(b: Builder, parts: Sequence[str]) -> str:
    flat = [b.op("Reshape", part, b.ints(-1)) for part in parts]
    return flat[0] if len(flat) == 1 else b.op("Concat", *flat, axis=0) if flat else ""


def _step(
    graph: Graph, data: dict[str, ValueType], gradient: str, buffers: str, theta: _Theta, optimizer: str
) -> Graph:
    b = Builder(graph)
    head, _ = theta.split(b, "theta")
    updated = update(b, optimizer, head, gradient, theta.head)
    _new_theta(b, updated.parameters, buffers)
    graph.inputs = {"theta": theta.vector, **data, **optimizer_inputs(optimizer, theta.head)}
    graph.outputs = {"loss": SCALAR, **updated.outputs, "new_theta": theta.vector}
    return graph


def _grad(graph: Graph, data: dict[str, ValueType], gradient: str, buffers: str, theta: _Theta) -> Graph:
    graph.rename({"loss": "%loss"})
    b = Builder(graph)
    b.named("loss", "Mul", "%loss", "scale")
    if buffers:
        _, tail = theta.split(b, "theta")
        gradient = b.op("Concat", gradient, b.op("Sub", buffers, tail), axis=0)
    b.named("new_accumulator", "Add", "accumulator", b.op("Mul", gradient, "scale"))
    graph.inputs = {"theta": theta.vector, "accumulator": theta.vector, **data, "scale": SCALAR}
    graph.outputs = {"loss": SCALAR, "new_accumulator": theta.vector}
    return graph


def _apply(theta: _Theta, optimizer: str) -> Graph:
    inputs = {"theta": theta.vector, "gradient": theta.vector, **optimizer_inputs(optimizer, theta.head)}
    graph = Graph(inputs, {})
    b = Builder(graph)
    head, tail = theta.split(b, "theta")
    gradient, change = theta.split(b, "gradient")
    updated = update(b, optimizer, head, gradient, theta.head)
    _new_theta(b, updated.parameters, b.op("Add", tail, change) if tail else "")
    graph.outputs = {**updated.outputs, "new_theta": theta.vector}
    return graph


def _new_theta(b: Builder, head: str, tail: str) -> None:
    if tail:
        b.named("new_theta", "Concat", head, tail, axis=0)
    else:
        b.graph.rename({head: "new_theta"})


def _evaluation(forward: Graph, theta: _Theta) -> Graph:
    graph, _ = decompose(forward, training=False)
    _over_theta(graph, theta)
    return graph


def _inference(forward: Graph, theta: _Theta) -> Graph:
    graph, _ = decompose(forward, training=False)
    data = _over_theta(graph, theta)
    graph.rename({parameter_value(spec.name): spec.name for spec in theta.specs})
    graph.outputs = {name: kind for name, kind in graph.outputs.items() if name != "loss"}
    graph.inputs = {
        "theta": graph.inputs["theta"],
        **{name: kind for name, kind in data.items() if name != "target"},
    }
    return graph
