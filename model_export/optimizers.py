"""The optimisers as graphs: torch.optim's arithmetic on one vector of trainable parameters.

Each takes its numbers as float32 scalars that the host feeds at every step, so one graph serves every plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from edge_runtime.protocol.artifact import OPTIMIZERS
from model_export.autodiff.builder import Builder
from model_export.graph import ValueType

SCALAR = ValueType(np.dtype(np.float32), ())
_CLIP_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_

# The inputs, float32 (), of ``step_<name>.onnx`` and ``apply_<name>.onnx`` for each name of OPTIMIZERS.
SCALARS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "sgd": ("learning_rate", "momentum_coefficient", "nesterov", "weight_decay", "max_grad_norm"),
        "adam": (
            *("learning_rate", "beta1", "beta2", "epsilon", "weight_decay", "decoupled_weight_decay"),
            *("bias_correction1", "bias_correction2", "max_grad_norm"),
        ),
    }
)


@dataclass(frozen=True)
class Update:
    """What a step computed. ``parameters``: the value that holds the new ones, of the given type.

    outputs: grad_norm, and new_<state> for each state: the values of these names, with their types.
    """

    parameters: str
    outputs: Mapping[str, ValueType]


def optimizer_inputs(optimizer: str, kind: ValueType) -> dict[str, ValueType]:
    """What a graph with ``update`` in it takes besides parameters and gradient: state, then scalars."""
    return dict.fromkeys(OPTIMIZERS[optimizer], kind) | dict.fromkeys(SCALARS[optimizer], SCALAR)


def update(b: Builder, optimizer: str, parameters: str, gradient: str, kind: ValueType) -> Update:
    """Clips ``gradient`` as clip_grad_norm_ does, then steps; both and every state are of ``kind``, float32 (p,).

    A max_grad_norm of 0 does not clip. Zero state stands for torch's absent one: the first step is the same.
    """
    norm = b.named("grad_norm", "Sqrt", b.op("ReduceSumSquare", gradient, keepdims=0))
    factor = b.op("Min", b.op("Div", "max_grad_norm", b.op("Add", norm, _CLIP_EPSILON)), 1.0)
    factor = b.op("Where", b.op("Greater", "max_grad_norm", 0.0), factor, 1.0)
    clipped = b.op("Mul", gradient, factor)
    decayed = b.op("Add", clipped, b.op("Mul", parameters, "weight_decay"))
    new = _STEPS[optimizer](b, parameters, decayed)
    outputs = {"grad_norm": SCALAR} | {f"new_{name}": kind for name in OPTIMIZERS[optimizer]}
    return Update(new, MappingProxyType(outputs))


def _sgd(b: Builder, parameters: str, gradient: str) -> str:
    """torch.optim.SGD, dampening 0: along the momentum; nesterov: along gradient + coefficient * momentum."""
    momentum = b.named("new_momentum", "Add", b.op("Mul", "momentum", "momentum_coefficient"), gradient)
    is_nesterov = b.op("Greater", "nesterov", 0.5)
    # Scalars decide, not a choice between two vectors; a product with 1 or 0 is exact, so plain SGD stays plain.
    along = b.op("Mul", "learning_rate", b.op("Where", is_nesterov, "momentum_coefficient", 1.0))
    ahead = b.op("Mul", "learning_rate", "nesterov")
    step = b.op("Add", b.op("Mul", momentum, along), b.op("Mul", gradient, ahead))
    return b.op("Sub", parameters, step)


def _adam(b: Builder, parameters: str, gradient: str) -> str:
    """torch.optim.Adam; with decoupled_weight_decay in place of weight_decay torch.optim.AdamW.

    bias_correction1, bias_correction2: 1 - beta^t of the t-th step from 1.
    """
    mean = _average(b, "exp_avg", "beta1", gradient)
    square = _average(b, "exp_avg_sq", "beta2", b.op("Mul", gradient, gradient))
    root = b.op("Div", b.op("Sqrt", square), b.op("Sqrt", "bias_correction2"))
    rate = b.op("Div", "learning_rate", "bias_correction1")
    step = b.op("Div", b.op("Mul", mean, rate), b.op("Add", root, "epsilon"))
    decay = b.op("Mul", parameters, b.op("Mul", "learning_rate", "decoupled_weight_decay"))
    return b.op("Sub", parameters, b.op("Add", decay, step))


def _average(b: Builder, name: str, beta: str, value: str) -> str:
    """``new_<name>`` = beta * <name> + (1 - beta) * value."""
    return b.named(f"new_{name}", "Add", b.op("Mul", name, beta), b.op("Mul", value, b.op("Sub", 1.0, beta)))


_STEPS: Mapping[str, Callable[[Builder, str, str], str]] = {"sgd": _sgd, "adam": _adam}
