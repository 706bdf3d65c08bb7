"""Bounds that every decoder shares: a value comes back, or RemoteProtocolError(MALFORMED) is raised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.rejects import Reject

KEY_BYTES = 32
MAX_CODECS = 16
MAX_CODEC_NAME = 48

_M = TypeVar("_M", bound=Message)


def parse(kind: type[_M], raw: bytes) -> _M:
    """Bytes as a wire message. Raises RemoteProtocolError(MALFORMED)."""
    message = kind()
    try:
        message.ParseFromString(raw)
    except (DecodeError, ValueError):  # ValueError: invalid UTF-8 in some protobuf implementations
        raise malformed(f"not a {kind.__name__}") from None
    return message


def malformed(detail: str) -> RemoteProtocolError:
    return RemoteProtocolError(Reject.MALFORMED, detail)


def within(what: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise malformed(f"{what} is {value}, outside {low}..{high}")
    return value


def finite(what: str, value: float) -> float:
    if not math.isfinite(value):
        raise malformed(f"{what} is not finite")
    return value


def key_bytes(what: str, raw: bytes) -> bytes:
    if len(raw) != KEY_BYTES:
        raise malformed(f"{what} has {len(raw)} bytes, not {KEY_BYTES}")
    return raw


def codec_names(names: Sequence[str]) -> tuple[str, ...]:
    if len(names) > MAX_CODECS or any(not 0 < len(name) <= MAX_CODEC_NAME for name in names):
        raise malformed(f"a codec list holds at most {MAX_CODECS} names of 1..{MAX_CODEC_NAME} characters")
    return tuple(names)
