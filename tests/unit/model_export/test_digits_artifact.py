"""The committed example artifact, and what a user does with a trained one."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from aggregator.versions.model_files import parameters_npz, publish_model
from edge_runtime.backends.artifact_folder import initial_parameters, read_artifact_folder
from edge_runtime.backends.ort import OrtBackend
from edge_runtime.protocol.ids import sha256
from model_export.build import import_build
from tests.support.gradients import run

DIGITS = Path(__file__).parents[3] / "examples" / "digits"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.long
def test_the_committed_artifact_is_what_build_makes_of_the_source_beside_it(tmp_path: Path) -> None:
    shutil.copy(DIGITS / "model.py", tmp_path)  # another folder: no path may get into the bytes
    command = [Path(sys.executable).with_name("model-export"), "build", "model:build", "--name", "digits"]
    done = subprocess.run(
        [*command, "--out", "out"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "gradient conv1.weight" in done.stdout
    made = contents(tmp_path / "out")
    assert json.loads(made.pop("parity.json"))["artifact"] == sha256(made["manifest.json"]).hex()
    assert made == contents(DIGITS / "artifact")


def test_the_artifact_is_small_and_says_nothing_of_where_it_was_made() -> None:
    files = contents(DIGITS / "artifact")
    assert sum(map(len, files.values())) < 400_000
    for name, content in files.items():
        if name.endswith(".onnx"):
            model = onnx.ModelProto.FromString(content)
            assert (model.producer_name, model.producer_version, model.doc_string) == ("", "", "")
            assert not model.metadata_props
            assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
            assert {entry.domain for entry in model.opset_import} == {""}
            assert (
                max((np.prod(tensor.dims) for tensor in model.graph.initializer), default=0) < 64
            )  # no weights


def test_a_published_model_is_standalone_and_computes_what_torch_computes() -> None:
    artifact = read_artifact_folder(DIGITS / "artifact")
    specs = artifact.manifest.parameters
    theta = initial_parameters(artifact) * np.float32(1.5)
    published = publish_model(artifact.files["infer.onnx"], specs, theta)
    model = onnx.ModelProto.FromString(published)
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.input] == ["image"]
    assert {spec.name for spec in specs} <= {tensor.name for tensor in model.graph.initializer}
    assert "Split" not in {node.op_type for node in model.graph.node}

    arrays = np.load(io.BytesIO(parameters_npz(specs, theta)))
    module = import_build("model:build", DIGITS)()[0]  # type: ignore[index]
    module.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})
    image = np.random.default_rng(0).random((5, 1, 8, 8), np.float32)
    (ours,) = run(published, {"image": image}).values()
    np.testing.assert_allclose(ours, module(torch.from_numpy(image)).detach().numpy(), rtol=1e-4, atol=1e-5)
    (inferred,) = OrtBackend().load(artifact).infer(theta, [image])
    np.testing.assert_allclose(ours, inferred, rtol=1e-4, atol=1e-5)


def test_publishing_is_a_function_of_its_arguments() -> None:
    artifact = read_artifact_folder(DIGITS / "artifact")
    arguments = artifact.files["infer.onnx"], artifact.manifest.parameters, initial_parameters(artifact)
    assert publish_model(*arguments) == publish_model(*arguments)
    assert parameters_npz(*arguments[1:]) == parameters_npz(*arguments[1:])


def test_the_command_explains_a_failure_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Linear):\n"
        "    def forward(self, x): return super().forward(x).cumsum(1)\n"
        "def build(): return Net(2, 2), (torch.ones(2, 2),), torch.arange(2), 'cross_entropy'\n"
    )
    command = [Path(sys.executable).with_name("model-export"), "build", "wrong:build", "--out", "artifact"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "not exported:" in done.stderr
    assert "CumSum" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "artifact").exists()
