"""How a vector of parameters travels: the table of codecs, best first.

A codec is chosen by name in the plan; ``float32`` and ``int8-block`` are followed by the entropy stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from edge_runtime.protocol.codecs import entropy
from edge_runtime.protocol.codecs.base import Codec, CodecState, Uniforms, chain
from edge_runtime.protocol.codecs.float32 import FLOAT32
from edge_runtime.protocol.codecs.int8_block import INT8_BLOCK
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.rejects import Reject

__all__ = ["CODECS", "Codec", "CodecState", "Uniforms", "available", "choose", "codec_named"]

CODECS: Mapping[str, Callable[[], Codec]] = MappingProxyType(
    {
        "int8-block+zstd": lambda: chain(INT8_BLOCK, entropy.zstd()),
        "int8-block+zlib": lambda: chain(INT8_BLOCK, entropy.ZLIB),
        "int8-block": lambda: chain(INT8_BLOCK, None),
        "float32+zstd": lambda: chain(FLOAT32, entropy.zstd()),
        "float32+zlib": lambda: chain(FLOAT32, entropy.ZLIB),
        "float32": lambda: chain(FLOAT32, None),
    }
)


def codec_named(name: str) -> Codec:
    """The codec of this name. Raises RemoteProtocolError(UNKNOWN_CODEC), which lists those usable here."""
    if name not in available():
        raise RemoteProtocolError(
            Reject.UNKNOWN_CODEC, f"{name[:60]!r} is none of {', '.join(available())}, which are usable here"
        )
    return CODECS[name]()


def choose(names: Sequence[str]) -> str:
    """The first of ``names``, best first, that is usable here. Raises RemoteProtocolError: none is."""
    usable = available()
    for name in names:
        if name in usable:
            return name
    raise RemoteProtocolError(Reject.UNKNOWN_CODEC, f"no codec of {', '.join(names)} can be used here")


def available() -> tuple[str, ...]:
    """The names usable on this machine, best first: zstd only where ``zstandard`` can be imported."""
    return tuple(name for name in CODECS if entropy.HAS_ZSTD or not name.endswith("+zstd"))
