"""Operators rewritten into simpler ones before gradients are taken, so that they need no rule of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from onnx import helper

from model_export.autodiff.builder import Builder
from model_export.errors import UnsupportedModel
from model_export.graph import Graph, Node, infer_types

_FLOAT = helper.np_dtype_to_tensor_dtype(np.dtype(np.float32))


def decompose(graph: Graph) -> None:
    """Applies DECOMPOSITIONS and the stable log-sigmoid in place, then infers the types of what is new."""
    producers = {name: node for node in graph.nodes for name in node.outputs}
    nodes: list[Node] = []
    builder = Builder(graph, nodes)
    for node in graph.nodes:
        start = len(nodes)
        source = producers.get(node.inputs[0]) if node.inputs else None
        if node.op == "Log" and source is not None and source.op == "Sigmoid":
            # log(sigmoid(x)) is -inf from x = -104 down; -softplus(-x) is not
            builder.named(node.outputs[0], "Neg", builder.op("Softplus", builder.op("Neg", source.inputs[0])))
        elif node.op in DECOMPOSITIONS:
            DECOMPOSITIONS[node.op](builder, node)
        else:
            nodes.append(node)
        for new in nodes[start:]:
            new.module, new.torch_op = new.module or node.module, new.torch_op or node.torch_op
    graph.nodes = nodes
    infer_types(graph)


def _softmax_cross_entropy(b: Builder, n: Node) -> None:
    log_probability = b.op("LogSoftmax", n.inputs[0], axis=1)
    if len(n.outputs) > 1 and n.outputs[1]:
        b.named(n.outputs[1], "Identity", log_probability)
    _likelihood(b, n, log_probability)


def _negative_log_likelihood(b: Builder, n: Node) -> None:
    _likelihood(b, n, n.inputs[0])


def _likelihood(b: Builder, n: Node, log_probability: str) -> None:
    """Minus the log probability of each label, over (batch, classes, ...) with labels (batch, ...)."""
    labels = n.inputs[1]
    weight: str | None = None
    if "ignore_index" in n.attributes:
        ignored = b.constant(np.array(n.attributes["ignore_index"], b.graph.types[labels].dtype))
        valid = b.op("Not", b.op("Equal", labels, ignored))
        labels = b.op("Where", valid, labels, b.constant(np.zeros((), b.graph.types[labels].dtype)))
        weight = b.op("Cast", valid, to=_FLOAT)
    if len(n.inputs) > 2 and n.inputs[2]:
        class_weight = b.op("Gather", n.inputs[2], labels, axis=0)
        weight = class_weight if weight is None else b.op("Mul", weight, class_weight)
    taken = b.op("GatherElements", log_probability, b.op("Unsqueeze", labels, b.ints(1)), axis=1)
    losses = b.op("Neg", b.op("Squeeze", taken, b.ints(1)))
    if weight is not None:
        losses = b.op("Mul", losses, weight)
    reduction = n.attributes.get("reduction", "mean")
    if reduction == "none":
        b.named(n.outputs[0], "Identity", losses)
    elif reduction == "sum":
        b.named(n.outputs[0], "ReduceSum", losses, keepdims=0)
    elif weight is None:
        b.named(n.outputs[0], "ReduceMean", losses, keepdims=0)
    else:
        total, count = (b.op("ReduceSum", value, keepdims=0) for value in (losses, weight))
        b.named(n.outputs[0], "Div", total, count)


def _instance_normalization(b: Builder, n: Node) -> None:
    """Ulyanov et al. 2016; group normalisation arrives as this too."""
    x, scale, bias = n.inputs
    rank = b.rank(x)
    spatial = b.ints(*range(2, rank))
    centred = b.op("Sub", x, b.op("ReduceMean", x, spatial, keepdims=1))
    variance = b.op("ReduceMean", b.op("Mul", centred, centred), spatial, keepdims=1)
    deviation = b.op("Sqrt", b.op("Add", variance, n.attributes.get("epsilon", 1e-5)))
    column = b.ints(-1, *[1] * (rank - 2))
    scaled = b.op("Mul", b.op("Div", centred, deviation), b.op("Reshape", scale, column))
    b.named(n.outputs[0], "Add", scaled, b.op("Reshape", bias, column))


def _dropout(b: Builder, n: Node) -> None:
    ratio = b.value(n.inputs[1]) if len(n.inputs) > 1 and n.inputs[1] else None
    if ratio is None or float(ratio) != 0.0 or len(n.outputs) > 1:
        raise UnsupportedModel(
            f"Dropout in {n.module or 'the model'} is not supported by this version: set its probability to 0"
        )
    b.named(n.outputs[0], "Identity", n.inputs[0])


DECOMPOSITIONS: Mapping[str, Callable[[Builder, Node], None]] = {
    "Dropout": _dropout,
    "InstanceNormalization": _instance_normalization,
    "NegativeLogLikelihoodLoss": _negative_log_likelihood,
    "SoftmaxCrossEntropyLoss": _softmax_cross_entropy,
}
