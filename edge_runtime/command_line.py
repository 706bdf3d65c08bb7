"""What every command line of this project does alike: errors in one line, reports as text or JSON, clean stops."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from edge_runtime.protocol.errors import Fault, FleetgradError, RemoteProtocolError

FAILED = 1
T = TypeVar("T")
# The extra that each program needs.
_EXTRAS = {
    "edge-runtime": "device",
    "aggregator": "aggregator",
    "model-export": "export",
    "fldemo": "tools",
    "flperftest": "tools",
}
_OURS = ("edge_runtime", "aggregator", "model_export", "fldemo", "flperftest")


class OptionError(
    FleetgradError, fault=Fault.ENGINEER, remedy="follow the line: it names the option and what is allowed"
):
    """An option or argument of a command that does not fit the others, the files or what is there."""


Report = Callable[..., None]
"""``report(event, **fields)``: what is happening."""


def run_program(name: str, app: Callable[[], Any]) -> None:
    """Run a typer application: an error of ours is one line on stderr and exit code 1, never a traceback."""
    try:
        app()
    except FleetgradError as error:
        sys.stderr.write(f"{name}: {error}\n")
        sys.exit(FAILED)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(name)
        if extra is None or (error.name or "").partition(".")[0] in _OURS:
            raise
        sys.stderr.write(f"{name}: {error.name} is not installed: pip install 'fleetgrad[{extra}]'\n")
        sys.exit(FAILED)
    except OSError as error:
        sys.stderr.write(f"{name}: {error}: check the disk, the folder and its permissions\n")
        sys.exit(FAILED)


def stopped_by_signal() -> Callable[[], bool]:
    """True once SIGINT or SIGTERM has come. Call it from the main thread."""
    caught: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda got, _: caught.append(got))
    return lambda: bool(caught)


def parsed(parse: Callable[[str], T], text: str) -> T:
    """``parse(text)`` of an option. Raises OptionError for what a peer would be refused for."""
    try:
        return parse(text)
    except RemoteProtocolError as error:
        raise OptionError(error.detail) from None


def printable(text: str) -> str:
    """ASCII without control characters: what a stranger sent can neither break nor repaint a terminal."""
    return "".join(c if " " <= c <= "~" else c.encode("unicode_escape").decode() for c in text)


def tee(*reports: Report) -> Report:
    """Each event to all of them, in this order."""

    def report(event: str, **fields: object) -> None:
        for each in reports:
            each(event, **fields)

    return report


def json_report(**common: object) -> Report:
    """One JSON object per event and line on stdout; ``common``: fields of all of them."""

    def report(event: str, **fields: object) -> None:
        document = {"time": round(time.time(), 3), **common, "event": event, **fields}
        sys.stdout.write(json.dumps(document) + "\n")
        sys.stdout.flush()

    return report


def text_report() -> Report:
    """One line per event on stdout, for people."""

    def report(event: str, **fields: object) -> None:
        words = " ".join(
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={printable(str(value))}"
            for name, value in fields.items()
            if value is not None
        )
        sys.stdout.write(f"{time.strftime('%H:%M:%S')}  {event.replace('_', ' '):18} {words}\n")
        sys.stdout.flush()

    return report
