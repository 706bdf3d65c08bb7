"""The calls of dropout in a forward pass, numbered: in the trace and in the reference the n-th is the same one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnxscript
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody does
from torch.overrides import TorchFunctionMode

from model_export.dropout import keep_mask
from model_export.errors import UnsupportedModel

TRACED_OP = "fleetgrad.dropout.default"  # the torch operator behind an ONNX Dropout of this module

# (input, probability in (0, 1], salt, axes that the mask has; the others are of size 1) -> output
Dropout = Callable[[torch.Tensor, float, int, int], torch.Tensor]

_PLAIN = {F.dropout, torch.dropout}
_CHANNELS = {F.dropout1d: 3, F.dropout2d: 4, F.dropout3d: 5, torch.feature_dropout: 0}
_REFUSED = {
    F.alpha_dropout: "alpha_dropout (AlphaDropout)",
    F.feature_alpha_dropout: "feature_alpha_dropout (FeatureAlphaDropout)",
    torch.alpha_dropout: "alpha_dropout",
    torch.feature_alpha_dropout: "feature_alpha_dropout",
}


def salt_of(call: int, axes: int) -> int:
    """The number that sets one dropout apart from the others of a model."""
    return call << 4 | axes


def axes_of(salt: int) -> int:
    """How many leading axes the mask has: all of the input's, or 2 for whole channels."""
    return salt & 15


class DropoutCalls(TorchFunctionMode):
    """Under this mode every torch dropout that drops something is ``dropout``; alpha dropout is refused by name.

    ``restart`` begins a new forward pass. Raises UnsupportedModel.
    """

    def __init__(self, dropout: Dropout) -> None:
        super().__init__()
        self._dropout = dropout
        self._calls = 0

    def restart(self) -> None:
        self._calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PLAIN or func in _CHANNELS:
            return self._drop(func, *args, **kwargs)
        if func in _REFUSED and _drops(*args[1:], **kwargs):
            raise UnsupportedModel(
                f"{_REFUSED[func]} is not covered; use Dropout, or set its probability to 0"
            )
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _drop(
        self,
        func: Callable[..., Any],
        input: torch.Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
        **others: bool,
    ) -> torch.Tensor:
        if not _drops(p, others.get("train", training)):
            return input
        axes = input.ndim
        if func in _CHANNELS:  # without a channel axis torch takes the batch for channels
            axes = 1 if input.ndim == _CHANNELS[func] - 1 and func is not F.dropout2d else 2
        salt = salt_of(self._calls, axes)
        self._calls += 1
        output = self._dropout(input, float(np.float32(p)), salt, axes)
        return input.copy_(output) if inplace else output

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **others: Any,
    ) -> torch.Tensor:
        """scaled_dot_product_attention; with dropout it is written out, in which torch never has it off."""
        if dropout_p == 0.0:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, **others)
        if others.get("enable_gqa"):
            raise UnsupportedModel("scaled_dot_product_attention with dropout and enable_gqa is not covered")
        scale = others.get("scale")
        scores = (query @ key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = torch.where(attn_mask, scores, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        return self._drop(F.dropout, scores.softmax(-1), dropout_p) @ value


def _drops(p: float = 0.5, training: bool = True, inplace: bool = False, train: bool = True) -> bool:
    return bool(training and train and p > 0.0)


# ---- the two ways to compute one --------------------------------------------------------------------


def masked(seed: int) -> Dropout:
    """What the graphs compute with this ``dropout_seed``, in torch."""

    def dropout(value: torch.Tensor, probability: float, salt: int, axes: int) -> torch.Tensor:
        if probability >= 1.0:
            return value * 0.0
        shape = [*value.shape[:axes], *[1] * (value.ndim - axes)]
        kept = torch.from_numpy(keep_mask(seed, salt, probability, shape).astype(np.float32))
        return value * (kept.to(value.dtype) / (1.0 - probability))

    return dropout


@torch.library.custom_op(
    "fleetgrad::dropout", mutates_args=(), schema="(Tensor x, float probability, int salt) -> Tensor"
)
def _traced(x: torch.Tensor, probability: float, salt: int) -> torch.Tensor:
    return x.clone()


@_traced.register_fake
def _shape(x: torch.Tensor, probability: float, salt: int) -> torch.Tensor:
    return torch.empty_like(x)


def _translated(x: Any, probability: float, salt: int) -> Any:
    op: Any = onnxscript.opset18
    ratio, training = op.Constant(value_float=probability), op.Constant(value=onnxscript.ir.tensor(True))
    return op.Dropout(x, ratio, training, seed=salt)[0]


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.fleetgrad.dropout.default: _translated
}


@contextmanager
def traced() -> Iterator[DropoutCalls]:
    """While torch's exporter runs: each dropout becomes an ONNX Dropout whose attribute ``seed`` is its salt."""
    calls = DropoutCalls(lambda value, probability, salt, axes: _traced(value, probability, salt))
    with calls:
        yield calls
