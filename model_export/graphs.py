"""The five graphs of an artifact, made of the forward graph: all over one flat float32 vector theta (d,)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edge_runtime.protocol.tensors import TensorSpec, parameter_count
from model_export.autodiff import add_gradients
from model_export.autodiff.builder import Builder
from model_export.errors import UnsupportedModel
from model_export.forward import parameter_value
from model_export.graph import Graph, Node, ValueType, to_bytes
from model_export.passes import tidy

_FLOAT = np.dtype(np.float32)
_SCALAR = ValueType(_FLOAT, ())
_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_


def make_graphs(forward: Graph, specs: Sequence[TensorSpec]) -> dict[str, bytes]:
    """{file name: serialized model} of GRAPH_FILES. Raises MissingRule, UnsupportedModel.

    - ``step_sgd``: theta, momentum, <inputs>, target, learning_rate, momentum_coefficient, max_grad_norm
      -> loss, grad_norm, new_theta, new_momentum
    - ``grad``: theta, accumulator, <inputs>, target, scale -> loss (times scale), new_accumulator
    - ``apply_sgd``: theta, gradient, momentum, learning_rate, momentum_coefficient, max_grad_norm
      -> grad_norm, new_theta, new_momentum
    - ``eval``: theta, <inputs>, target -> loss, <outputs>; ``infer``: theta, <inputs> -> <outputs>

    In ``infer`` the pieces of theta bear their torch names, so that they can be exchanged for initializers.
    Vectors are float32 (d,), rates, scale, loss and norm float32 (). Loss is the mean over the batch.
    """
    made = {
        "step_sgd.onnx": _step(forward, specs),
        "grad.onnx": _grad(forward, specs),
        "apply_sgd.onnx": _apply(specs),
        "eval.onnx": _evaluation(forward, specs),
        "infer.onnx": _inference(forward, specs),
    }
    torch_names = {spec.name for spec in specs}
    return {name: to_bytes(tidy(graph, torch_names)) for name, graph in made.items()}


def _vector(specs: Sequence[TensorSpec]) -> ValueType:
    return ValueType(_FLOAT, (parameter_count(specs),))


def _over_theta(forward: Graph, specs: Sequence[TensorSpec]) -> tuple[Graph, dict[str, ValueType]]:
    """The forward graph with its parameters cut out of ``theta``, and the types of its other inputs."""
    graph = forward.copy()
    parameters = {parameter_value(spec.name) for spec in specs}
    data = {name: kind for name, kind in graph.inputs.items() if name not in parameters}
    graph.inputs = {"theta": _vector(specs), **data}
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
    return graph, data


def _with_gradient(forward: Graph, specs: Sequence[TensorSpec]) -> tuple[Graph, dict[str, ValueType], str]:
    """The same, with the gradient of the loss as one vector of shape (d,), whose name comes last."""
    graph, data = _over_theta(forward, specs)
    gradients = add_gradients(graph, "loss", [parameter_value(spec.name) for spec in specs])
    if missing := [spec.name for spec in specs if parameter_value(spec.name) not in gradients]:
        raise UnsupportedModel(
            f"no gradient flows from the loss to {', '.join(missing[:10])}: "
            "use these parameters on a differentiable way to the loss, or remove them"
        )
    builder = Builder(graph)
    parts = [builder.op("Reshape", gradients[parameter_value(spec.name)], builder.ints(-1)) for spec in specs]
    return graph, data, parts[0] if len(parts) == 1 else builder.op("Concat", *parts, axis=0)


def _step(forward: Graph, specs: Sequence[TensorSpec]) -> Graph:
    graph, data, gradient = _with_gradient(forward, specs)
    vector = _vector(specs)
    updated = _sgd(Builder(graph), gradient, vector)
    graph.inputs = {"theta": vector, "momentum": vector, **data, **_RATES}
    graph.outputs = {"loss": _SCALAR, **updated}
    return graph


def _grad(forward: Graph, specs: Sequence[TensorSpec]) -> Graph:
    graph, data, gradient = _with_gradient(forward, specs)
    graph.rename({"loss": "%loss"})
    builder = Builder(graph)
    builder.named("loss", "Mul", "%loss", "scale")
    builder.named("new_accumulator", "Add", "accumulator", builder.op("Mul", gradient, "scale"))
    vector = _vector(specs)
    graph.inputs = {"theta": vector, "accumulator": vector, **data, "scale": _SCALAR}
    graph.outputs = {"loss": _SCALAR, "new_accumulator": vector}
    return graph


def _apply(specs: Sequence[TensorSpec]) -> Graph:
    vector = _vector(specs)
    graph = Graph({"theta": vector, "gradient": vector, "momentum": vector, **_RATES}, {})
    graph.outputs = dict(_sgd(Builder(graph), "gradient", vector))
    return graph


def _evaluation(forward: Graph, specs: Sequence[TensorSpec]) -> Graph:
    return _over_theta(forward, specs)[0]


def _inference(forward: Graph, specs: Sequence[TensorSpec]) -> Graph:
    graph, data = _over_theta(forward, specs)
    graph.rename({parameter_value(spec.name): spec.name for spec in specs})
    graph.outputs = {name: kind for name, kind in graph.outputs.items() if name != "loss"}
    graph.inputs = {
        "theta": graph.inputs["theta"],
        **{name: kind for name, kind in data.items() if name != "target"},
    }
    return graph


_RATES: Mapping[str, ValueType] = {
    "learning_rate": _SCALAR,
    "momentum_coefficient": _SCALAR,
    "max_grad_norm": _SCALAR,
}


def _sgd(b: Builder, gradient: str, vector: ValueType) -> Mapping[str, ValueType]:
    """torch.nn.utils.clip_grad_norm_ and torch.optim.SGD (dampening 0); a max_grad_norm of 0 does not clip.

    A zero momentum vector stands for torch's absent one, so the first step is the same.
    """
    norm = b.named("grad_norm", "Sqrt", b.op("ReduceSumSquare", gradient, keepdims=0))
    factor = b.op("Min", b.op("Div", "max_grad_norm", b.op("Add", norm, _EPSILON)), 1.0)
    factor = b.op("Where", b.op("Greater", "max_grad_norm", 0.0), factor, 1.0)
    clipped = b.op("Mul", gradient, factor)
    momentum = b.named("new_momentum", "Add", b.op("Mul", "momentum", "momentum_coefficient"), clipped)
    b.named("new_theta", "Sub", "theta", b.op("Mul", momentum, "learning_rate"))
    return {"grad_norm": _SCALAR, "new_theta": vector, "new_momentum": vector}
