"""Structured logs, configured here and nowhere else: events of the aggregator and records of libraries, one pipe.

As JSON, all of it goes to stdout, one object a line. For people, events go to stdout, what libraries say to stderr.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, TextIO

import structlog
from structlog.stdlib import ProcessorFormatter

from aggregator.monitoring.events import EVENTS
from edge_runtime.command_line import Report, printable
from edge_runtime.protocol.enrol_token import PREFIX as TOKEN_PREFIX

_LOGGER = "aggregator.events"
_SECRET_WORDS = frozenset(("key", "secret", "token", "password", "passphrase", "credential", "seed"))
_SHOWN_ITEMS = 8  # of a list on a terminal

Fields = MutableMapping[str, Any]


@contextmanager
def structured_logs(
    *, as_json: bool, federation: str | None = None, libraries: int = logging.WARNING
) -> Iterator[Report]:
    """Log until the block ends; gives the ``report(event, **fields)`` that the engine speaks through.

    libraries: the level from which records of the standard library's loggers are shown.
    """
    common: list[structlog.typing.Processor] = [_common(federation), safe_fields]
    final = _as_json if as_json else _as_text
    formatter = ProcessorFormatter(
        processors=[ProcessorFormatter.remove_processors_meta, final],
        foreign_pre_chain=[_foreign, structlog.processors.format_exc_info, *common],
    )
    ours, root = logging.getLogger(_LOGGER), logging.getLogger()
    events = _Lines(formatter, lambda: sys.stdout)
    others = _Lines(formatter, lambda: sys.stdout if as_json else sys.stderr)
    others.addFilter(_hide_arguments)
    before = ours.propagate, ours.level, root.level
    ours.addHandler(events)
    ours.propagate = False
    ours.setLevel(logging.INFO)
    root.addHandler(others)
    root.setLevel(libraries)
    log = structlog.wrap_logger(
        ours,
        processors=[*common, ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )

    def report(event: str, **fields: object) -> None:
        row = EVENTS.get(event)
        log.log(logging.getLevelName((row.level if row else "info").upper()), event, **fields)

    try:
        yield report
    finally:
        ours.removeHandler(events)
        root.removeHandler(others)
        ours.propagate = before[0]
        ours.setLevel(before[1])
        root.setLevel(before[2])


def safe_fields(logger: object, method: str, fields: Fields) -> Fields:
    """A structlog processor: nothing secret, nothing but JSON's types, no number that JSON cannot say.

    Bytes are shown by their count, values of unknown types by the type's name, and nothing under a name of secrets.
    """
    return {name: _HIDDEN if _is_secret(name) else _safe(value) for name, value in fields.items()}


_HIDDEN = "(not shown)"


def _is_secret(name: str) -> bool:
    return not _SECRET_WORDS.isdisjoint(name.lower().split("_"))


def _safe(value: object) -> object:
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case str():
            return _HIDDEN if TOKEN_PREFIX in value else value
        case bytes() | bytearray() | memoryview():
            return f"({len(value)} bytes)"
        case Enum():
            return value.name.lower()
        case Path():
            return str(value)
        case Mapping():
            return {str(k): _HIDDEN if _is_secret(str(k)) else _safe(v) for k, v in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_safe(item) for item in value]
        case BaseException():
            return _safe(str(value))
        case _:
            return f"({type(value).__name__})"


def _hide_arguments(record: logging.LogRecord) -> bool:
    """What ``%s`` of a library's record would print goes through the same rules."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            arg if isinstance(arg, int | float | str) or arg is None else _safe(arg) for arg in record.args
        )
    return True


def _common(federation: str | None) -> structlog.typing.Processor:
    def add(logger: object, method: str, fields: Fields) -> Fields:
        named = {} if federation is None else {"federation": federation}
        return {
            "time": round(time.time(), 3),
            "event": fields.pop("event"),
            "level": method,
            **named,
            **fields,
        }

    return add


def _foreign(logger: object, method: str, fields: Fields) -> Fields:
    """A record of a library: its text is a message, not the name of an event."""
    record: logging.LogRecord = fields["_record"]
    return {**fields, "event": "library", "logger": record.name, "message": fields["event"]}


def _as_json(logger: object, method: str, fields: Fields) -> str:
    return json.dumps(fields, allow_nan=False)


def _as_text(logger: object, method: str, fields: Fields) -> str:
    at = time.strftime("%H:%M:%S", time.localtime(fields.pop("time")))
    event, level = fields.pop("event"), fields.pop("level")
    fields.pop("federation", None)
    if event == "library":
        trace = fields.get("exception")
        return f"{at}  {level:8} {printable(str(fields['message']))}" + (f"\n{trace}" if trace else "")
    words = " ".join(f"{name}={_shown(value)}" for name, value in fields.items() if value is not None)
    return f"{at}  {event.replace('_', ' '):18} {words}".rstrip()


def _shown(value: object) -> str:
    match value:
        case float():
            return f"{value:.4g}"
        case list() if len(value) > _SHOWN_ITEMS:
            return printable(f"{', '.join(map(str, value[:_SHOWN_ITEMS]))}, ... ({len(value)})")
        case list():
            return printable(", ".join(map(str, value)))
        case _:
            return printable(str(value))


class _Lines(logging.Handler):
    """Writes to what ``stream()`` is at that moment, so that a redirected stdout is respected."""

    def __init__(self, formatter: logging.Formatter, stream: Callable[[], TextIO]) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        try:
            out = self._stream()
            out.write(self.format(record) + "\n")
            out.flush()
        except Exception:  # noqa: BLE001 - as logging does it: a log that fails stops nothing
            self.handleError(record)
