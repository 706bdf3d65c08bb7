"""Programs of this project as processes that a test starts, kills, freezes and listens to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HANG_S = 90.0  # what has not happened by then will not; no test asserts how long anything takes
_POLL_S = 0.004
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Event(NamedTuple):
    """One line of a program's ``--log-json``; ``run`` counts the starts of that program from 0."""

    run: int
    name: str
    fields: dict[str, Any]


class Program:
    """One program, started any number of times; each run's output goes to a file of its own."""

    def __init__(self, name: str, command: Sequence[str], folder: Path) -> None:
        self.name = name
        self.command = list(command)
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.runs = 0
        self.fellows: list[Program] = []  # if one of them crashes, waiting is in vain

    @property
    def pid(self) -> int:
        return self._running().pid

    def start(self, *, command: Sequence[str] | None = None) -> None:
        if self._process is not None:
            raise RuntimeError(f"{self.name} runs already")
        with self._file(self.runs, "out").open("wb") as out, self._file(self.runs, "err").open("wb") as err:
            self._process = subprocess.Popen(
                list(command or self.command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=self._folder,
                env={**os.environ, **_ENVIRONMENT},
            )
        self.runs += 1

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        process = self._running()
        process.kill()
        process.wait()
        self._process = None

    def freeze(self) -> None:
        """SIGSTOP: it does nothing until ``thaw``."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def wait(self) -> int:
        """Its exit code, once it ended by itself; negative for a signal."""
        try:
            code = self._running().wait(HANG_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} does not end\n{self.output()}") from None
        self._process = None
        return code

    def close(self) -> None:
        """SIGTERM; SIGKILL if that does not help. Fine if it has ended."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def crashed(self) -> bool:
        """It ended, and neither ``kill`` nor ``close`` did it."""
        return self._process is not None and self._process.poll() is not None

    def events(self) -> list[Event]:
        """All so far, of all runs; a line cut off by a kill is left out."""
        found = []
        for run in range(self.runs):
            for line in self._file(run, "out").read_bytes().splitlines(keepends=True):
                if line.startswith(b"{") and line.endswith(b"}\n"):
                    fields = json.loads(line)
                    found.append(Event(run, fields["event"], fields))
        return found

    def seen(self, event: str, **fields: object) -> list[Event]:
        """The events of this name whose fields have these values."""
        wanted = fields.items()
        return [e for e in self.events() if e.name == event and wanted <= e.fields.items()]

    def wait_for(self, event: str, *, times: int = 1, **fields: object) -> Event:
        """Until an event of this name with these fields has come (``times`` times, over all runs)."""
        deadline = time.monotonic() + HANG_S
        while len(found := self.seen(event, **fields)) < times:
            crashed = [program for program in (self, *self.fellows) if program.crashed]
            if crashed and len(found := self.seen(event, **fields)) >= times:
                break
            if crashed or not self.running or time.monotonic() > deadline:
                what = f"{self.name}: no {event} {fields}; ended: {[program.name for program in crashed]}"
                raise AssertionError("\n".join([what, self.output(), *(p.output() for p in self.fellows)]))
            time.sleep(_POLL_S)
        return found[times - 1]

    def output(self) -> str:
        """The end of what it wrote, for the message of a failure."""
        parts = []
        for run in range(self.runs):
            text = self._file(run, "out").read_text() + self._file(run, "err").read_text()
            parts.append(f"--- {self.name}, run {run}\n" + "\n".join(text.splitlines()[-30:]))
        return "\n".join(parts)

    def errors(self) -> str:
        """What all runs wrote to stderr."""
        return "".join(self._file(run, "err").read_text() for run in range(self.runs))

    def _file(self, run: int, suffix: str) -> Path:
        return self._folder / f"{self.name}.{run}.{suffix}"

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError(f"{self.name} is not running")
        return self._process


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + HANG_S
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {HANG_S:g} s: {what}")
        time.sleep(_POLL_S)
