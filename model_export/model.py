"""What ``build()`` returns, checked: the model to export. Refuses what this version does not cover, by name."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from edge_runtime.protocol.artifact import MAX_TENSORS, OPTIMIZERS, TargetSpec, ValueSpec
from edge_runtime.protocol.tensors import TensorSpec, Vector, flatten, layout, unflatten
from model_export.dropout import SEED
from model_export.errors import ExportError, UnsupportedModel, explain
from model_export.losses import LOSSES, Loss, custom
from model_export.optimizers import SCALARS

DTYPES = {
    torch.bool: "bool",
    torch.float32: "float32",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.uint8: "uint8",
}
TARGET = "target"
RESERVED = frozenset(
    {
        *("theta", "new_theta", "gradient", "accumulator", "new_accumulator", "scale", SEED),
        *("loss", "grad_norm", TARGET),
        *(name for state in OPTIMIZERS.values() for vector in state for name in (vector, f"new_{vector}")),
        *(name for scalars in SCALARS.values() for name in scalars),
    }
)
_LATER = "a later version will cover it"
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_UNSUPPORTED = {
    nn.modules.batchnorm._NormBase: (
        f"running statistics are covered for BatchNorm1d, 2d and 3d only; {_LATER}. Use one of these, or GroupNorm"
    ),
    nn.RNNBase: f"recurrent layers are not covered; {_LATER}",
    nn.AlphaDropout: "it is not covered; use Dropout",
    nn.FeatureAlphaDropout: "it is not covered; use Dropout2d",
}
_EMBEDDING = {  # what torch does to the gradient or the weight behind the graph's back
    "padding_idx": "multiply the result by (index != padding).unsqueeze(-1) instead",
    "max_norm": "normalise the looked-up rows in forward() instead",
    "scale_grad_by_freq": "leave it out",
    "sparse": "leave it out",
}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")


@dataclass(frozen=True)
class Model:
    """A model in float32 with an example batch.

    ``specs``: its parameters in the order of named_parameters, then its ``buffers``, the running statistics of
    BatchNorm in the order of the modules. Modules that were in eval() when build() returned are frozen so.
    """

    name: str
    module: nn.Module
    inputs: tuple[torch.Tensor, ...]
    target: torch.Tensor
    loss: Loss
    specs: tuple[TensorSpec, ...]
    buffers: tuple[str, ...]
    input_specs: tuple[ValueSpec, ...]
    target_spec: TargetSpec
    output_specs: tuple[ValueSpec, ...]

    def theta(self) -> Vector:
        """Parameters and buffers as they are now, float32 of shape (d,)."""
        return flatten(self.specs, {name: value.numpy() for name, value in self.tensors(self.module).items()})

    def start_at(self, theta: Vector) -> None:
        """The inverse of ``theta``. Raises TensorError for another shape."""
        values = unflatten(self.specs, theta)
        with torch.no_grad():
            for name, tensor in self.tensors(self.module).items():
                tensor.copy_(torch.from_numpy(values[name].copy()))

    def tensors(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """Parameters and buffers of ``module``, which is this model's or a copy of it, by name."""
        values: dict[str, torch.Tensor] = dict(module.named_parameters())
        values.update((name, module.get_buffer(name)) for name in self.buffers)
        return {name: value.detach() for name, value in values.items()}

    def batch(self, size: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """The example batch repeated or cut to ``size`` samples, contiguous."""
        rows = torch.arange(size) % self.target.shape[0]
        return tuple(value[rows].contiguous() for value in self.inputs), self.target[rows].contiguous()


def as_outputs(value: object) -> tuple[torch.Tensor, ...]:
    """What a module returned, as a tuple of tensors. Raises UnsupportedModel."""
    outputs = tuple(value) if isinstance(value, tuple | list) else (value,)
    if not outputs or not all(isinstance(output, torch.Tensor) for output in outputs):
        raise UnsupportedModel("the module must return a tensor or a tuple of tensors")
    return outputs


def aliases(module: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Every name that ``module`` has for the parameters and buffers called ``names``, to the one in ``names``.

    A tensor or a layer that is used twice has several.
    """
    every = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    wanted = set(names)
    canonical = {id(value): name for name, value in every if name in wanted}
    return {name: canonical[id(value)] for name, value in every if id(value) in canonical}


def check_model(build: Callable[[], object], name: str, seed: int) -> Model:
    """Calls ``build`` with torch's generator at ``seed`` and checks what it returns.

    ``name``: letters, digits, ``_ . -``. Raises UnsupportedModel or ExportError.
    """
    torch.manual_seed(seed)
    try:
        returned = build()
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"build() fails: {explain(error)}") from error
    if not isinstance(returned, tuple) or len(returned) != 4:
        raise ExportError("build() must return (module, inputs, target, loss)")
    module, inputs, target, loss = returned
    if not isinstance(module, nn.Module):
        raise ExportError(
            f"the first thing build() returns must be a torch.nn.Module, not {type(module).__name__}"
        )
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, tuple | list) or not all(isinstance(value, torch.Tensor) for value in inputs):
        raise ExportError("the second thing build() returns must be a tuple of example input tensors")
    if not isinstance(target, torch.Tensor):
        raise ExportError("the third thing build() returns must be an example target tensor")
    inputs = tuple(inputs)
    _check_batch((*inputs, target))
    buffers = _check_module(module)
    _set_modes(module)
    chosen = _loss(loss)
    outputs = _try(module, inputs, target, chosen)
    return Model(
        name=name,
        module=module,
        inputs=inputs,
        target=target,
        loss=chosen,
        specs=layout(
            [
                *((key, value.shape) for key, value in module.named_parameters()),
                *((key, module.get_buffer(key).shape) for key in buffers),
            ]
        ),
        buffers=buffers,
        input_specs=tuple(
            ValueSpec(key, DTYPES[value.dtype], tuple(value.shape[1:]))
            for key, value in zip(_input_names(module, len(inputs)), inputs, strict=True)
        ),
        target_spec=TargetSpec(
            TARGET,
            DTYPES[target.dtype],
            tuple(target.shape[1:]),
            outputs[0].shape[1] if chosen.kind == "cross_entropy" else None,
        ),
        output_specs=tuple(
            ValueSpec(
                f"output_{i}" if len(outputs) > 1 else "output", DTYPES[value.dtype], tuple(value.shape[1:])
            )
            for i, value in enumerate(outputs)
        ),
    )


def _check_batch(values: tuple[torch.Tensor, ...]) -> None:
    for value in values:
        if value.dtype not in DTYPES:
            raise UnsupportedModel(f"an example is {value.dtype}; use one of {', '.join(DTYPES.values())}")
        if value.ndim < 1 or value.shape[0] != values[0].shape[0] or 0 in value.shape:
            raise ExportError(
                "the example inputs and target must be batches of one size, with the batch first"
            )
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ExportError("the example inputs and target must be finite")


def _set_modes(module: nn.Module) -> None:
    """Training mode, but for what build() left in eval(): that is frozen, as in fine-tuning."""
    frozen = [child for child in module.modules() if not child.training]
    switches = (*BATCH_NORM, nn.modules.dropout._DropoutNd)
    if not module.training and any(isinstance(child, switches) for child in module.modules()):
        raise UnsupportedModel(
            "the whole module is in eval(), so that BatchNorm and dropout would never be trained with: call "
            "module.train() in build(), and then eval() on the parts that stay frozen"
        )
    module.train()
    if module not in frozen:
        for child in frozen:
            child.training = False


def _check_module(module: nn.Module) -> tuple[str, ...]:
    """The names of the buffers that are trained: running statistics."""
    for path, child in module.named_modules():
        for kind, why in _UNSUPPORTED.items():
            covered = isinstance(child, BATCH_NORM) or (
                isinstance(child, nn.modules.batchnorm._NormBase) and child.running_mean is None
            )
            idle = isinstance(child, nn.modules.dropout._DropoutNd) and child.p == 0
            if isinstance(child, kind) and not covered and not idle:
                raise UnsupportedModel(f"{type(child).__name__} at {path or 'the top'}: {why}")
        if isinstance(child, BATCH_NORM) and child.momentum is None and child.running_mean is not None:
            raise UnsupportedModel(
                f"{type(child).__name__} at {path or 'the top'}: momentum=None averages over all batches ever "
                "seen, which has no meaning when devices take turns; give it a momentum, such as 0.1"
            )
        if isinstance(child, nn.MultiheadAttention) and child.dropout > 0:
            raise UnsupportedModel(
                f"MultiheadAttention at {path or 'the top'}: dropout of its attention weights is not covered; give "
                "it dropout=0 (in a TransformerEncoderLayer: layer.self_attn.dropout = 0.0)"
            )
        if isinstance(child, nn.Embedding | nn.EmbeddingBag):
            for option, remedy in _EMBEDDING.items():
                value = getattr(child, option, None)
                if value is not None and value is not False:  # 0 is a padding index
                    raise UnsupportedModel(
                        f"{type(child).__name__} at {path or 'the top'}: {option} is not covered; {remedy}"
                    )
        if child._backward_hooks or child._backward_pre_hooks:
            raise UnsupportedModel(
                f"{type(child).__name__} at {path or 'the top'} has a backward hook: remove it, a graph has none"
            )
    parameters = list(module.named_parameters())
    if not parameters or len(parameters) > MAX_TENSORS:
        raise UnsupportedModel(
            f"the module has {len(parameters)} parameter tensors; 1 to {MAX_TENSORS} are allowed"
        )
    for name, value in parameters:
        if value.dtype != torch.float32:
            raise UnsupportedModel(f"parameter {name} is {value.dtype}; convert the module with .float()")
        if not value.requires_grad:
            raise UnsupportedModel(f"parameter {name} is frozen (requires_grad=False); {_LATER}")
        if value._backward_hooks or getattr(value, "_post_accumulate_grad_hooks", None):
            raise UnsupportedModel(
                f"parameter {name} has a gradient hook: remove it, no graph can hold it (the plan can clip)"
            )
        if not _NAME.fullmatch(name):
            raise UnsupportedModel(f"parameter {name!r}: a name is 1-200 of A-Z a-z 0-9 _ . -")
        if name == "theta" or (name.startswith("output") and "." not in name):
            raise UnsupportedModel(f"parameter {name}: the graphs use this name; rename it")
        if not torch.isfinite(value).all():
            raise ExportError(f"parameter {name} is not finite")
    statistics = tuple(
        name
        for name, _ in module.named_buffers()
        if isinstance(module.get_submodule(name.rpartition(".")[0]), BATCH_NORM)
        and name.rpartition(".")[2] in ("running_mean", "running_var")
    )
    for name, value in module.named_buffers():
        if name in statistics and value.dtype != torch.float32:
            raise UnsupportedModel(f"buffer {name} is {value.dtype}; convert the module with .float()")
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ExportError(f"buffer {name} is not finite")
    if len(parameters) + len(statistics) > MAX_TENSORS:
        raise UnsupportedModel(f"the module has more than {MAX_TENSORS} parameter tensors and statistics")
    return statistics


def _loss(loss: object) -> Loss:
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ExportError(
                f"unknown loss {loss!r}; one of {', '.join(LOSSES)}, or a callable (outputs, target)"
            )
        return LOSSES[loss]
    if not callable(loss):
        raise ExportError(
            f"the loss must be one of {', '.join(LOSSES)} or a callable, not {type(loss).__name__}"
        )
    return custom(loss)


def _try(
    module: nn.Module, inputs: tuple[torch.Tensor, ...], target: torch.Tensor, loss: Loss
) -> tuple[torch.Tensor, ...]:
    """Runs a copy once in torch, so that its own mistakes are told apart from ours.

    A copy, since running statistics would move.
    """
    try:
        returned = copy.deepcopy(module)(*inputs)
    except Exception as error:
        raise ExportError(f"the module does not run on the example inputs: {explain(error)}") from error
    outputs = as_outputs(returned)
    if loss.kind != "custom" and isinstance(returned, tuple | list):
        raise ExportError(
            f"the module returns several outputs; {loss.kind} takes one tensor: pass a callable"
        )
    if loss.kind == "cross_entropy" and (outputs[0].ndim < 2 or target.dtype != torch.int64):
        raise ExportError("cross_entropy takes outputs (batch, classes, ...) and an int64 target of labels")
    if loss.kind in ("mse", "bce_with_logits") and outputs[0].shape != target.shape:
        raise ExportError(
            f"{loss.kind} takes a target of the output's shape {tuple(outputs[0].shape)}, not {tuple(target.shape)}"
        )
    if loss.kind == "cross_entropy" and not 0 <= int(target.min()) <= int(target.max()) < outputs[0].shape[1]:
        raise ExportError(
            f"the example's labels must be in 0..{outputs[0].shape[1] - 1}, the output's classes; they go from "
            f"{int(target.min())} to {int(target.max())}. For labels that do not count pass the loss as a function"
        )
    try:
        value = loss.reference(returned, target)
    except Exception as error:
        raise ExportError(f"the loss does not run on the example: {explain(error)}") from error
    if not isinstance(value, torch.Tensor) or value.shape != () or value.dtype != torch.float32:
        shape = getattr(value, "shape", type(value).__name__)
        raise UnsupportedModel(f"the loss must be one float32 number of shape (), not {shape}: take the mean")
    if not torch.isfinite(value):
        raise ExportError("the loss is not finite on the example")
    for output in outputs:
        if output.ndim < 1 or output.shape[0] != target.shape[0] or output.dtype not in DTYPES:
            raise UnsupportedModel(f"every output must have the batch first, not shape {tuple(output.shape)}")
    if loss.kind == "custom":
        _check_mean(loss, returned, target, float(value.detach()))
    return outputs


def _check_mean(loss: Loss, returned: object, target: torch.Tensor, once: float) -> None:
    """Refuses a loss that is a sum: its steps would grow with the batch size.

    A mean does not change when the batch is repeated; a contrastive loss may, but ever more slowly.
    """

    def repeated(times: int) -> float:
        values = [torch.cat([output.detach()] * times) for output in as_outputs(returned)]
        again = values[0] if isinstance(returned, torch.Tensor) else type(returned)(values)  # type: ignore[call-arg]
        return float(loss.reference(again, torch.cat([target] * times)))

    try:
        twice, four = repeated(2), repeated(4)
    except Exception as error:
        raise ExportError(f"the loss does not run on a batch of another size: {explain(error)}") from error
    growth = twice - once
    if abs(growth) > 1e-3 * abs(once) and abs(four - twice) > 1.5 * abs(growth):
        raise UnsupportedModel(
            f"the loss grows with the batch: take the mean ({once:g} on the example, {twice:g} on it twice)"
        )


def _input_names(module: nn.Module, count: int) -> list[str]:
    """The names of forward's arguments where they can be names in the graphs."""
    taken = {name for name, _ in module.named_parameters()} | RESERVED
    names = [
        parameter.name
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    usable = len(names) >= count and not any(
        name in taken or name.startswith("output") for name in names[:count]
    )
    if usable:
        return names[:count]
    prefix = "input_"
    while any(f"{prefix}{i}" in taken for i in range(count)):
        prefix += "_"
    return [f"{prefix}{i}" for i in range(count)]
