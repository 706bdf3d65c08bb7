"""Generate edge_runtime/protocol/wire_pb2.py(i) with the oldest supported compiler; --check compares only."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "edge_runtime/protocol"
OUTPUTS = ("wire_pb2.py", "wire_pb2.pyi")


def generate(python: Path, into: Path) -> None:
    subprocess.run(
        [
            python,
            "-m",
            "grpc_tools.protoc",
            "-I.",
            f"--python_out={into}",
            f"--pyi_out={into}",
            f"{FOLDER}/wire.proto",
        ],
        cwd=ROOT,
        check=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the committed files are stale")
    arguments = parser.parse_args()
    compiler = Path(sys.prefix).with_name(Path(sys.prefix).name + "-protoc") / "bin" / "python"
    if not arguments.check:
        generate(compiler, ROOT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(compiler, Path(folder))
        stale = [
            name
            for name in OUTPUTS
            if (Path(folder) / FOLDER / name).read_bytes() != (ROOT / FOLDER / name).read_bytes()
        ]
    if stale:
        print(f"stale: {', '.join(stale)}: run `make proto` and commit the result", file=sys.stderr)
        return 1
    print("generated protobuf is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
