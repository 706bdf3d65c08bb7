"""The library part of ``edge_runtime`` needs numpy, paho-mqtt, cryptography, protobuf, cattrs and nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.support.brokers import ROOT

LIBRARY = ROOT / "edge_runtime"
SHELL = {"cli.py", "command_line.py", "config.py"}  # may use typer, rich and tomli
NEEDS_A_RUNTIME = {"backends/ort.py"}  # the extra `device` brings it
# attrs and cffi come with cattrs and cryptography, exceptiongroup and typing_extensions with cattrs.
ALLOWED = {"numpy", "paho", "cryptography", "google", "cattrs", "cattr", "edge_runtime"} | {
    "attr", "attrs", "cffi", "_cffi_backend", "exceptiongroup", "typing_extensions", "tomli",
}  # fmt: skip
FORBIDDEN_STDLIB = {"subprocess", "multiprocessing", "pickle", "ctypes"}

MODULES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for path in LIBRARY.rglob("*.py")
    if path.name not in SHELL - {"config.py"} and path.relative_to(LIBRARY).as_posix() not in NEEDS_A_RUNTIME
)

_ALONE = """
import importlib, sys
sys.path.insert(0, {root!r})
allowed = {allowed!r} | sys.stdlib_module_names

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed and not name.startswith("_"):
            raise ModuleNotFoundError(f"{{name}} is not installed", name=name)

sys.meta_path.insert(0, Wall())
for module in {modules!r}:
    importlib.import_module(module)
from edge_runtime.protocol import codecs
from edge_runtime.transport.mqtt import MqttTransport
strangers = {{name.partition(".")[0] for name in sys.modules}} & {strangers!r}
print(",".join(codecs.available()), sorted(strangers), len({modules!r}))
"""
STRANGERS = {
    "typer", "rich", "click", "onnx", "onnxruntime", "torch", "sklearn", "zstandard", "sqlalchemy", "structlog",
    "aggregator", "model_export", "fldemo",
}  # fmt: skip


def test_the_library_imports_with_everything_else_blocked_and_then_offers_zlib() -> None:
    code = _ALONE.format(root=str(ROOT), allowed=ALLOWED, modules=MODULES, strangers=STRANGERS)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd="/")
    assert done.returncode == 0, done.stderr
    codecs, strangers, count = done.stdout.split(" ", 2)
    assert strangers == "[]"
    assert "int8-block+zlib" in codecs.split(",")
    assert "zstd" not in codecs
    assert int(count) > 50


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_of_the_device_starts_a_process_or_unpickles(path) -> None:
    """On Android there is no process to start; and no bytes from outside become code."""
    if path.name.endswith("_pb2.py"):
        pytest.skip("generated")
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.partition(".")[0] for name in names} & FORBIDDEN_STDLIB
    calls = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"eval", "exec", "__import__"}
