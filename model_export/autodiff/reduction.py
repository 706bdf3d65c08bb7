"""Gradient rules of reductions, softmax and layer normalisation."""

from __future__ import annotations

import numpy as np
from onnx import helper

from model_export.autodiff.builder import Builder
from model_export.autodiff.elementwise import Gradients
from model_export.errors import MissingRule
from model_export.graph import Node

_FLOAT = helper.np_dtype_to_tensor_dtype(np.dtype(np.float32))


def reduce_sum(b: Builder, n: Node, dy: str) -> Gradients:
    """ReduceSum."""
    return [_expanded(b, n, dy)]


def reduce_mean(b: Builder, n: Node, dy: str) -> Gradients:
    """ReduceMean, GlobalAveragePool."""
    x, y = n.inputs[0], n.outputs[0]
    sizes = [b.shape(x)[axis] for axis in _axes(b, n)]
    if all(isinstance(size, int) for size in sizes):
        share = b.op("Mul", dy, 1.0 / float(np.prod([size for size in sizes if isinstance(size, int)])))
    else:
        share = b.op("Div", b.op("Mul", dy, _count(b, y)), _count(b, x))
    return [_expanded(b, n, share)]


def reduce_extremum(b: Builder, n: Node, dy: str) -> Gradients:
    """ReduceMax and ReduceMin; equal elements share the gradient, as in torch.amax."""
    mask = b.op("Cast", b.op("Equal", n.inputs[0], _kept(b, n, n.outputs[0])), to=_FLOAT)
    ties = b.op("ReduceSum", mask, b.ints(*_axes(b, n)), keepdims=1)
    return [b.op("Mul", mask, b.op("Div", _kept(b, n, dy), ties))]


def reduce_sum_square(b: Builder, n: Node, dy: str) -> Gradients:
    """ReduceSumSquare."""
    return [b.op("Mul", n.inputs[0], b.op("Mul", _kept(b, n, dy), 2.0))]


def reduce_l1(b: Builder, n: Node, dy: str) -> Gradients:
    """ReduceL1."""
    return [b.op("Mul", b.op("Sign", n.inputs[0]), _kept(b, n, dy))]


def reduce_l2(b: Builder, n: Node, dy: str) -> Gradients:
    """ReduceL2; 0 where the norm is 0, as in torch."""
    norm = _kept(b, n, n.outputs[0])
    slope = b.op("Div", n.inputs[0], b.op("Where", b.op("Greater", norm, 0.0), norm, 1.0))
    return [b.op("Mul", slope, _kept(b, n, dy))]


def reduce_log_sum_exp(b: Builder, n: Node, dy: str) -> Gradients:
    """ReduceLogSumExp: exp(x - y) is the softmax."""
    softmax_ = b.op("Exp", b.op("Sub", n.inputs[0], _kept(b, n, n.outputs[0])))
    return [b.op("Mul", softmax_, _kept(b, n, dy))]


def softmax(b: Builder, n: Node, dy: str) -> Gradients:
    """Softmax: y (dy - sum(y dy))."""
    y = n.outputs[0]
    weighted = b.op("Mul", dy, y)
    total = b.op("ReduceSum", weighted, b.ints(n.attributes.get("axis", -1)), keepdims=1)
    return [b.op("Sub", weighted, b.op("Mul", y, total))]


def log_softmax(b: Builder, n: Node, dy: str) -> Gradients:
    """LogSoftmax: dy - exp(y) sum(dy)."""
    total = b.op("ReduceSum", dy, b.ints(n.attributes.get("axis", -1)), keepdims=1)
    return [b.op("Sub", dy, b.op("Mul", b.op("Exp", n.outputs[0]), total))]


def layer_normalization(b: Builder, n: Node, dy: str) -> Gradients:
    """LayerNormalization (Ba et al. 2016), out of the mean and inverse deviation that the operator can return."""
    x, scale = n.inputs[:2]
    rank = b.rank(x)
    axis = n.attributes.get("axis", -1) % rank
    inner, outer = b.ints(*range(axis, rank)), b.ints(*range(axis))
    mean, inverse_deviation = b.extra_output(n, 1), b.extra_output(n, 2)
    normalized = b.op("Mul", b.op("Sub", x, mean), inverse_deviation)
    dn = b.op("Mul", dy, scale)
    centre = b.op("ReduceMean", dn, inner, keepdims=1)
    slope = b.op("ReduceMean", b.op("Mul", dn, normalized), inner, keepdims=1)
    dx = b.op("Mul", inverse_deviation, b.op("Sub", b.op("Sub", dn, centre), b.op("Mul", normalized, slope)))
    dscale = b.op("ReduceSum", b.op("Mul", dy, normalized), outer, keepdims=0)
    dbias = b.op("ReduceSum", dy, outer, keepdims=0)
    return [dx, dscale, dbias]


def batch_normalization(b: Builder, n: Node, dy: str) -> Gradients:
    """BatchNormalization by given statistics, which are constants: an affine function of each channel."""
    if n.attributes.get("training_mode", 0):
        raise MissingRule("has a gradient rule for given statistics only")
    x, scale, _, mean, variance = n.inputs
    rank = b.rank(x)
    column = b.ints(-1, *[1] * (rank - 2))
    across = b.ints(0, *range(2, rank))
    deviation = b.op("Sqrt", b.op("Add", variance, n.attributes.get("epsilon", 1e-5)))
    centred = b.op("Sub", x, b.op("Reshape", mean, column))
    dx = b.op("Mul", dy, b.op("Reshape", b.op("Div", scale, deviation), column))
    dscale = b.op("Div", b.op("ReduceSum", b.op("Mul", dy, centred), across, keepdims=0), deviation)
    return [dx, dscale, b.op("ReduceSum", dy, across, keepdims=0), None, None]


def _axes(b: Builder, n: Node) -> list[int]:
    rank = b.rank(n.inputs[0])
    if n.op == "GlobalAveragePool":
        return list(range(2, rank))
    axes = n.attributes.get("axes")
    if len(n.inputs) > 1 and n.inputs[1]:
        value = b.value(n.inputs[1])
        if value is None:
            raise MissingRule("has a gradient rule for axes that are known at export only")
        axes = value.tolist()
    if not axes:
        return [] if n.attributes.get("noop_with_empty_axes", 0) else list(range(rank))
    return sorted(int(axis) % rank for axis in axes)


def _kept(b: Builder, n: Node, value: str) -> str:
    """A value of the output's shape with the reduced axes as size 1, so that it broadcasts to the input."""
    axes = _axes(b, n)
    keep = n.op == "GlobalAveragePool" or n.attributes.get("keepdims", 1)
    return value if keep or not axes else b.op("Unsqueeze", value, b.ints(*axes))


def _expanded(b: Builder, n: Node, dy: str) -> str:
    return b.op("Expand", _kept(b, n, dy), b.op("Shape", n.inputs[0]))


def _count(b: Builder, value: str) -> str:
    return b.op("Cast", b.op("Size", value), to=_FLOAT)
