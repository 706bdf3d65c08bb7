"""What ``pip install fleetgrad[device]`` brings, and that the oldest versions of pyproject.toml work."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from edge_runtime.settings import tomllib
from tests.support.brokers import ROOT, mosquitto_installed
from tests.support.federation import aggregated_once, federation

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

MAX_DEVICE_BYTES = 250 * 10**6
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"
NOT_FOR_DEVICES = {"torch", "onnx", "sqlalchemy", "structlog", "sklearn", "scipy", "sympy", "pandas"}
DEVICE_TESTS = (
    *("session", "store", "data", "codecs", "config", "device", "protocol", "protocol_crypto", "training"),
    "transport",
)
DEVICE_LAWS = ("chunks", "codecs", "crypto", "parsers", "session")


class Environment:
    """A virtual environment of its own."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=120)
        self.bin = folder / "bin"
        (self.packages,) = folder.glob("lib/python3*/site-packages")
        self.empty = self.sizes()

    def install(self, *words: str) -> None:
        pip = [self.bin / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*pip, *words], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr

    def run(self, *words: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        program, *rest = words
        return subprocess.run(
            [self.bin / program, *rest], capture_output=True, text=True, timeout=600, cwd=cwd
        )

    def sizes(self) -> dict[str, int]:
        """Bytes on disk of everything installed, by the name in site-packages."""
        return {
            entry.name: sum(
                path.lstat().st_blocks * 512
                for path in (entry, *(entry.rglob("*") if entry.is_dir() else ()))
            )
            for entry in self.packages.iterdir()
        }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_source_distribution_holds_all_that_make_and_its_tests_need(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    scripts = {f".ci/{name}" for name in ("run", "constraints.txt", "protobuf.py", "wire.proto.sha256")}
    assert names >= scripts | {"Makefile", "pyproject.toml", "LICENSE", "edge_runtime/protocol/wire.proto"}
    assert names >= {"examples/digits/model.py", "tests/install/test_fresh_environments.py"}


def floors(extra: str) -> list[str]:
    """``name==floor.*`` of every requirement of the device library and of one extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [
        re.match(r"([a-z-]+)>=([0-9.]+)", line)
        for line in (*project["dependencies"], *project["optional-dependencies"][extra])
    ]
    return [f"{match[1]}=={match[2]}.*" for match in found if match is not None]


def test_a_device_install_has_no_torch_and_stays_below_250_mb(tmp_path: Path, wheel: Path) -> None:
    fresh = Environment(tmp_path / "venv")
    fresh.install("--constraint", str(CONSTRAINTS), f"{wheel}[device]")
    added = {name: size for name, size in fresh.sizes().items() if name not in fresh.empty}
    largest = sorted(added.items(), key=lambda row: -row[1])[:15]
    assert {"edge_runtime", "onnxruntime", "numpy"} <= added.keys()
    assert not NOT_FOR_DEVICES & {name.lower() for name in added}
    assert sum(added.values()) <= MAX_DEVICE_BYTES, largest
    help_text = fresh.run("edge-runtime", "--help", cwd=tmp_path)
    assert (help_text.returncode, help_text.stderr) == (0, "")
    assert "edge-runtime enroll" in help_text.stdout
    refused = fresh.run("edge-runtime", "run", "--config", "none.toml", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (1, "")
    # Another program of the wheel says which extra it needs.
    other = fresh.run("aggregator", "serve", "--config", "none.toml", cwd=tmp_path)
    assert other.returncode == 1
    assert "pip install 'fleetgrad[aggregator]'" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="numpy 1.26 has no wheels for it")
def test_the_device_works_with_the_oldest_versions_it_promises(tmp_path: Path, wheel: Path) -> None:
    oldest = Environment(tmp_path / "venv")
    wanted = floors("device")
    assert {line.partition("==")[0] for line in wanted} >= {"numpy", "paho-mqtt", "cattrs", "onnxruntime"}
    # onnx: the tests write a small artifact themselves; its version is one that takes the oldest protobuf too.
    oldest.install(*wanted, str(wheel), "pytest", "pytest-timeout", "hypothesis", "onnx==1.17.0")
    tests = [
        *(f"tests/unit/{name}" for name in DEVICE_TESTS),
        *(f"tests/laws/test_{name}.py" for name in DEVICE_LAWS),
        *("tests/vectors", "tests/contract/test_backend.py", "tests/contract/test_codec_contract.py"),
        "tests/contract/test_transport_contract.py",
    ]
    done = oldest.run("python", "-m", "pytest", "-m", "not long", *tests)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert re.search(r"^\d{3,} passed", done.stdout, flags=re.M)
    if not mosquitto_installed():
        return
    # And in a round: the device in the old environment, the aggregator in ours.
    with federation(tmp_path / "round", samples=(160,), round__rounds=2) as fed:
        for device in fed.devices.values():
            device.command[0] = str(oldest.bin / "python")
        fed.start()
        fed.finish()
        aggregated_once(fed.status(), devices=1, versions=2)
