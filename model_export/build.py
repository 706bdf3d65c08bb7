"""From ``build()`` to a checked artifact, stage by stage."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from edge_runtime.protocol.artifact import Artifact
from model_export.errors import ExportError, explain
from model_export.forward import forward_graph
from model_export.graphs import make_graphs
from model_export.manifest import check_name, make_artifact
from model_export.model import Model, check_model
from model_export.parity import Check, check_parity

STAGES = (
    "running build()",
    "tracing the model in torch",
    "writing the training graphs",
    "comparing them with torch",
)


class Result(NamedTuple):
    """A checked artifact and the comparisons it passed."""

    model: Model
    artifact: Artifact
    checks: list[Check]


def build_artifact(
    build: Callable[[], object], *, name: str, seed: int, progress: Callable[[str], None] = lambda stage: None
) -> Result:
    """Exports what ``build`` returns; the same source and seed give the same bytes.

    ``progress`` is told each of STAGES as it begins.
    Raises ExportError: UnsupportedModel, MissingRule, ParityError.
    """
    check_name(name)
    progress(STAGES[0])
    model = check_model(build, name, seed)
    progress(STAGES[1])
    forward = forward_graph(model)
    progress(STAGES[2])
    artifact = make_artifact(model, make_graphs(forward, model.specs))
    progress(STAGES[3])
    return Result(model, artifact, check_parity(model, artifact))


def import_build(reference: str, folder: Path, *, seed: int = 0) -> Callable[[], object]:
    """The function named ``module:function``, importable from ``folder`` or installed.

    Torch's generator is at ``seed`` while the module runs, so that what it draws on import is the same each time.
    Raises ExportError.
    """
    module_name, _, function_name = reference.partition(":")
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", reference):
        raise ExportError(f"{reference!r} must look like my_module:build (no .py, no path)")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    torch.manual_seed(seed)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        hint = (
            f"there is no {module_name.replace('.', '/')}.py in {folder}"
            if error.name == module_name
            else error
        )
        raise ExportError(f"cannot import {module_name}: {hint}") from error
    except Exception as error:
        raise ExportError(f"{module_name} fails on import: {explain(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ExportError(f"{module_name} has no function {function_name}()")
    build: Callable[[], object] = function
    return build
