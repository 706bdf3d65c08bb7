"""Generate edge_runtime/protocol/wire_pb2.py(i) with the oldest supported compiler; --check compares only.

The compiler's wheels end with Python 3.12. Where it cannot be installed, --check compares SHA-256 instead: of the
schema and of the generated files, as written down when they were generated. --install makes the compiler's own
environment, beside the one this runs in.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "edge_runtime/protocol"
SCHEMA = f"{FOLDER}/wire.proto"
OUTPUTS = (f"{FOLDER}/wire_pb2.py", f"{FOLDER}/wire_pb2.pyi")
RECORD = ROOT / ".ci" / "wire.proto.sha256"  # as `sha256sum --check` reads it
COMPILER = ("grpcio-tools==1.62.3", "setuptools<81")
HAS_WHEELS = sys.version_info < (3, 13)
ENVIRONMENT = Path(sys.prefix).with_name(Path(sys.prefix).name + "-protoc")
PYTHON = ENVIRONMENT / "bin" / "python"


def install() -> None:
    pip = [PYTHON, "-m", "pip"]
    if not PYTHON.exists() or subprocess.run([*pip, "--version"], capture_output=True).returncode != 0:
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
    subprocess.run([*pip, "install", "--quiet", "--disable-pip-version-check", *COMPILER], check=True)


def generate(into: Path) -> None:
    command = [PYTHON, "-m", "grpc_tools.protoc", "-I.", f"--python_out={into}", f"--pyi_out={into}", SCHEMA]
    subprocess.run(command, cwd=ROOT, check=True)


def digests() -> str:
    """A line for the schema and each generated file as they are now."""
    lines = [
        f"{hashlib.sha256((ROOT / name).read_bytes()).hexdigest()}  {name}" for name in (SCHEMA, *OUTPUTS)
    ]
    return "\n".join(lines) + "\n"


def stale() -> list[str]:
    """What does not belong to the schema; by compiling it where that is possible."""
    found = [] if RECORD.is_file() and RECORD.read_text() == digests() else [str(RECORD.relative_to(ROOT))]
    if HAS_WHEELS:
        with tempfile.TemporaryDirectory() as folder:
            generate(Path(folder))
            found += [n for n in OUTPUTS if (Path(folder) / n).read_bytes() != (ROOT / n).read_bytes()]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="fail if the committed files are stale")
    parser.add_argument(
        "--install", action="store_true", help="install the compiler, if it has wheels for this Python"
    )
    arguments = parser.parse_args()
    if arguments.install:
        if HAS_WHEELS:
            install()
        return 0
    if arguments.check:
        if found := stale():
            print(f"stale: {', '.join(found)}: run `make proto` and commit the result", file=sys.stderr)
            return 1
        how = "" if HAS_WHEELS else f": by SHA-256 only, {COMPILER[0]} needs Python 3.12 or older"
        print(f"generated protobuf is up to date{how}")
        return 0
    if not HAS_WHEELS:
        print(
            f"{COMPILER[0]} needs Python 3.12 or older: make proto PYTHON=python3.12 VENV=.venv312",
            file=sys.stderr,
        )
        return 1
    generate(ROOT)
    RECORD.write_text(digests())
    return 0


if __name__ == "__main__":
    sys.exit(main())
