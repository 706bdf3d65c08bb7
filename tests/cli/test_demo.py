"""The whole demo, as a user starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FLDEMO = (sys.executable, "-c", "from fldemo.cli import main; main()")


@pytest.mark.long
@pytest.mark.timeout(300)
def test_ten_devices_train_through_a_real_broker_while_two_die(tmp_path: Path) -> None:
    report = tmp_path / "figures.json"
    command = [*FLDEMO, "run", "--folder", str(tmp_path / "demo"), "--seed", "1", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(report.read_text())
    assert all(check["holds"] for check in figures["checks"])
    assert len(figures["killed"]) == 2
    assert sorted(Path(file).name for file in figures["files"]) == ["model.npz", "model.onnx"]
    assert figures["update_bytes_per_parameter"] <= 1.1


@pytest.mark.long
@pytest.mark.timeout(120)
def test_an_interrupted_demo_leaves_no_process(tmp_path: Path) -> None:
    demo = subprocess.Popen(
        [*FLDEMO, "run", "--folder", str(tmp_path / "demo")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while len(processes_in(tmp_path)) < 12 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(processes_in(tmp_path)) >= 12
        demo.send_signal(signal.SIGINT)
        assert demo.wait(30) == 130
    finally:
        demo.kill()
        demo.wait()
    assert processes_in(tmp_path) == []


def test_help_says_what_the_demo_does_and_where_to_look() -> None:
    environment = {**os.environ, "COLUMNS": "120", "TERM": "dumb"}
    command = [*FLDEMO, "run", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    for words in ("Dirichlet", "killed", "logs", "model.onnx", "--seed", "--rounds", "--export"):
        assert words in done.stdout


def processes_in(folder: Path) -> list[int]:
    """Running programs, but for the demo itself, with the folder in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
            except OSError:
                continue
            if (
                any(str(folder) in word for word in words)
                and "from fldemo.cli import main; main()" not in words
            ):
                found.append(int(entry.name))
    return found
