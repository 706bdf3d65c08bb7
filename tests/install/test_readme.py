"""README's "First federation by hand", played word by word."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from sklearn.datasets import load_digits

from tests.support.brokers import ROOT
from tests.support.transcript import free_port

pytestmark = pytest.mark.long

HANG_S = 240.0
SECTION = re.compile(r"^## First federation by hand\n(.*?)^## ", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Those that run until Ctrl-C; a person gives each a terminal, a script an ampersand.
FOREVER = re.compile(r"^(aggregator broker|aggregator registrar serve)\b")


def by_hand() -> list[str]:
    """The shell blocks of the section, in order."""
    section = SECTION.search((ROOT / "README.md").read_text("utf-8"))
    assert section is not None
    return BLOCK.findall(section[1])


def script(port: int) -> str:
    """All of it as one shell script: another port, the long-lived programs in the background."""
    lines = "".join(by_hand()).replace("CHECKOUT", str(ROOT)).replace("\\\n", " ").splitlines()
    told = [
        f"{line.partition('#')[0].rstrip()} & " + LISTENS.format(port=port) if FOREVER.match(line) else line
        for line in lines
    ]
    text = "\n".join(["set -e", *told]).replace("127.0.0.1:1883", f"127.0.0.1:{port}")
    return text.replace("aggregator broker ", f"aggregator broker --port {port} ")


# A person starts the next program when the one before has said that it is there.
LISTENS = "until (echo > /dev/tcp/127.0.0.1/{port}) 2> /dev/null; do sleep 0.1; done"


@pytest.mark.timeout(HANG_S + 60)
def test_the_first_federation_by_hand_ends_with_a_model_that_runs(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/sbin", os.environ["PATH"]]),
    }
    log = tmp_path / "log"
    with log.open("wb") as out:
        shell = subprocess.Popen(
            ["bash", "-c", script(free_port())],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            code = shell.wait(HANG_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGTERM)
            shell.wait()
    assert code == 0, log.read_text()
    with np.load(tmp_path / "model" / "model.npz") as arrays:
        assert sum(arrays[name].size for name in arrays.files) == 38_282
    session = onnxruntime.InferenceSession(tmp_path / "model" / "model.onnx")
    digits = load_digits()
    images = (digits.images[:, None] / 16).astype("float32")
    (logits,) = session.run(None, {session.get_inputs()[0].name: images})
    assert np.mean(logits.argmax(1) == digits.target) > 0.5  # guessing: 0.1
