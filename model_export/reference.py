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

from model_export.errors import ExportError, UnsupportedModel, explain
from model_export.model import Model, as_outputs

LEARNING_RATE, MOMENTUM = 0.05, 0.9

Float64 = npt.NDArray[np.float64]


class NoDoubleReference(Exception):
    """The model does not compute in float64; use float32."""


def reference_values(model: Model, size: int, dtype: torch.dtype) -> dict[str, Float64]:
    """{"loss", "gradient <name>", "evaluation <output>", "inference <output>"}, the last from eval().

    Raises NoDoubleReference (float64 only), UnsupportedModel if eval() cannot be compared, ExportError.
    """
    with _precision(dtype, size):
        module, inputs, target = _copy(model, size, dtype)
        returned = module(*inputs)
        loss = model.loss.reference(returned, target)
        if loss.dtype != dtype:
            raise NoDoubleReference
        loss.backward()  # type: ignore[no-untyped-call]
        values = {"loss": _array(loss), "evaluation loss": _array(loss)}
        for name, value in module.named_parameters():
            values[f"gradient {name}"] = (
                np.zeros(value.shape) if value.grad is None else _array(value.grad.to_dense())
            )
        try:
            inferred = as_outputs(module.eval()(*inputs))
        except Exception as error:
            raise UnsupportedModel(
                f"the module computes something else in eval(): it fails: {explain(error)}"
            ) from error
        if len(inferred) != len(model.output_specs):
            raise UnsupportedModel(
                f"the module computes something else in eval(): {len(inferred)} outputs instead of "
                f"{len(model.output_specs)}"
            )
        for spec, evaluated, output in zip(model.output_specs, as_outputs(returned), inferred, strict=True):
            values[f"evaluation {spec.name}"] = _array(evaluated)
            values[f"inference {spec.name}"] = _array(output)
    return values


def reference_steps(model: Model, size: int, max_norm: float, dtype: torch.dtype) -> dict[str, Float64]:
    """{"norm 1", "norm 2", "parameter <name>"}: two steps of torch.optim.SGD, clipped to ``max_norm``.

    Raises NoDoubleReference (float64 only), ExportError.
    """
    values: dict[str, Float64] = {}
    with _precision(dtype, size):
        module, inputs, target = _copy(model, size, dtype)
        optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        for step in (1, 2):
            optimizer.zero_grad()
            model.loss.reference(module(*inputs), target).backward()  # type: ignore[no-untyped-call]
            values[f"norm {step}"] = _array(torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm))
            optimizer.step()
        for name, value in module.named_parameters():
            values[f"parameter {name}"] = _array(value)
    return values


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
