"""What an artifact shows without its model: its graphs prove one another, and its memory is estimated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from edge_runtime.backends.artifact_folder import read_artifact_folder
from edge_runtime.protocol.artifact import Artifact, FileEntry
from edge_runtime.protocol.ids import sha256
from model_export.build import Result, build_artifact, compare_with
from model_export.errors import ExportError
from model_export.inspection import describe, step_memory
from model_export.report import Report
from model_export.verify import verify

DIGITS = Path(__file__).parents[3] / "examples" / "digits" / "artifact"


def source() -> tuple[nn.Module, tuple[torch.Tensor, ...], torch.Tensor, str]:
    module = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.MaxPool2d(2), nn.Dropout(0.2)),
        *(nn.Flatten(), nn.Linear(16, 3)),
    )
    return module, (torch.randn(4, 1, 6, 6),), torch.arange(4) % 3, "cross_entropy"


@pytest.fixture(scope="module")
def result() -> Result:
    return build_artifact(source, name="net", seed=0)


def edited(artifact: Artifact, name: str, value: float, becomes: float) -> Artifact:
    """The artifact with a scalar constant of one graph changed, and digests to match: a wrong export."""
    model = onnx.ModelProto.FromString(artifact.files[name])
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.shape == () and array.dtype == np.float32 and array == np.float32(value):
            tensor.CopyFrom(numpy_helper.from_array(np.array(becomes, np.float32), tensor.name))
            break
    else:
        pytest.fail(f"no constant {value}")
    files = {**artifact.files, name: model.SerializeToString()}
    entries = {**artifact.manifest.files, name: FileEntry(sha256(files[name]), len(files[name]))}
    return Artifact(replace(artifact.manifest, files=entries), files)


def test_a_right_artifact_verifies_itself(result: Result) -> None:
    for artifact in (result.artifact, read_artifact_folder(DIGITS)):
        checks = list(verify(artifact))
        assert all(check.passed for check in checks), [check for check in checks if not check.passed]
        of_gradients = {check.what for check in checks if check.what.startswith("gradient ")}
        trained = len(artifact.manifest.parameters) - artifact.manifest.buffers
        assert trained - 1 <= len(of_gradients) <= trained  # a bias before a normalisation has none
    assert any(check.what.startswith("loss with another dropout seed") for check in verify(result.artifact))


def test_a_wrong_gradient_or_step_is_found_without_torch(result: Result) -> None:
    wrong = edited(result.artifact, "grad.onnx", 1.25, 1.5)  # the scale of the mask
    failed = {check.what for check in verify(wrong) if not check.passed}
    assert "two steps of SGD, fused and accumulated" in failed
    wrong = edited(result.artifact, "apply_adam.onnx", 1.0, 1.1)
    assert {check.what for check in verify(wrong) if not check.passed} >= {
        "two steps of Adam, fused and accumulated"
    }


def test_an_artifact_is_compared_anew_with_its_function_only(result: Result) -> None:
    assert all(check.passed for check in compare_with(result.artifact, source))
    with pytest.raises(ExportError, match=r"another model than the artifact: parameters, .* differ"):
        compare_with(read_artifact_folder(DIGITS), source)


def test_the_kept_table_survives_and_damage_makes_it_none(result: Result) -> None:
    raw = result.report().to_bytes()
    report = Report.from_bytes(raw)
    assert report is not None
    assert report.artifact == result.artifact.digest
    assert [(c.what, c.batch) for c in report.checks] == [(c.what, c.batch) for c in result.checks]
    for damaged in (b"", b"[]", b"{}", raw[:-9], raw.replace(b'"error": ', b'"error": NaN, "x": ', 1)):
        assert Report.from_bytes(damaged) is None


def test_inspection_counts_everything(result: Result) -> None:
    document = describe(result.artifact, (1, 64))
    assert (document["trainable"], document["parameters"]) == (99, 107)
    assert [tensor["kind"] for tensor in document["tensors"]] == ["trainable"] * 6 + ["buffer"] * 2
    for name, graph in document["graphs"].items():
        nodes = onnx.ModelProto.FromString(result.artifact.files[name]).graph.node
        assert sum(graph["operators"].values()) == len(nodes)
    assert all(row["unknown_values"] == 0 for row in document["memory"])
    small, large = document["memory"]
    assert large["total_adam"] - large["activations"] == 2 * 4 * (107 + 2 * 99)
    assert large["activations"] > 20 * small["activations"]


def test_the_memory_of_a_layer_is_its_activations() -> None:
    result = build_artifact(
        lambda: (
            nn.Sequential(nn.Linear(100, 100), nn.Tanh()),
            (torch.randn(2, 100),),
            torch.randn(2, 100),
            "mse",
        ),
        name="layer",
        seed=0,
    )
    growth = step_memory(result.artifact, 2000).activations - step_memory(result.artifact, 1000).activations
    batch = 4 * 100 * 1000  # bytes of one activation
    # alive in the backward pass: input, target, the output of tanh, and a few of gradient
    assert 3 * batch <= growth <= 7 * batch
