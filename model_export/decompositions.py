"""Operators rewritten before gradients are taken: into simpler ones, and into those of training or inference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import helper

from model_export.autodiff.builder import Builder
from model_export.dropout import SEED, write_mask
from model_export.dropout_calls import TRACED_OP, axes_of
from model_export.errors import UnsupportedModel
from model_export.graph import Graph, Node, ValueType, infer_types

_FLOAT = helper.np_dtype_to_tensor_dtype(np.dtype(np.float32))


def has_dropout(forward: Graph) -> bool:
    """Whether training drops at random, so that its graphs take the input SEED; probability 1 is not random."""
    builder = Builder(forward)
    ratios = [builder.value(node.inputs[1]) for node in forward.nodes if node.op == "Dropout"]
    return any(ratio is not None and float(ratio) < 1.0 for ratio in ratios)


@dataclass
class Mode:
    """Whether a step or an inference is written; ``buffers``: the value of each buffer that a step has changed."""

    training: bool
    buffers: dict[str, str] = field(default_factory=dict)


def decompose(forward: Graph, *, training: bool) -> tuple[Graph, Mapping[str, str]]:
    """The graph of a training step or of inference, by DECOMPOSITIONS and the stable log-sigmoid.

    Also {input of the graph that is a buffer: its value after the batch}, in training. Dropout adds the input SEED.
    """
    graph = forward.copy()
    mode = Mode(training)
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
            DECOMPOSITIONS[node.op](builder, node, mode)
        else:
            nodes.append(node)
        for new in nodes[start:]:
            new.module, new.torch_op = new.module or node.module, new.torch_op or node.torch_op
    graph.nodes = nodes
    if any(SEED in node.inputs for node in nodes):
        graph.inputs[SEED] = graph.types[SEED] = ValueType(np.dtype(np.int64), ())
    infer_types(graph)
    return graph, mode.buffers


def _softmax_cross_entropy(b: Builder, n: Node, _: Mode) -> None:
    log_probability = b.op("LogSoftmax", n.inputs[0], axis=1)
    if len(n.outputs) > 1 and n.outputs[1]:
        b.named(n.outputs[1], "Identity", log_probability)
    _likelihood(b, n, log_probability)


def _negative_log_likelihood(b: Builder, n: Node, _: Mode) -> None:
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


def _instance_normalization(b: Builder, n: Node, _: Mode) -> None:
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


def _batch_normalization(b: Builder, n: Node, mode: Mode) -> None:
    """Ioffe and Szegedy 2015. The exporter writes inference for every kind; the torch operator tells them apart.

    The runtime's own training mode is not used: it overwrites its inputs, and its running variance is the biased
    one. One value per channel has no variance: it leaves the running one alone (torch refuses such a batch).
    """
    mean, variance = n.inputs[3:]
    if n.torch_op.startswith("aten._native_batch_norm_legit.no_stats"):
        _normalize_by_batch(b, n)  # in inference too, as in torch
    elif n.torch_op.startswith("aten._native_batch_norm_legit_functional.") and mode.training:
        batch_mean, square, count = _normalize_by_batch(b, n)
        momentum = b.scalar(1.0 - n.attributes.get("momentum", 0.9))
        others = b.op("Sub", count, 1.0)
        unbiased = b.op("Div", square, b.op("Max", others, 1.0))
        weight = b.op("Mul", momentum, b.op("Min", others, 1.0))
        for name, value, share in ((mean, batch_mean, momentum), (variance, unbiased, weight)):
            now = mode.buffers.get(name, name)  # a layer that is used twice
            kept = b.op("Mul", now, b.op("Sub", 1.0, share))
            new = b.op("Mul", b.op("Reshape", value, b.ints(-1)), share)
            mode.buffers[name] = b.op("Add", kept, new)
    elif n.torch_op.startswith("aten._native_batch_norm_legit"):  # frozen, or inference
        nonnegative = b.op("Max", variance, 0.0)  # averaging and quantising may take it below
        epsilon = n.attributes.get("epsilon", 1e-5)
        b.named(n.outputs[0], "BatchNormalization", *n.inputs[:3], mean, nonnegative, epsilon=epsilon)
    else:
        raise UnsupportedModel(
            f"BatchNormalization in {n.module or 'the model'} comes from {n.torch_op or 'an unknown operator'} of "
            "torch, which is not covered"
        )


def _normalize_by_batch(b: Builder, n: Node) -> tuple[str, str, str]:
    """By the batch's own statistics. Returns mean and sum of squares about it, (1, C, 1, ...), and the count ()."""
    x, scale, bias = n.inputs[:3]
    rank = b.rank(x)
    column = b.ints(-1, *[1] * (rank - 2))
    across = b.ints(0, *range(2, rank))
    count = b.op("Div", *(b.op("Cast", b.op("Size", value), to=_FLOAT) for value in (x, scale)))
    mean = b.op("ReduceMean", x, across, keepdims=1)
    centred = b.op("Sub", x, mean)
    square = b.op("ReduceSumSquare", centred, across, keepdims=1)
    variance = b.op("Div", square, count)
    deviation = b.op("Sqrt", b.op("Add", variance, n.attributes.get("epsilon", 1e-5)))
    scaled = b.op("Mul", centred, b.op("Div", b.op("Reshape", scale, column), deviation))
    b.named(n.outputs[0], "Add", scaled, b.op("Reshape", bias, column))
    return mean, square, count


def _dropout(b: Builder, n: Node, mode: Mode) -> None:
    """Hinton et al. 2012, scaled in training; nothing in inference."""
    x, ratio = n.inputs[0], b.value(n.inputs[1])
    if ratio is None or not n.torch_op.startswith(TRACED_OP):
        raise UnsupportedModel(
            f"the dropout of {n.module or 'the model'} comes from {n.torch_op or 'an unknown operator'} of torch: "
            "use nn.Dropout or torch.nn.functional.dropout"
        )
    probability, salt = float(ratio), n.attributes["seed"]
    if not mode.training:
        b.named(n.outputs[0], "Identity", x)
    elif probability >= 1.0:
        b.named(n.outputs[0], "Mul", x, 0.0)
    else:
        axes = axes_of(salt)
        shape = b.op("Shape", x, start=0, end=axes)
        if rest := b.rank(x) - axes:
            shape = b.op("Concat", shape, b.ints(*[1] * rest), axis=0)
        b.named(n.outputs[0], "Mul", x, write_mask(b, salt, probability, shape))


DECOMPOSITIONS: Mapping[str, Callable[[Builder, Node, Mode], None]] = {
    "BatchNormalization": _batch_normalization,
    "Dropout": _dropout,
    "InstanceNormalization": _instance_normalization,
    "NegativeLogLikelihoodLoss": _negative_log_likelihood,
    "SoftmaxCrossEntropyLoss": _softmax_cross_entropy,
}
