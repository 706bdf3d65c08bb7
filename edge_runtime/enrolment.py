"""How a device becomes known: it shows a token to the registrar and gets a root-signed certificate for its key."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from edge_runtime.protocol import topics
from edge_runtime.protocol.certificates import check_device
from edge_runtime.protocol.crypto.keys import SigningKey, VerifyKey
from edge_runtime.protocol.crypto.provider import CryptoProvider
from edge_runtime.protocol.enrol_token import EnrolToken, TokenError
from edge_runtime.protocol.envelope import Header, pack, seal_context, unpack
from edge_runtime.protocol.errors import Fault, FleetgradError, RemoteProtocolError
from edge_runtime.protocol.identities import EnrolAnswer, EnrolRequest
from edge_runtime.protocol.ids import DeviceId, Digest, FederationId, sha256
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.rejects import Reject
from edge_runtime.transport.base import (
    Connected,
    Disconnected,
    NotConnected,
    Received,
    Transport,
    full_jitter_s,
)

log = logging.getLogger(__name__)

_RESEND_BASE_S = 0.5
_RESEND_CAP_S = 10.0


class EnrolmentError(
    FleetgradError,
    fault=Fault.OPERATOR,
    remedy="see that `aggregator registrar serve` runs on the same broker; then enrol again with the same token",
):
    """The device is not enrolled; the text says what to do."""


class EnrolmentRefused(
    EnrolmentError, fault=Fault.OPERATOR, remedy="see the named refusal in the table of refusals"
):
    """The registrar said no, under the root's signature. ``reject`` says why."""

    def __init__(self, device: DeviceId, reject: Reject) -> None:
        super().__init__(f"the registrar refused to enrol {device!r}: {reject.meaning}; {reject.remedy}")
        self.reject = reject


@dataclass(frozen=True, kw_only=True)
class Enrolled:
    """What the device keeps for good. ``certificate``: encoded SignedBytes of its DeviceCertificate.

    ``ignored``: messages that came while it waited and were no answer to it under the root's signature.
    """

    certificate: bytes
    federation: FederationId
    root: VerifyKey
    broker_url: str
    ignored: int = 0


def enrol(
    transport: Transport,
    token: EnrolToken,
    device: DeviceId,
    signing_key: SigningKey,
    provider: CryptoProvider,
    entropy: Callable[[int], bytes],
    clock: Callable[[], float],
    timeout_s: float,
) -> Enrolled:
    """Ask over an opened transport until the registrar answers: identical bytes, full-jitter pauses.

    ``signing_key``: the device's identity, kept on disk before this is called, since the token is good for one key.
    ``entropy``: so many random bytes. ``clock``: monotonic seconds. Raises EnrolmentRefused; EnrolmentError after
    ``timeout_s``; TokenError for a token that is not for this device; TransportError.
    """
    if token.device not in (None, device):
        raise TokenError(
            f"this token is for the device {token.device!r}, not {device!r}: use that name or another token"
        )
    sealed, message = _request(token, device, signing_key, provider, entropy)
    awaiting = _Awaiting(token, device, provider.verify_key(signing_key), provider, sha256(sealed))
    ask, listen = topics.enrol(token.federation, device), topics.down(token.federation, device)
    deadline = clock() + timeout_s
    next_send, attempt, sent, lost = clock(), 0, 0, False
    transport.subscribe(listen)
    try:
        while (now := clock()) < deadline:
            if now >= next_send:
                pause_s = full_jitter_s(
                    attempt,
                    lambda: int.from_bytes(entropy(6), "little") / 2**48,
                    base_s=_RESEND_BASE_S,
                    cap_s=_RESEND_CAP_S,
                )
                next_send, attempt = now + pause_s, attempt + 1
                try:
                    transport.publish(ask, message)
                    sent += 1
                except NotConnected as error:
                    lost = True
                    log.info("the enrolment request waits: %s", error)
            event = transport.next_event(max(min(next_send, deadline) - now, 0.0))
            if isinstance(event, Disconnected):
                lost = True
            elif isinstance(event, Connected) and lost:
                next_send, lost = clock(), False
            elif isinstance(event, Received):
                transport.ack(event)
                certificate = awaiting.read(event.payload) if event.topic == listen else None
                if certificate is not None:
                    return Enrolled(
                        certificate=certificate,
                        federation=token.federation,
                        root=token.root,
                        broker_url=token.broker_url,
                        ignored=awaiting.ignored,
                    )
    finally:
        transport.unsubscribe(listen)
    raise EnrolmentError(
        f"no registrar answered within {timeout_s:g} s ({sent} requests sent, {awaiting.ignored} other messages "
        f"ignored): is `aggregator registrar serve` of federation {token.federation!r} running on this broker, and "
        "may it read `e/+` and write `d/+` there? The token can be used again"
    )


def _request(
    token: EnrolToken,
    device: DeviceId,
    signing_key: SigningKey,
    provider: CryptoProvider,
    entropy: Callable[[int], bytes],
) -> tuple[bytes, bytes]:
    """The sealed payload, and the message that carries it."""
    request = EnrolRequest(
        token_id=token.token_id,
        token_secret=token.secret,
        signing_key=provider.verify_key(signing_key).raw,
    )
    header = Header(
        kind=Kind.ENROL, federation=token.federation, device=device, payload_digest=sha256(b"")
    )  # pack fills in the digest; the seal does not depend on it
    try:
        sealed = provider.seal(token.registrar, seal_context(header), b"", request.encode(), entropy(32))
    except RemoteProtocolError:
        raise TokenError("the registrar's key in this token is unusable: ask for a new token") from None
    (message,) = pack(header, sealed, lambda raw: provider.sign(signing_key, raw))
    return sealed, message


@dataclass
class _Awaiting:
    """What an answer must fit."""

    token: EnrolToken
    device: DeviceId
    key: VerifyKey
    provider: CryptoProvider
    request_digest: Digest
    ignored: int = 0

    def read(self, payload: bytes) -> bytes | None:
        """The certificate; None for anything that is not the root's answer to our request.

        Raises EnrolmentRefused, or EnrolmentError for an answer of the root that makes no sense.
        """
        try:
            answer = self._authentic(payload)
        except RemoteProtocolError as error:
            self.ignored += 1
            log.warning("ignored a message while enrolling: %s", error)
            return None
        if answer.reject is not None:
            raise EnrolmentRefused(self.device, answer.reject)
        try:
            certificate = check_device(
                self.provider, self.token.root, answer.certificate, self.token.federation, self.device
            )
        except RemoteProtocolError as error:
            raise EnrolmentError(f"the registrar sent an unusable certificate ({error}): update it") from None
        if certificate.signing_key != self.key.raw:
            raise EnrolmentError("the registrar sent a certificate for another key: update it")
        return answer.certificate

    def _authentic(self, payload: bytes) -> EnrolAnswer:
        envelope = unpack(payload, self.token.federation, Kind.ENROLLED)
        self.provider.verify(self.token.root, envelope.signed_bytes(), envelope.signature)
        answer = EnrolAnswer.decode(envelope.body)
        if envelope.header.device != self.device or answer.request_digest != self.request_digest:
            raise RemoteProtocolError(Reject.BAD_DIGEST, "an answer to another request")
        return answer
