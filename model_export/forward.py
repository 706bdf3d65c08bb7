"""torch -> an ONNX graph of loss and outputs, with every parameter and running statistic an input of the graph."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxscript.optimizer
import torch
from torch import nn
from torch.export import ExportedProgram

from model_export.autodiff.reverse import DETACH
from model_export.dropout_calls import TRANSLATIONS, DropoutCalls, traced
from model_export.errors import ExportError, UnsupportedModel
from model_export.graph import OPSET, Graph, ValueType, from_proto, infer_types
from model_export.model import Model, aliases, as_outputs
from model_export.passes import drop_identities
from model_export.tracing import check_any_batch, export_failure

BATCH = "batch"
_MARKER = "fleetgrad.detach"


def parameter_value(name: str) -> str:
    """The name of a parameter's value in the graphs: one that no torch name and no input can have."""
    return f"@{name}"


class _WithLoss(nn.Module):
    """(*inputs, target) -> (loss, *outputs)."""

    def __init__(self, model: Model, calls: DropoutCalls) -> None:
        super().__init__()
        self.module = model.module
        self._loss = model.loss.exported
        self._calls = calls

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self._calls.restart()
        *inputs, target = values
        returned = self.module(*inputs)
        return (self._loss(returned, target), *as_outputs(returned))


def forward_graph(model: Model) -> Graph:
    """Inputs: parameters and buffers by parameter_value(), inputs, target; outputs: ``loss`` (), then outputs.

    The first dimension of inputs, target and outputs is the symbol "batch". BatchNormalization and Dropout are in
    it as torch wrote them, for training and inference alike: decompose() tells the two apart. Raises ExportError.
    """
    proto = _trace(model)
    _keep_origin(proto)
    graph = from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    values = [*model.input_specs, model.target_spec]
    names = list(graph.inputs)[: len(values)]
    graph.rename(dict(zip(names, [value.name for value in values], strict=True)))
    graph.rename(
        dict(zip(graph.outputs, ["loss", *(value.name for value in model.output_specs)], strict=True))
    )
    graph.inputs = {
        **{parameter_value(spec.name): ValueType(np.dtype(np.float32), spec.shape) for spec in model.specs},
        **{value.name: ValueType(np.dtype(value.dtype), (BATCH, *value.shape)) for value in values},
    }
    for value in model.output_specs:
        shape = graph.outputs[value.name].shape
        if shape != (BATCH, *value.shape):
            raise UnsupportedModel(
                f"{value.name} has shape {shape} for any batch, not {(BATCH, *value.shape)}"
            )
    graph.types.update(graph.inputs)
    drop_identities(graph, keep={node.outputs[0] for node in graph.nodes if node.torch_op == DETACH})
    infer_types(graph)
    return graph


def _trace(model: Model) -> onnx.ModelProto:
    """Exports without optimising, makes parameters inputs, and only then folds constants.

    The exporter's own optimiser would merge equal weights, transpose them or fuse them away.
    """
    inputs, target = model.batch(max(2, model.target.shape[0]))  # tracing takes a batch of 1 for a constant
    batch = torch.export.Dim(BATCH, min=1)
    try:
        with _quiet(), traced() as calls:
            program = torch.onnx.export(
                _WithLoss(model, calls),
                (*inputs, target),
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                dynamic_shapes=(tuple({0: batch} for _ in (*inputs, target)),),
                custom_translation_table=TRANSLATIONS,
            )
            if program is None or program.exported_program is None:
                raise ExportError("torch's exporter returned nothing")
            check_any_batch(program.exported_program)
            _check_mutations(program.exported_program, model)
            _parameters_to_inputs(program.model, model)
            _mark_detached(program.model)
            onnxscript.optimizer.optimize_ir(program.model)
            return program.model_proto
    except ExportError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, ExportError):  # raised inside the exporter, by one of our modes
            raise cause from None
        raise ExportError(export_failure(error)) from error


def _check_mutations(program: ExportedProgram, model: Model) -> None:
    """What forward() writes into buffers the exporter drops: only running statistics are made anew, no others."""
    known = {
        f"module.{name.rpartition('running_')[0]}{suffix}"
        for name in aliases(model.module, model.buffers)
        for suffix in ("running_mean", "running_var", "num_batches_tracked")
    }
    changed = sorted(set(program.graph_signature.buffers_to_mutate.values()) - known)
    if changed:
        raise UnsupportedModel(
            f"forward() changes the buffers {', '.join(name.removeprefix('module.') for name in changed[:5])}: "
            "only running statistics of BatchNorm may change in training; compute the value from the inputs instead"
        )


def _parameters_to_inputs(ir: Any, model: Model) -> None:
    """Moves every parameter and running statistic from the initializers to the inputs, under its torch name.

    Other buffers stay: constants.
    """
    prefix = "module."
    tied = aliases(model.module, [spec.name for spec in model.specs])
    found: dict[str, Any] = {}
    for key in [key for key in ir.graph.initializers if key.removeprefix(prefix) in tied]:
        value = ir.graph.initializers.pop(key)
        name = tied[key.removeprefix(prefix)]
        if name in found:
            value.replace_all_uses_with(found[name])
            continue
        value.const_value = None
        value.name = parameter_value(name)
        found[name] = value
        ir.graph.inputs.append(value)
    if missing := [spec.name for spec in model.specs if spec.name not in found]:
        raise UnsupportedModel(
            f"the loss does not use the parameters {', '.join(missing[:10])}: use them in forward() or remove them"
        )


def _mark_detached(ir: Any) -> None:
    """detach() arrives as an Identity; optimising would drop it and let a gradient through."""
    for node in ir.graph:
        if node.op_type == "Identity" and DETACH in node.metadata_props.get(
            "pkg.torch.onnx.class_hierarchy", ""
        ):
            node.domain = _MARKER
    ir.opset_imports[_MARKER] = 1


def _keep_origin(proto: onnx.ModelProto) -> None:
    """Reduces the exporter's notes on each node to two words: the torch module and the torch operator."""
    kept = [entry for entry in proto.opset_import if entry.domain != _MARKER]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    for node in proto.graph.node:
        if node.domain == _MARKER:
            node.domain = ""
        notes = {entry.key: entry.value for entry in node.metadata_props}
        del node.metadata_props[:]
        scopes = _list(notes.get("pkg.torch.onnx.name_scopes", ""))
        classes = _list(notes.get("pkg.torch.onnx.class_hierarchy", ""))
        if len(scopes) >= 2 and len(classes) >= 2:
            path = scopes[-2].removeprefix("module").removeprefix(".")
            kind = classes[-2].rsplit(".", 1)[-1]
            module = "the loss" if kind == _WithLoss.__name__ else f"{path} ({kind})" if path else kind
            onnx.helper.set_metadata_props(node, {"module": module, "torch_op": classes[-1]})


def _list(text: str) -> list[str]:
    try:
        value = ast.literal_eval(text) if text else []
    except (ValueError, SyntaxError):
        return []
    return [str(item) for item in value] if isinstance(value, list) else []


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's progress, advice and warnings off the terminal."""
    loggers = [
        logging.getLogger(name) for name in ("torch", "torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
