"""Transcripts: what a person types and what the programs answer, as text files that are played again.

A line ``$ command`` is run by bash in the transcript's own empty folder; the lines below it are what it must
print (stdout and stderr together), trailing blanks aside. A line of only ``...`` stands for any number of lines,
``<...>`` inside a line for any text. ``[1]`` at the end is the exit code, 0 if absent. ``& command``: a program
that runs until the transcript ends; ``~ text`` waits until its output holds the text. ``#``: a remark.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

HANG_S = 60.0
_CODE = re.compile(r"\[(\d+)\]")


@dataclass
class Command:
    """``kind``: ``$`` run and compare, ``&`` start, ``~`` wait for words of the program started last."""

    kind: str
    text: str
    line: int
    expected: list[str] = field(default_factory=list)
    code: int = 0


def parse(text: str) -> list[Command]:
    """Raises ValueError for output before any command."""
    commands: list[Command] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line[:2] in ("$ ", "& ", "~ "):
            commands.append(Command(line[0], line[2:], number))
        elif line.startswith("#") or (not line.strip() and not commands):
            continue
        elif not commands or commands[-1].kind != "$":
            if line.strip():
                raise ValueError(f"line {number}: output, but of which command?")
        elif found := _CODE.fullmatch(line):
            commands[-1].code = int(found[1])
        else:
            commands[-1].expected.append(line.rstrip())
    for command in commands:
        while command.expected and not command.expected[-1]:
            command.expected.pop()
    return commands


def pattern(expected: list[str]) -> re.Pattern[str]:
    """What the whole output must match."""
    parts = []
    for line in expected:
        if line.strip() == "...":
            parts.append(r"(?:.*\n)*?")
        else:
            pieces = (re.escape(piece) for piece in line.split("<...>"))
            parts.append(".*".join(pieces) + r"[ \t]*\n")
    return re.compile("".join(parts))


def play(path: Path, folder: Path, **variables: str) -> None:
    """Run a transcript in ``folder``; ``variables`` are its environment. Raises AssertionError where it differs."""
    environment = {
        "HOME": str(folder),
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "COLUMNS": "200",
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/sbin", os.environ["PATH"]]),
        **variables,
    }
    running: list[tuple[subprocess.Popen[bytes], Path]] = []
    try:
        for command in parse(path.read_text("utf-8")):
            where = f"{path.name}:{command.line}: {command.text}"
            if command.kind == "&":
                log = folder / f".program-{len(running)}"
                with log.open("wb") as out:
                    words = ["bash", "-c", f"exec {command.text}"]
                    started = subprocess.Popen(words, cwd=folder, env=environment, stdout=out, stderr=out)
                running.append((started, log))
            elif command.kind == "~":
                _wait(where, command.text, *running[-1])
            else:
                _run(where, command, folder, environment)
    finally:
        for program, _ in reversed(running):
            program.terminate()
            try:
                program.wait(20)
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _run(where: str, command: Command, folder: Path, environment: dict[str, str]) -> None:
    words = ["bash", "-c", command.text]
    try:
        done = subprocess.run(
            words,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=HANG_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace")
        raise AssertionError(f"{where}\n--- does not end; printed\n{said}") from None
    output = done.stdout.decode(errors="replace")
    wanted = "\n".join(command.expected)
    told = f"{where}\n--- printed, exit code {done.returncode} for {command.code}\n{output}\n--- expected\n{wanted}"
    if done.returncode != command.code:
        raise AssertionError(told)
    shown = output if not output or output.endswith("\n") else output + "\n"
    if not pattern(command.expected).fullmatch(shown):
        raise AssertionError(told)


def _wait(where: str, words: str, program: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + HANG_S
    while True:
        over = (
            program.poll() is not None or time.monotonic() > deadline
        )  # before reading: it may say it and end
        said = log.read_text("utf-8", errors="replace")
        if words in said:
            return
        if over:
            raise AssertionError(f"{where}\n--- the program said\n{said}")
        time.sleep(0.02)
