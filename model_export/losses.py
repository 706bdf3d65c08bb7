"""The losses a model may name, each in two forms: torch's own (the reference) and the one that is exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

Outputs = Any  # what the module returns: a tensor or a tuple of them
LossFunction = Callable[[Outputs, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Loss:
    """``kind``: the name in the manifest. Both functions return the mean over the batch."""

    kind: str
    reference: LossFunction
    exported: LossFunction


def _cross_entropy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    # Labels are range-checked on the device, so the exporter's mask for ignored labels is left out.
    return -functional.log_softmax(output, dim=1).gather(1, target.unsqueeze(1)).mean()


def _bce_with_logits(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    # The exporter would write log(sigmoid(x)), which is -inf from x = -104 down.
    return (functional.softplus(output) - output * target).mean()


LOSSES: Mapping[str, Loss] = {
    "bce_with_logits": Loss("bce_with_logits", functional.binary_cross_entropy_with_logits, _bce_with_logits),
    "cross_entropy": Loss("cross_entropy", functional.cross_entropy, _cross_entropy),
    "mse": Loss("mse", functional.mse_loss, functional.mse_loss),
}


def custom(function: LossFunction) -> Loss:
    """A callable (outputs, target) -> scalar tensor, traced with the model."""
    return Loss("custom", function, function)
