"""What a modeller types and reads: build with weights, check, inspect."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from model_export import cli
from tests.support.command_line import run

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
ARTIFACT = DIGITS / "artifact"

MODEL = """
import torch
def build():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5))
    return module, (torch.randn(4, 2),), torch.arange(4) % 3, "cross_entropy"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "tiny", raising=False)
    return tmp_path


def refused(*words: str) -> str:
    done = run(cli.main, *words)
    assert (done.code, done.out) == (1, ""), done
    assert "Traceback" not in done.err
    return done.err


@pytest.mark.long
def test_build_from_weights_then_check_and_inspect(folder: Path) -> None:
    arrays = {
        "0.weight": np.full((3, 2), 0.25, np.float32),
        "0.bias": np.zeros(3, np.float32),
        "1.weight": np.ones(3, np.float32),
        "1.bias": np.zeros(3, np.float32),
        "1.running_mean": np.full(3, 7, np.float32),
        "1.running_var": np.full(3, 2, np.float32),
    }
    np.savez("w.npz", **arrays)  # type: ignore[arg-type]
    done = run(cli.main, "build", "tiny:build", "--weights", "w.npz")
    assert done.code == 0, done
    assert "running statistics after 2 accumulated steps of AdamW" in done.out
    assert "15 parameters and 6 running statistics in 6 tensors" in done.out
    theta = np.frombuffer((folder / "artifact" / "params.bin").read_bytes(), "<f4")
    assert theta.tolist() == [0.25] * 6 + [0] * 3 + [1] * 3 + [0] * 3 + [7] * 3 + [2] * 3

    done = run(cli.main, "check", "artifact")
    assert done.code == 0, done
    assert "two steps of AdamW, fused and accumulated" in done.out
    assert "from torch when it was built (onnxruntime " in done.out
    done = run(cli.main, "check", "artifact", "tiny:build")
    assert "buffer 1.running_var" in done.out
    assert "checks passed" in done.out

    done = run(cli.main, "inspect", "artifact", "--json")
    document = json.loads(done.out)
    assert (document["name"], document["dropout"], document["trainable"]) == ("tiny", True, 15)
    assert document["memory"][0]["batch"] == 1

    del arrays["0.bias"]
    np.savez("w.npz", extra=np.zeros(1, np.float32), **arrays)  # type: ignore[arg-type]
    told = refused("build", "tiny:build", "--weights", "w.npz", "--out", "other")
    assert "w.npz does not fit the module: missing: 0.bias; unknown: extra" in told
    assert not (folder / "other").exists()


def test_weights_that_are_a_pickle_are_refused_with_the_way_out(folder: Path) -> None:
    (folder / "model.pt").write_bytes(b"\x80\x04.")
    told = refused("build", "tiny:build", "--weights", "model.pt")
    assert "is a pickle" in told
    assert "numpy.savez('weights.npz'" in told


def test_inspect_shows_tensors_operators_and_memory() -> None:
    done = run(cli.main, "inspect", str(ARTIFACT))
    assert done.code == 0, done
    for words in (
        "hidden.weight",
        "(64, 512)",
        "32,768",
        "labels 0 to 9",
        "MaxPool",
        "step_adam",
        "activations",
        "512",
    ):
        assert words in done.out


def test_check_needs_no_torch_and_says_what_it_could_not_compare() -> None:
    done = run(cli.main, "check", str(ARTIFACT))
    assert done.code == 0, done
    assert "There is no parity.json of these files" in done.out
    assert "every file is what the manifest names, 12 checks passed" in done.out


@pytest.mark.parametrize("command", ["check", "inspect"])
def test_a_changed_file_is_named(command: str, tmp_path: Path) -> None:
    copy = shutil.copytree(ARTIFACT, tmp_path / "artifact")
    (copy / "grad.onnx").write_bytes((copy / "grad.onnx").read_bytes() + b"\0")
    assert "artifact file grad.onnx is not what the manifest names" in refused(command, str(copy))
    assert "model-export build --out writes" in refused(command, str(tmp_path / "nowhere"))


def test_an_artifact_of_the_old_format_says_build_it_again(tmp_path: Path) -> None:
    copy = shutil.copytree(ARTIFACT, tmp_path / "artifact")
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 1'))
    assert "build it again with model-export" in refused("inspect", str(copy))
