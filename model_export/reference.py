"""What torch computes, in float64: the values that the exported graphs have to reproduce."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from edge_runtime.backends.base import Hyperparameters
from model_export.dropout_calls import DropoutCalls, masked
from model_export.errors import ExportError, UnsupportedModel, explain
from model_export.model import Model, as_outputs

DROPOUT_SEED = 0x5EED_0000_0001  # any; wider than 32 bits, so that both halves count

Float64 = npt.NDArray[np.float64]


class NoDoubleReference(Exception):
    """The model does not compute in float64; use float32."""


def reference_values(model: Model, size: int, dtype: torch.dtype) -> dict[str, Float64]:
    """{"loss", "gradient <name>", "buffer <name>"} of one forward and backward pass in training.

    The masks of dropout are those of DROPOUT_SEED. Raises NoDoubleReference (float64 only), ExportError.
    """
    with _precision(dtype, size), DropoutCalls(masked(DROPOUT_SEED)):
        module, inputs, target = _copy(model, size, dtype)
        loss = model.loss.reference(module(*inputs), target)
        if loss.dtype != dtype:
            raise NoDoubleReference
        loss.backward()  # type: ignore[no-untyped-call]
        values = {"loss": _array(loss)}
        for name, value in module.named_parameters():
            values[f"gradient {name}"] = (
                np.zeros(value.shape) if value.grad is None else _array(value.grad.to_dense())
            )
        for name in model.buffers:
            values[f"buffer {name}"] = _array(module.get_buffer(name))
    return values


def reference_inference(model: Model, size: int, dtype: torch.dtype) -> dict[str, Float64]:
    """{"evaluation loss", "evaluation <output>", "inference <output>"}, of module.eval().

    Raises NoDoubleReference (float64 only), UnsupportedModel if eval() cannot be compared, ExportError.
    """
    with _precision(dtype, size), torch.no_grad():
        module, inputs, target = _copy(model, size, dtype)
        try:
            returned = module.eval()(*inputs)
            outputs = as_outputs(returned)
        except Exception as error:
            raise UnsupportedModel(
                f"the module computes something else in eval(): it fails: {explain(error)}"
            ) from error
        if len(outputs) != len(model.output_specs):
            raise UnsupportedModel(
                f"the module computes something else in eval(): {len(outputs)} outputs instead of "
                f"{len(model.output_specs)}"
            )
        values = {"evaluation loss": _array(model.loss.reference(returned, target))}
        for spec, output in zip(model.output_specs, outputs, strict=True):
            values[f"evaluation {spec.name}"] = values[f"inference {spec.name}"] = _array(output)
    return values


def reference_steps(
    model: Model, size: int, hyper: Hyperparameters, dtype: torch.dtype
) -> dict[str, Float64]:
    """{"norm 1", "norm 2", "parameter <name>", "buffer <name>"}: two steps of torch.optim, clipped.

    The masks of dropout are of DROPOUT_SEED + 1 and + 2. Raises NoDoubleReference (float64 only), ExportError.
    """
    values: dict[str, Float64] = {}
    with _precision(dtype, size):
        module, inputs, target = _copy(model, size, dtype)
        optimizer = _OPTIMIZERS[hyper.optimizer](module.parameters(), hyper)
        for step in (1, 2):
            optimizer.zero_grad()
            with DropoutCalls(masked(DROPOUT_SEED + step)):
                model.loss.reference(module(*inputs), target).backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(module.parameters(), hyper.max_grad_norm)
            values[f"norm {step}"] = _array(norm)
            optimizer.step()
        for name, value in model.tensors(module).items():
            kind = "buffer" if name in model.buffers else "parameter"
            values[f"{kind} {name}"] = _array(value)
    return values


def _sgd(parameters: Iterator[torch.nn.Parameter], h: Hyperparameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters, h.learning_rate, h.momentum, weight_decay=h.weight_decay, nesterov=h.nesterov
    )


def _adam(parameters: Iterator[torch.nn.Parameter], h: Hyperparameters) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if h.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, h.learning_rate, (h.beta1, h.beta2), h.epsilon, h.weight_decay)


_OPTIMIZERS = {"sgd": _sgd, "adam": _adam, "adamw": _adam}


class _Widen(TorchFunctionMode):
    """Every float32 becomes float64: also ``x.float()``, constants of the module, and weights of a loss."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args, kwargs = tree_map(_widen, (args, kwargs or {}))
        return func(*args, **kwargs)


def _widen(value: object) -> object:
    if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
        return value.double()
    return torch.float64 if value is torch.float32 else value


@contextmanager
def _precision(dtype: torch.dtype, size: int) -> Iterator[None]:
    """Computes in ``dtype``, and turns what torch raises into our errors."""
    default = torch.get_default_dtype()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if dtype is torch.float64:
                torch.set_default_dtype(torch.float64)
                with _Widen():
                    yield
            else:
                yield
    except NoDoubleReference:
        raise
    except Exception as error:
        if dtype is torch.float64:
            raise NoDoubleReference from error
        if isinstance(error, ExportError):
            raise
        raise ExportError(
            f"the model does not train in torch at batch size {size}: {explain(error)}"
        ) from error
    finally:
        torch.set_default_dtype(default)


def _copy(
    model: Model, size: int, dtype: torch.dtype
) -> tuple[torch.nn.Module, list[torch.Tensor], torch.Tensor]:
    inputs, target = model.batch(size)
    *converted, label = (
        value.to(dtype) if value.is_floating_point() else value for value in (*inputs, target)
    )
    return copy.deepcopy(model.module).to(dtype), converted, label


def _array(value: torch.Tensor) -> Float64:
    return value.detach().numpy().astype(np.float64)
