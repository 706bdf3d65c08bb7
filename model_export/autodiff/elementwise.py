"""Gradient rules of element-by-element operators. y: the output; dy: its gradient, of the same shape.

A rule takes (builder, node, dy) and returns one gradient per input, None where there is none. It need not
ask which inputs want one: what nobody uses is removed afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from onnx import helper

from model_export.autodiff.builder import Builder
from model_export.errors import MissingRule
from model_export.graph import Node

Gradients = Sequence[str | None]

_FLOAT = helper.np_dtype_to_tensor_dtype(np.dtype(np.float32))


def _unbroadcast(b: Builder, n: Node, gradient: str, index: int) -> str:
    return b.sum_to(gradient, b.shape(n.outputs[0]), b.shape(n.inputs[index]))


def _mask(b: Builder, condition: str) -> str:
    return b.op("Cast", condition, to=_FLOAT)


# ---- arithmetic -------------------------------------------------------------------------------------


def add(b: Builder, n: Node, dy: str) -> Gradients:
    """Add, Sum."""
    return [_unbroadcast(b, n, dy, i) for i in range(len(n.inputs))]


def sub(b: Builder, n: Node, dy: str) -> Gradients:
    """Sub."""
    return [_unbroadcast(b, n, dy, 0), b.op("Neg", _unbroadcast(b, n, dy, 1))]


def mul(b: Builder, n: Node, dy: str) -> Gradients:
    """Mul."""
    x, y = n.inputs
    return [_unbroadcast(b, n, b.op("Mul", dy, y), 0), _unbroadcast(b, n, b.op("Mul", dy, x), 1)]


def div(b: Builder, n: Node, dy: str) -> Gradients:
    """Div: y = x / d has dx = dy / d, dd = -dx y."""
    quotient = b.op("Div", dy, n.inputs[1])
    divisor = b.op("Neg", b.op("Mul", quotient, n.outputs[0]))
    return [_unbroadcast(b, n, quotient, 0), _unbroadcast(b, n, divisor, 1)]


def neg(b: Builder, n: Node, dy: str) -> Gradients:
    """Neg."""
    return [b.op("Neg", dy)]


def pow_(b: Builder, n: Node, dy: str) -> Gradients:
    """Pow with a constant exponent; x^0 and x^1 never touch 0^-1."""
    x, exponent_name = n.inputs
    exponent = b.value(exponent_name)
    if exponent is None or exponent.size != 1:
        raise MissingRule("has a gradient rule for one constant exponent only")
    p = float(exponent.reshape(()))
    if p == 0.0:
        return [b.op("Mul", dy, 0.0), None]
    if p == 1.0:
        return [dy, None]
    slope = x if p == 2.0 else b.op("Pow", x, p - 1.0)
    return [b.op("Mul", dy, b.op("Mul", slope, p)), None]


def sqrt(b: Builder, n: Node, dy: str) -> Gradients:
    """Sqrt."""
    return [b.op("Div", b.op("Mul", dy, 0.5), n.outputs[0])]


def reciprocal(b: Builder, n: Node, dy: str) -> Gradients:
    """Reciprocal."""
    return [b.op("Neg", b.op("Mul", dy, b.op("Mul", n.outputs[0], n.outputs[0])))]


def exp(b: Builder, n: Node, dy: str) -> Gradients:
    """Exp."""
    return [b.op("Mul", dy, n.outputs[0])]


def log(b: Builder, n: Node, dy: str) -> Gradients:
    """Log."""
    return [b.op("Div", dy, n.inputs[0])]


def erf(b: Builder, n: Node, dy: str) -> Gradients:
    """Erf: 2 / sqrt(pi) exp(-x^2)."""
    bell = b.op("Exp", b.op("Neg", b.op("Mul", n.inputs[0], n.inputs[0])))
    return [b.op("Mul", dy, b.op("Mul", bell, 2.0 / math.sqrt(math.pi)))]


def sin(b: Builder, n: Node, dy: str) -> Gradients:
    """Sin."""
    return [b.op("Mul", dy, b.op("Cos", n.inputs[0]))]


def cos(b: Builder, n: Node, dy: str) -> Gradients:
    """Cos."""
    return [b.op("Neg", b.op("Mul", dy, b.op("Sin", n.inputs[0])))]


def abs_(b: Builder, n: Node, dy: str) -> Gradients:
    """Abs; 0 at 0, as in torch."""
    return [b.op("Mul", dy, b.op("Sign", n.inputs[0]))]


def extremum(b: Builder, n: Node, dy: str) -> Gradients:
    """Max and Min of several values; equal ones share the gradient, as in torch."""
    masks = [_mask(b, b.op("Equal", name, n.outputs[0])) for name in n.inputs]
    share = b.op("Div", dy, b.op("Sum", *masks)) if len(masks) > 1 else dy
    return [_unbroadcast(b, n, b.op("Mul", share, mask), i) for i, mask in enumerate(masks)]


# ---- choice -----------------------------------------------------------------------------------------


def clip(b: Builder, n: Node, dy: str) -> Gradients:
    """Clip. At the bounds torch.clamp passes the gradient on, relu6 and hardtanh do not."""
    suffix = "OrEqual" if "clamp" in n.torch_op else ""
    inside = [
        b.op(f"{comparison}{suffix}", n.inputs[0], bound)
        for comparison, bound in zip(("Greater", "Less"), n.inputs[1:], strict=False)
        if bound
    ]
    if not inside:
        return [dy]
    return [b.op("Mul", dy, _mask(b, inside[0] if len(inside) == 1 else b.op("And", *inside)))]


def where(b: Builder, n: Node, dy: str) -> Gradients:
    """Where."""
    condition = n.inputs[0]
    return [
        None,
        _unbroadcast(b, n, b.op("Where", condition, dy, 0.0), 1),
        _unbroadcast(b, n, b.op("Where", condition, 0.0, dy), 2),
    ]


def identity(b: Builder, n: Node, dy: str) -> Gradients:
    """Identity."""
    return [dy]


def cast(b: Builder, n: Node, dy: str) -> Gradients:
    """Cast of float32 to itself; the graphs compute in float32 only."""
    if n.attributes["to"] != _FLOAT or b.graph.types[n.inputs[0]].dtype != np.float32:
        raise MissingRule("leaves float32, the only type these graphs compute gradients in")
    return [dy]


def flat(b: Builder, n: Node, dy: str) -> Gradients:
    """Sign, Floor, Ceil, Round: constant almost everywhere."""
    return [None]


# ---- activations ------------------------------------------------------------------------------------


def relu(b: Builder, n: Node, dy: str) -> Gradients:
    """Relu; 0 at 0. A comparison and a product: faster in the runtime than Where or Sign."""
    return [b.op("Mul", dy, _mask(b, b.op("Greater", n.outputs[0], 0.0)))]


def leaky_relu(b: Builder, n: Node, dy: str) -> Gradients:
    """LeakyRelu."""
    slope = n.attributes.get("alpha", 0.01)
    return [b.op("Where", b.op("Greater", n.inputs[0], 0.0), dy, b.op("Mul", dy, slope))]


def prelu(b: Builder, n: Node, dy: str) -> Gradients:
    """PRelu."""
    x, slope = n.inputs
    positive = b.op("Greater", x, 0.0)
    dslope = b.op("Where", positive, 0.0, b.op("Mul", dy, x))
    return [b.op("Where", positive, dy, b.op("Mul", dy, slope)), _unbroadcast(b, n, dslope, 1)]


def elu(b: Builder, n: Node, dy: str) -> Gradients:
    """Elu: below 0 the slope is y + alpha."""
    below = b.op("Add", n.outputs[0], n.attributes.get("alpha", 1.0))
    return [b.op("Mul", dy, b.op("Where", b.op("Greater", n.inputs[0], 0.0), 1.0, below))]


def celu(b: Builder, n: Node, dy: str) -> Gradients:
    """Celu: below 0 the slope is y / alpha + 1."""
    below = b.op("Add", b.op("Div", n.outputs[0], n.attributes.get("alpha", 1.0)), 1.0)
    return [b.op("Mul", dy, b.op("Where", b.op("Greater", n.inputs[0], 0.0), 1.0, below))]


def selu(b: Builder, n: Node, dy: str) -> Gradients:
    """Selu: below 0 the slope is y + alpha gamma."""
    alpha = n.attributes.get("alpha", 1.6732632423543772)
    gamma = n.attributes.get("gamma", 1.0507009873554805)
    below = b.op("Add", n.outputs[0], alpha * gamma)
    return [b.op("Mul", dy, b.op("Where", b.op("Greater", n.inputs[0], 0.0), gamma, below))]


def sigmoid(b: Builder, n: Node, dy: str) -> Gradients:
    """Sigmoid."""
    y = n.outputs[0]
    return [b.op("Mul", dy, b.op("Sub", y, b.op("Mul", y, y)))]


def tanh(b: Builder, n: Node, dy: str) -> Gradients:
    """Tanh."""
    y = n.outputs[0]
    return [b.op("Mul", dy, b.op("Sub", 1.0, b.op("Mul", y, y)))]


def softplus(b: Builder, n: Node, dy: str) -> Gradients:
    """Softplus."""
    return [b.op("Mul", dy, b.op("Sigmoid", n.inputs[0]))]


def mish(b: Builder, n: Node, dy: str) -> Gradients:
    """Mish: y = x t with t = tanh(softplus(x)); the slope is t + x sigmoid(x) (1 - t^2)."""
    x = n.inputs[0]
    t = b.op("Tanh", b.op("Softplus", x))
    bend = b.op("Mul", b.op("Mul", x, b.op("Sigmoid", x)), b.op("Sub", 1.0, b.op("Mul", t, t)))
    return [b.op("Mul", dy, b.op("Add", t, bend))]


def hard_sigmoid(b: Builder, n: Node, dy: str) -> Gradients:
    """HardSigmoid: alpha strictly between the bends."""
    y = n.outputs[0]
    inside = b.op("And", b.op("Greater", y, 0.0), b.op("Less", y, 1.0))
    return [b.op("Mul", dy, b.op("Mul", _mask(b, inside), n.attributes.get("alpha", 0.2)))]


def hard_swish(b: Builder, n: Node, dy: str) -> Gradients:
    """HardSwish: 0 below -3, x / 3 + 1/2 up to 3, then 1."""
    x = n.inputs[0]
    middle = b.op("Add", b.op("Div", x, 3.0), 0.5)
    upper = b.op("Where", b.op("Less", x, 3.0), middle, 1.0)
    return [b.op("Mul", dy, b.op("Where", b.op("Greater", x, -3.0), upper, 0.0))]
