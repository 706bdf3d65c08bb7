"""Records and rows as JSON text, strictly: what was not written by this code does not read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import cattrs
from cattrs.converters import Converter

from aggregator.core.records import (
    CheckedIn,
    DrainBegun,
    Drained,
    Evicted,
    Paused,
    Readmitted,
    Record,
    Resumed,
    RevocationsTaken,
    RoundAborted,
    RoundFrozen,
    RoundOpened,
    RoundPublished,
    UpdateStored,
    VersionCommitted,
    VersionRestored,
)
from aggregator.ledger.errors import LedgerError
from edge_runtime.protocol.ids import RoundId
from edge_runtime.protocol.messages import Telemetry
from edge_runtime.protocol.rejects import Reject

# The names are for ever: they are in journals.
KINDS: dict[str, type[Any]] = {
    "checked-in": CheckedIn,
    "round-opened": RoundOpened,
    "update-stored": UpdateStored,
    "round-frozen": RoundFrozen,
    "version-committed": VersionCommitted,
    "round-published": RoundPublished,
    "round-aborted": RoundAborted,
    "version-restored": VersionRestored,
    "paused": Paused,
    "drain-begun": DrainBegun,
    "drained": Drained,
    "resumed": Resumed,
    "evicted": Evicted,
    "readmitted": Readmitted,
    "revocations-taken": RevocationsTaken,
}
KIND_NAMES = {kind: name for name, kind in KINDS.items()}
_REJECTS = {reject.code: reject for reject in Reject}


def kind_of(record: Record) -> str:
    """The record's name in the journal."""
    return KIND_NAMES[type(record)]


def encode_record(record: Record) -> str:
    """JSON with sorted keys, ASCII; bytes as hex, a round as [generation, number], a reject as its code."""
    return _dump(_CONVERTER.unstructure(record))


def decode_record(kind: str, text: str) -> Record:
    """Raises LedgerError for anything that ``encode_record`` did not write."""
    if kind not in KINDS:
        raise LedgerError(f"the journal holds a {kind!r}, which this release does not know: update it")
    record: Record = _load(kind, text, KINDS[kind])
    return record


def encode_telemetry(report: Telemetry) -> str:
    return _dump(_CONVERTER.unstructure(report))


def decode_telemetry(text: str) -> Telemetry:
    """Raises LedgerError."""
    report: Telemetry = _load("telemetry", text, Telemetry)
    return report


def encode_names(names: tuple[str, ...]) -> str:
    return _dump(list(names))


def decode_names(text: str) -> tuple[str, ...]:
    """Raises LedgerError."""
    names: tuple[str, ...] = _load("names", text, tuple[str, ...])
    return names


def encode_metrics(metrics: Mapping[str, float | None]) -> str:
    return _dump(dict(metrics))


def decode_metrics(text: str) -> dict[str, float | None]:
    """Raises LedgerError."""
    metrics: dict[str, float | None] = _load("metrics", text, dict[str, float | None])
    return metrics


def _dump(document: object) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _load(what: str, text: str, kind: Any) -> Any:
    try:
        return _CONVERTER.structure(json.loads(text, parse_constant=_no_constant), kind)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        cattrs.BaseValidationError,
    ) as error:
        raise LedgerError(f"the ledger holds a damaged {what}: restore it from a backup") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _converter() -> Converter:
    converter = Converter(forbid_extra_keys=True)
    converter.register_unstructure_hook(bytes, bytes.hex)
    converter.register_structure_hook(bytes, lambda value, _: bytes.fromhex(_exactly(str, value)))
    converter.register_structure_hook(str, lambda value, _: _exactly(str, value))
    converter.register_structure_hook(int, lambda value, _: _exactly(int, value))
    converter.register_structure_hook(float, _float)
    converter.register_unstructure_hook(RoundId, list)
    converter.register_structure_hook(RoundId, _round_id)
    converter.register_unstructure_hook(Reject, lambda reject: reject.code)
    converter.register_structure_hook(Reject, lambda value, _: _REJECTS[_exactly(int, value)])
    return converter


def _exactly(kind: type[Any], value: object) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} where {kind.__name__} is expected")
    return value


def _float(value: object, _: object) -> float:
    if type(value) not in (int, float) or not math.isfinite(number := float(value)):  # type: ignore[arg-type]
        raise TypeError("no finite number")
    return number


def _round_id(value: object, _: object) -> RoundId:
    generation, number = _exactly(list, value)
    return RoundId(_exactly(int, generation), _exactly(int, number))


_CONVERTER = _converter()
