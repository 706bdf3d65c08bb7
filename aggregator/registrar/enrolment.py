"""What an enrolment request asks, and whether it is granted: functions of a transaction and the arguments."""

from __future__ import annotations

import hmac
from collections.abc import Callable

from aggregator.registrar.store import DeviceRow, Transaction
from edge_runtime.protocol import topics
from edge_runtime.protocol.crypto.keys import SealingPrivateKey, VerifyKey
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.envelope import seal_context, unpack
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.identities import EnrolRequest
from edge_runtime.protocol.ids import DeviceId, Digest, FederationId, sha256
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.rejects import Reject

Certify = Callable[[DeviceId, bytes, int], bytes]
"""(device, signing key, epoch) -> the certificate as it travels."""

_NO_HASH = bytes(32)  # compared with when the token is unknown, so that both take the same path


def read_request(
    federation: FederationId, sealing: SealingPrivateKey, topic: str, payload: bytes
) -> tuple[DeviceId, Digest, EnrolRequest]:
    """Who asks, the digest of the payload, and the request; signed by the key inside.

    Raises RemoteProtocolError; such a message cannot be attributed and gets no answer.
    """
    sender = topics.sender_of(topic)
    envelope = unpack(payload, federation, Kind.ENROL)
    header = envelope.header
    if topic != topics.enrol(federation, sender.device) or header.device != sender.device:
        raise RemoteProtocolError(Reject.WRONG_TOPIC, f"a request of {header.device!r} on {topic!r}")
    if header.chunk_count != 1:
        raise RemoteProtocolError(Reject.MALFORMED, "an enrolment request comes in one piece")
    plain = CRYPTO.open(sealing, seal_context(header), b"", envelope.body)
    request = EnrolRequest.decode(plain)
    CRYPTO.verify(VerifyKey(request.signing_key), envelope.signed_bytes(), envelope.signature)
    return sender.device, header.payload_digest, request


def decide(
    rows: Transaction, now: float, device: DeviceId, request: EnrolRequest, certify: Certify
) -> tuple[bytes, bool]:
    """The certificate, and whether it is a new one. Raises RemoteProtocolError with the refusal."""
    key = request.signing_key
    token, secret_hash = rows.token(request.token_id) or (None, _NO_HASH)
    if not hmac.compare_digest(sha256(request.token_secret), secret_hash) or token is None:
        raise RemoteProtocolError(Reject.BAD_TOKEN, f"{request.token_id!r} is unknown or its secret is wrong")
    if token.device not in (None, device):
        raise RemoteProtocolError(
            Reject.BAD_TOKEN, f"{token.token_id} is for {token.device!r}, not {device!r}"
        )
    if rows.is_revoked(key):
        raise RemoteProtocolError(Reject.REVOKED, f"the key {key.hex()} was revoked")
    holder = rows.device(device)
    if token.used_by is not None:
        # Before the expiry: a device whose answer was lost asks again, however late.
        if holder is None or (token.used_by, token.used_as) != (key, device):
            raise RemoteProtocolError(
                Reject.TOKEN_USED,
                f"{token.token_id} was used by key {token.used_by.hex()} as {token.used_as!r}; "
                f"now {key.hex()} shows it",
            )
        return holder.certificate, False
    if now >= token.expires_at:
        raise RemoteProtocolError(
            Reject.TOKEN_EXPIRED, f"{token.token_id} expired {now - token.expires_at:.0f} s ago"
        )
    issued = holder is None or holder.revoked_at is not None
    if holder is None or issued:
        certificate = certify(device, key, rows.revoked_epochs().get(device, 0) + 1)
        holder = DeviceRow(device, key, certificate, int(now))
        rows.put_device(holder)
    elif holder.signing_key != key:
        raise RemoteProtocolError(
            Reject.NAME_TAKEN, f"{device!r} is {holder.signing_key.hex()}, not {key.hex()}"
        )
    rows.use_token(token.token_id, key, device)
    return holder.certificate, issued
