"""Seeds and the random numbers drawn from them, the same on every machine and in every language.

HKDF-SHA256 turns one secret and a context into a seed; ChaCha20 under that seed is the stream. A general
statistics generator is never used: its state can be computed from its output.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from edge_runtime.protocol.errors import LocalProtocolError

SEED_BYTES = 32
Context: TypeAlias = "bytes | str | int"

_INFO = b"fleetgrad/1/seed\0"
_TWO_64 = 1 << 64


def derive_seed(secret: bytes, *context: Context) -> bytes:
    """32 bytes for one purpose, named by ``context``: different contexts give independent seeds.

    HKDF-SHA256 (RFC 5869) without salt; info = ``fleetgrad/1/seed`` 0x00, then for each item a type byte
    (``b``, ``s``, ``i``), its length (u32 LE) and its bytes (as they are; UTF-8; u64 LE). ``secret``: at
    least 32 bytes. Raises LocalProtocolError for a shorter secret or an integer outside [0, 2^64).
    """
    if len(secret) < SEED_BYTES:
        raise LocalProtocolError(f"a seed is derived from at least {SEED_BYTES} bytes, not {len(secret)}")
    info = _INFO + b"".join(_item(item) for item in context)
    return HKDF(algorithm=SHA256(), length=SEED_BYTES, salt=None, info=info).derive(secret)


def _item(item: Context) -> bytes:
    match item:
        case bytes():
            tag, raw = b"b", item
        case str():
            tag, raw = b"s", item.encode()
        case bool():
            raise LocalProtocolError("a boolean is no context for a seed: name what it decides")
        case int() if 0 <= item < _TWO_64:
            tag, raw = b"i", item.to_bytes(8, "little")
        case _:
            raise LocalProtocolError(f"{item!r} is no context for a seed: bytes, text or an unsigned 64-bit")
    return tag + len(raw).to_bytes(4, "little") + raw


class Stream:
    """The ChaCha20 key stream (RFC 8439) of a 32-byte seed, nonce and first counter zero.

    Stateful: every call reads on where the last one stopped, and says how many bytes it reads.
    Words are little-endian. Raises LocalProtocolError for another seed length or a negative count.
    """

    __slots__ = ("_cipher",)

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise LocalProtocolError(f"a stream has a seed of {SEED_BYTES} bytes, not {len(seed)}")
        self._cipher = Cipher(ChaCha20(seed, bytes(16)), mode=None).encryptor()

    def bytes(self, n: int) -> bytes:
        """The next n bytes."""
        if n < 0:
            raise LocalProtocolError(f"{n} values cannot be drawn")
        return self._cipher.update(bytes(n))

    def uniform_float32(self, n: int) -> npt.NDArray[np.float32]:
        """Shape (n,), float32, uniform on the multiples of 2^-24 in [0, 1); reads 4n bytes."""
        words = np.frombuffer(self.bytes(4 * n), dtype="<u4")
        top = (words >> 8).astype(np.float32)
        top *= np.float32(2**-24)
        return top

    def integers_below(self, bound: int, n: int) -> npt.NDArray[np.uint64]:
        """Shape (n,), uint64, uniform on [0, bound) without bias; bound 1 to 2^63.

        Reads 8n bytes; words at or above the largest multiple of ``bound`` are passed over, and as many
        drawn again, until there are n.
        """
        if not 1 <= bound <= _TWO_64 // 2:
            raise LocalProtocolError(f"integers below {bound} cannot be drawn")
        last = np.uint64(_TWO_64 - _TWO_64 % bound - 1)
        drawn = np.empty(0, dtype=np.uint64)
        while len(drawn) < n:
            words = self._words(n - len(drawn))
            drawn = np.concatenate((drawn, words[words <= last]))
        drawn %= np.uint64(bound)
        return drawn

    def permutation(self, n: int) -> npt.NDArray[np.int64]:
        """Shape (n,), int64: 0..n-1 in an order that is uniform among all n!.

        The ranks of n different 64-bit words: reads 8n bytes, and all again while two words are equal
        (without that, equal words would prefer the lower index, and the result depend on the sort).
        """
        while True:
            words = self._words(n)
            order = np.argsort(words, kind="stable")
            ranked = words[order]
            if not bool((ranked[1:] == ranked[:-1]).any()):
                return order.astype(np.int64)

    def _words(self, n: int) -> npt.NDArray[np.uint64]:
        return np.frombuffer(self.bytes(8 * n), dtype="<u8").astype(np.uint64)

    def __repr__(self) -> str:
        return "Stream(secret)"
