"""The child processes of a demo: each with its own log and process group, none survives its parent.

On Linux the kernel ends a child when the thread that started it ends (PR_SET_PDEATHSIG), so start them from the
main thread. ``Supervisor`` as a context manager ends them all in every other case.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from aggregator.broker import die_with_parent
from edge_runtime.protocol.errors import Fault, FleetgradError

TAIL_LINES = 15
_POLL_S = 0.2


class ProcessError(FleetgradError, fault=Fault.SURROUNDINGS, remedy="read the log that is named"):
    """A program failed; the text holds the end of its log and where the whole of it lies."""


class Event(NamedTuple):
    """One JSON line of a program. ``at``: seconds of ``time.monotonic`` when it was read."""

    source: str
    at: float
    fields: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return str(self.fields.get("event", ""))

    @property
    def round(self) -> int:
        return int(self.fields.get("round", 0))


@dataclass(eq=False)
class Child:
    """A running program. ``expected_end``: we ended it ourselves, so its exit code says nothing."""

    name: str
    command: tuple[str, ...]
    log_file: Path
    process: subprocess.Popen[bytes]
    reader: threading.Thread | None = None
    expected_end: bool = False

    @property
    def pid(self) -> int:
        return self.process.pid

    def exit_code(self) -> int | None:
        """Negative: the number of the signal that ended it. None: it runs."""
        return self.process.poll()

    def signal(self, number: signal.Signals) -> None:
        """To its whole process group; nothing happens if it has ended."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def failure(self, what: str) -> ProcessError:
        """``what`` happened, with the end of the log."""
        return ProcessError(f"{self.name} {what}: {' '.join(self.command)}\n{tail(self.log_file)}")


class Supervisor:
    """Starts programs, reads their JSON lines into one queue, ends them: SIGKILL ``grace_s`` after SIGTERM."""

    def __init__(
        self, log_folder: Path, environment: Mapping[str, str] | None = None, *, grace_s: float = 4.0
    ) -> None:
        self.log_folder = log_folder
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.on_read: Callable[[Event], None] | None = (
            None  # called first, in the thread that reads the program
        )
        self.children: dict[str, Child] = {}
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
        self._grace_s = grace_s
        log_folder.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, command: Sequence[str], *, read_events: bool = False) -> Child:
        """Starts a program; its output goes to ``<name>.log``, appended. Raises ProcessError if it cannot start."""
        log_file = self.log_folder / f"{name}.log"
        child = self._spawn(name, command, log_file, subprocess.PIPE if read_events else None)
        self.children[name] = child
        if read_events:
            child.reader = threading.Thread(
                target=self._read, args=(child,), name=f"read-{name}", daemon=True
            )
            child.reader.start()
        return child

    def run_all(
        self,
        commands: Mapping[str, Sequence[str]],
        *,
        at_once: int,
        timeout_s: float = 60.0,
        folder: Path | None = None,
    ) -> dict[str, str]:
        """Runs short programs in ``folder`` (None: this process's), ``at_once`` at a time; standard output by name.

        Raises ProcessError for the first that fails or takes longer than ``timeout_s``.
        """
        waiting = list(commands.items())
        running: list[tuple[Child, float]] = []
        outputs: dict[str, str] = {}
        while waiting or running:
            while waiting and len(running) < at_once:
                name, command = waiting.pop(0)
                child = self._spawn(name, command, self.log_folder / f"{name}.log", subprocess.PIPE, folder)
                self.children[name] = child
                running.append((child, time.monotonic() + timeout_s))
            child, deadline = running[0]
            try:
                output, _ = child.process.communicate(timeout=_POLL_S)
            except subprocess.TimeoutExpired:
                self.check()  # it may wait for a program that is gone
                if time.monotonic() > deadline:
                    raise child.failure(f"did not end within {timeout_s:g} s") from None
                continue
            running.pop(0)
            del self.children[child.name]
            if child.process.returncode != 0:
                raise child.failure(f"ended with code {child.process.returncode}")
            outputs[child.name] = output.decode("utf-8", "replace")
        return outputs

    def kill(self, child: Child) -> None:
        """SIGKILL, as a power cut would; waits until it is gone."""
        child.expected_end = True
        child.signal(signal.SIGKILL)
        child.process.wait()

    def stop(self, child: Child) -> None:
        """SIGTERM, then SIGKILL after some seconds."""
        child.expected_end = True
        self._end([child])

    def wait(self, child: Child, timeout_s: float) -> int:
        """Its exit code, once all its events are in the queue. Raises ProcessError if it does not end."""
        try:
            code = child.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise child.failure(f"did not end within {timeout_s:.0f} s") from None
        if child.reader is not None:
            child.reader.join(self._grace_s)
        return code

    def check(self) -> None:
        """Raises ProcessError if a program ended with a failure that we did not cause."""
        for child in self.children.values():
            code = child.exit_code()
            if code not in (None, 0) and not child.expected_end:
                how = (
                    f"ended with code {code}" if code and code > 0 else f"was ended by signal {-(code or 0)}"
                )
                raise child.failure(how)

    def stop_all(self) -> None:
        """SIGTERM to all that still run, then SIGKILL."""
        self._end(list(self.children.values()))

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_all()

    def _end(self, children: Sequence[Child]) -> None:
        alive = [child for child in children if child.exit_code() is None]
        for child in alive:
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + self._grace_s
        for child in alive:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.signal(signal.SIGKILL)
                child.process.wait()

    def _spawn(
        self,
        name: str,
        command: Sequence[str],
        log_file: Path,
        stdout: int | None,
        folder: Path | None = None,
    ) -> Child:
        with log_file.open("ab") as log:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log if stdout is None else stdout,
                    stderr=log,
                    cwd=folder,
                    env=self._environment,
                    # A group of its own: Ctrl-C reaches us only, and we end them in order.
                    start_new_session=True,
                    preexec_fn=die_with_parent(signal.SIGKILL),
                )
            except OSError as error:
                raise ProcessError(f"{name} cannot be started: {command[0]}: {error.strerror}") from error
        return Child(name, tuple(command), log_file, process)

    def _read(self, child: Child) -> None:
        """Copies the program's lines to its log; those that are JSON objects become events."""
        stream = child.process.stdout
        if stream is None:
            return
        with child.log_file.open("ab", buffering=0) as log, stream:
            for line in stream:
                at = time.monotonic()
                try:
                    fields = json.loads(line)
                except ValueError:
                    fields = None
                if isinstance(fields, dict):
                    event = Event(child.name, at, fields)
                    if self.on_read is not None:
                        self.on_read(event)
                    self.events.put(event)
                log.write(line)


def program(name: str) -> str:
    """The console script ``name`` of this Python environment; its bare name if it is not there."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


def tail(log_file: Path) -> str:
    """The last lines of a log and where it is."""
    try:
        lines = log_file.read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    shown = "\n".join(f"  | {line}" for line in lines[-TAIL_LINES:]) or "  | (it wrote nothing)"
    return f"{shown}\n  log: {log_file}"
