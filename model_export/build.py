"""From ``build()`` to a checked artifact, stage by stage."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from edge_runtime.backends.artifact_folder import initial_parameters
from edge_runtime.backends.ort import OrtBackend
from edge_runtime.protocol.artifact import Artifact
from model_export.decompositions import has_dropout
from model_export.errors import ExportError, explain
from model_export.forward import forward_graph
from model_export.graphs import make_graphs
from model_export.manifest import check_name, make_artifact
from model_export.model import Model, check_model
from model_export.parity import check_parity, compare
from model_export.report import Check, Report
from model_export.weights import load_weights, read_weights

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

    def report(self) -> Report:
        """What is left beside the artifact."""
        versions = {"onnxruntime": OrtBackend().runtime().rpartition(" ")[2], "torch": torch.__version__}
        return Report(self.artifact.digest, versions, self.checks)


def build_artifact(
    build: Callable[[], object],
    *,
    name: str,
    seed: int,
    weights: Path | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Result:
    """Exports what ``build`` returns, with the ``weights`` of a file if one is given.

    The same source, seed and weights give the same bytes. ``progress`` is told each of STAGES as it begins.
    Raises ExportError: UnsupportedModel, MissingRule, ParityError, WeightsError.
    """
    check_name(name)
    arrays = read_weights(weights) if weights else None
    progress(STAGES[0])
    model = check_model(build, name, seed)
    if arrays is not None:
        load_weights(model, arrays, str(weights))
    progress(STAGES[1])
    forward = forward_graph(model)
    progress(STAGES[2])
    graphs = make_graphs(forward, model.specs, len(model.buffers))
    artifact = make_artifact(model, graphs, dropout=has_dropout(forward))
    progress(STAGES[3])
    return Result(model, artifact, check_parity(model, artifact))


def compare_with(
    artifact: Artifact, build: Callable[[], object], *, progress: Callable[[str], None] = lambda stage: None
) -> list[Check]:
    """The comparison of an artifact, at its own parameters, with what ``build`` returns: passed or not.

    Raises ExportError, also if that is another model.
    """
    progress(STAGES[0])
    manifest = artifact.manifest
    model = check_model(build, manifest.name, 0)
    ours = (model.specs, len(model.buffers), model.input_specs, model.target_spec, model.output_specs)
    theirs = (manifest.parameters, manifest.buffers, manifest.inputs, manifest.target, manifest.outputs)
    words = ("parameters", "number of buffers", "inputs", "target", "outputs")
    differ = [word for word, a, b in zip(words, ours, theirs, strict=True) if a != b]
    if model.loss.kind != manifest.loss:
        differ.append("loss")
    if differ:
        raise ExportError(
            f"the function describes another model than the artifact: {', '.join(differ)} differ"
        )
    model.start_at(initial_parameters(artifact))
    progress(STAGES[3])
    return compare(model, artifact)


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
