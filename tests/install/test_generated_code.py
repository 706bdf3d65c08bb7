"""The generated protobuf code where its compiler cannot be installed."""

from __future__ import annotations

import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """.ci/protobuf.py as on Python 3.13."""
    spec = spec_from_file_location("ci_protobuf", ROOT / ".ci" / "protobuf.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HAS_WHEELS", False)
    return module


def test_without_the_compiler_the_written_down_digests_are_compared_and_it_says_so(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["protobuf.py", "--check"])
    assert script.main() == 0
    assert "by SHA-256 only" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["wire.proto", "wire_pb2.py", "wire_pb2.pyi"])
def test_a_schema_or_a_generated_file_changed_by_hand_is_noticed_without_the_compiler(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / script.FOLDER
    folder.mkdir(parents=True)
    for file in (script.SCHEMA, *script.OUTPUTS):
        shutil.copy(ROOT / file, tmp_path / file)
    record = tmp_path / "wire.proto.sha256"
    record.write_text(script.RECORD.read_text())
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "RECORD", record)
    assert script.stale() == []
    with (folder / name).open("a") as file_:
        file_.write("\n")
    assert script.stale() == ["wire.proto.sha256"]
