"""A registrar in a folder of its own, and a device's request to it, each part open to change."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from aggregator import registrar
from aggregator.registrar import Registrar
from edge_runtime.enrolment import Enrolled, enrol
from edge_runtime.protocol import topics
from edge_runtime.protocol.crypto.keys import SigningKey
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.enrol_token import EnrolToken
from edge_runtime.protocol.envelope import Header, pack, seal_context, unpack
from edge_runtime.protocol.identities import EnrolAnswer, EnrolRequest
from edge_runtime.protocol.ids import DeviceId, FederationId, sha256
from edge_runtime.protocol.kinds import Kind
from edge_runtime.transport.base import Transport

FEDERATION = FederationId("digits")
DEVICE = DeviceId("pi-1")
NOW = 1_800_000_000.0
EXPIRES = int(NOW) + 3600
URL = "mqtt://broker.example:1883"


def entropy_of(seed: bytes) -> Callable[[int], bytes]:
    """So many bytes, the same in every run."""
    count = 0

    def draw(size: int) -> bytes:
        nonlocal count
        count += 1
        return hashlib.shake_256(seed + count.to_bytes(4, "big")).digest(size)

    return draw


def key(name: str) -> SigningKey:
    return CRYPTO.generate_signing_key(hashlib.sha256(name.encode()).digest())


def new_registrar(folder: Path, seed: bytes = b"registrar") -> Registrar:
    return registrar.create(folder / "registrar", FEDERATION, entropy_of(seed))


def request(
    token: EnrolToken,
    device: DeviceId = DEVICE,
    owner: SigningKey | None = None,
    *,
    secret: bytes | None = None,
    signer: SigningKey | None = None,
    topic: str | None = None,
    ephemeral: bytes = bytes(32),
) -> tuple[str, bytes]:
    """Topic and payload. ``owner``: the key asked for; ``signer``: the key that signs, by default the owner's."""
    owner = owner or key(device)
    signer = signer or owner
    body = EnrolRequest(
        token_id=token.token_id,
        token_secret=secret or token.secret,
        signing_key=CRYPTO.verify_key(owner).raw,
    )
    header = Header(kind=Kind.ENROL, federation=token.federation, device=device, payload_digest=sha256(b""))
    sealed = CRYPTO.seal(token.registrar, seal_context(header), b"", body.encode(), ephemeral)
    (raw,) = pack(replace(header, payload_digest=sha256(sealed)), sealed, lambda m: CRYPTO.sign(signer, m))
    return topic or topics.enrol(token.federation, device), raw


def read(token: EnrolToken, raw: bytes) -> EnrolAnswer:
    """An answer, its root signature verified."""
    envelope = unpack(raw, token.federation, Kind.ENROLLED)
    CRYPTO.verify(token.root, envelope.signed_bytes(), envelope.signature)
    return EnrolAnswer.decode(envelope.body)


@contextmanager
def serving(office: Registrar, transport: Transport) -> Iterator[None]:
    """The registrar's loop in a thread, over a transport opened and closed here."""
    transport.open()
    stop = threading.Event()
    thread = threading.Thread(target=office.serve, args=(transport, stop.is_set, lambda: NOW))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        transport.close()


def enrol_now(
    transport: Transport,
    token: EnrolToken,
    device: DeviceId = DEVICE,
    owner: SigningKey | None = None,
    timeout_s: float = 20.0,
) -> Enrolled:
    """Over an opened transport, with the key named after the device unless another is given."""
    return enrol(
        transport, token, device, owner or key(device), CRYPTO, os.urandom, time.monotonic, timeout_s
    )
