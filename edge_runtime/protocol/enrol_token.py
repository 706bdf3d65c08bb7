"""The one string an operator gives a device: where to enrol, whom to trust, and a secret good for one key.

``fleetgrad-enrol-1.`` then base64url without padding (RFC 4648, section 5) of

    root public key (32) || registrar sealing key (32) || secret (32)
    || token id || federation || device name, empty: free || broker URL      each: length (u16 LE), ASCII
    || first 8 bytes of SHA-256(``fleetgrad-enrol-1.`` || all before)

There is one spelling of each token: whatever parses encodes to the same string. The digest finds typing errors and
lost ends; it is no protection, since whoever holds the string holds the secret.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import struct
from dataclasses import dataclass

from edge_runtime.protocol.crypto.keys import KEY_BYTES, SealingPublicKey, VerifyKey
from edge_runtime.protocol.errors import Fault, FleetgradError, RemoteProtocolError
from edge_runtime.protocol.ids import DeviceId, FederationId, device_id, federation_id

PREFIX = "fleetgrad-enrol-1."
SECRET_BYTES = 32
MAX_BROKER_URL = 512
MAX_TOKEN_CHARACTERS = 1400
_CHECKSUM_BYTES = 8
_LENGTH = struct.Struct("<H")
_ANY_VERSION = re.compile(r"fleetgrad-enrol-[0-9]+\.")
_URL = re.compile(rf"[!-~]{{1,{MAX_BROKER_URL}}}")


class TokenError(
    FleetgradError,
    fault=Fault.ENGINEER,
    remedy="copy the whole token again, or ask the operator for a new one",
):
    """The text is no usable enrolment token; the message says what to do and never repeats the text."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EnrolToken:
    """What a device needs to enrol once. ``token_id``: a name like a device's; ``device`` None: any name is good.

    ``secret``: 32 bytes. ``broker_url``: 1-512 printable ASCII characters, perhaps with a password. Neither of the
    two is ever printed; nothing compares or hashes tokens. Raises TokenError for values outside these bounds.
    """

    federation: FederationId
    broker_url: str
    root: VerifyKey
    registrar: SealingPublicKey
    token_id: str
    secret: bytes
    device: DeviceId | None = None

    def __post_init__(self) -> None:
        if len(self.secret) != SECRET_BYTES:
            raise TokenError(f"the secret of a token has {SECRET_BYTES} bytes, not {len(self.secret)}")
        if not _URL.fullmatch(self.broker_url):
            raise TokenError(f"a token's broker URL is 1-{MAX_BROKER_URL} printable ASCII characters")
        try:
            federation_id(self.federation)
            device_id(self.token_id)
            if self.device is not None:
                device_id(self.device)
        except RemoteProtocolError as error:
            raise TokenError(f"a name in the token: {error.detail}") from None

    def __repr__(self) -> str:
        return (
            f"EnrolToken(federation={self.federation!r}, token_id={self.token_id!r}, device={self.device!r})"
        )

    def encode(self) -> str:
        """The printable string. It holds the secret: show it to the operator once, never log it."""
        texts = (self.token_id, self.federation, self.device or "", self.broker_url)
        content = b"".join((self.root.raw, self.registrar.raw, self.secret, *map(_text, texts)))
        return PREFIX + base64.urlsafe_b64encode(content + _checksum(content)).rstrip(b"=").decode()

    @classmethod
    def parse(cls, text: str) -> EnrolToken:
        """The token of a string; white space around it is dropped. Raises TokenError."""
        text = text.strip()
        if not text.startswith(PREFIX):
            if _ANY_VERSION.match(text):
                raise TokenError(
                    "this enrolment token is of another version: update this software, or ask for a new token"
                )
            raise TokenError(
                f"this is no enrolment token: one begins with {PREFIX} (`aggregator enroll-token`)"
            )
        content = _content(text)
        keys = [content[i : i + KEY_BYTES] for i in range(0, 3 * KEY_BYTES, KEY_BYTES)]
        token_id, federation, device, broker_url = _texts(content[3 * KEY_BYTES :])
        token = cls(
            federation=FederationId(federation),
            broker_url=broker_url,
            root=VerifyKey(keys[0]),
            registrar=SealingPublicKey(keys[1]),
            token_id=token_id,
            secret=keys[2],
            device=DeviceId(device) if device else None,
        )
        if token.encode() != text:
            raise _damaged()
        return token


def _damaged() -> TokenError:
    return TokenError("this enrolment token is mistyped or cut off: copy the whole string again, in one line")


def _content(text: str) -> bytes:
    """What stands before the checksum: the three keys and at least nothing more."""
    if len(text) > MAX_TOKEN_CHARACTERS:
        raise _damaged()
    encoded = text[len(PREFIX) :]
    try:
        raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters beyond ASCII
        raise _damaged() from None
    content, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
    if len(content) < 3 * KEY_BYTES or checksum != _checksum(content):
        raise _damaged()
    return content


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(PREFIX.encode() + content).digest()[:_CHECKSUM_BYTES]


def _text(text: str) -> bytes:
    raw = text.encode("ascii")
    return _LENGTH.pack(len(raw)) + raw


def _texts(raw: bytes) -> tuple[str, str, str, str]:
    """The four texts that fill ``raw`` exactly. Right checksum, wrong content: made by other software."""
    texts = []
    try:
        for _ in range(4):
            (length,) = _LENGTH.unpack_from(raw)
            if length > len(raw) - _LENGTH.size:
                raise _damaged()
            texts.append(raw[_LENGTH.size : _LENGTH.size + length].decode("ascii"))
            raw = raw[_LENGTH.size + length :]
    except (struct.error, UnicodeDecodeError):
        raise _damaged() from None
    if raw:
        raise _damaged()
    token_id, federation, device, broker_url = texts
    return token_id, federation, device, broker_url
