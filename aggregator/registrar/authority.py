"""The federation's root: it says which key is which device, and which keys speak for the aggregator.

Everything but ``serve`` is a function of the arguments and the store. A decision is committed before it is told.
"""

from __future__ import annotations

import hmac
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from aggregator.registrar import folder as files
from aggregator.registrar.folder import RegistrarError
from aggregator.registrar.store import DeviceRow, Store, TokenRow, Transaction
from edge_runtime.protocol import topics
from edge_runtime.protocol.certificates import issue_aggregator, issue_device
from edge_runtime.protocol.crypto.keys import SealingPrivateKey, SigningKey, VerifyKey
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.enrol_token import SECRET_BYTES, EnrolToken
from edge_runtime.protocol.envelope import Header, pack, seal_context, unpack
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.identities import (
    AggregatorCertificate,
    DeviceCertificate,
    EnrolAnswer,
    EnrolRequest,
)
from edge_runtime.protocol.ids import DeviceId, Digest, FederationId, device_id, federation_id, sha256
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.rejects import Reject
from edge_runtime.transport.address import parse_broker_url
from edge_runtime.transport.base import Received, Transport, TransportError

log = logging.getLogger(__name__)

Entropy = Callable[[int], bytes]
"""So many bytes from the operating system's generator."""

_TOKEN_ID_BYTES = 8
_POLL_S = 0.2
_MAX_UNIX_S = 253_402_300_799  # the last second of the year 9999
_NO_HASH = bytes(32)  # compared with when the token is unknown, so that both take the same path
_MAX_UINT32 = 2**32 - 1
_Name = TypeVar("_Name", bound=str)


def create(folder: Path, federation: str, entropy: Entropy = os.urandom) -> Registrar:
    """A new root in a new folder. Raises RegistrarError: the folder exists, a bad name, the disk."""
    name = _named(federation_id, federation)
    root = CRYPTO.generate_signing_key(entropy(32))
    sealing = CRYPTO.generate_sealing_key(entropy(32))
    files.make_folder(folder)
    files.write_key(folder / files.ROOT_KEY, root.to_bytes())
    files.write_key(folder / files.SEALING_KEY, sealing.to_bytes())
    files.new_file(
        folder / files.DATABASE, b""
    )  # so that it is 0600; SQLite gives its own files the same mode
    store = Store(folder / files.DATABASE)
    store.initialize(name, CRYPTO.verify_key(root))
    files.sync_folder(folder)
    return Registrar(name, root, sealing, store, entropy)


def open(folder: Path, entropy: Entropy = os.urandom) -> Registrar:
    """The registrar of a folder made by ``create``. Raises RegistrarError."""
    if not folder.is_dir():
        raise RegistrarError(f"there is no registrar in {folder}: make one with `aggregator init`")
    root = SigningKey(files.read_key(folder / files.ROOT_KEY))
    sealing = SealingPrivateKey(files.read_key(folder / files.SEALING_KEY))
    if not (folder / files.DATABASE).is_file():
        raise RegistrarError(
            f"{folder} holds keys but no {files.DATABASE}: restore it from its backup; if no device ever enrolled "
            "here, remove the folder and make it again"
        )
    store = Store(folder / files.DATABASE)
    try:
        name, root_key = store.federation()
        if root_key != CRYPTO.verify_key(root).raw:
            raise RegistrarError(f"{files.ROOT_KEY} and {files.DATABASE} in {folder} do not belong together")
        return Registrar(_named(federation_id, name), root, sealing, store, entropy)
    except BaseException:
        store.close()
        raise


class Registrar:
    """Made by ``create`` or ``open``. Several may share a folder: one answers while another adds tokens.

    ``refusals`` counts what ``answer`` refused since the start, ``enrolled`` the certificates it issued.
    """

    def __init__(
        self,
        federation: FederationId,
        root: SigningKey,
        sealing: SealingPrivateKey,
        store: Store,
        entropy: Entropy,
    ) -> None:
        self.federation = federation
        self.root = CRYPTO.verify_key(root)
        self.sealing_key = CRYPTO.sealing_public_key(sealing)
        self.refusals: Counter[Reject] = Counter()
        self.enrolled = 0
        self._root = root
        self._sealing = sealing
        self._store = store
        self._entropy = entropy

    def close(self) -> None:
        """Lets go of the database."""
        self._store.close()

    # ---- what the operator asks ---------------------------------------------------------------------

    def certify_aggregator(
        self, signing_key: bytes, sealing_key: bytes, generation: int, first_round: int, last_round: int
    ) -> bytes:
        """An AggregatorCertificate as it travels, for rounds ``first_round..last_round`` of ``generation``.

        ``signing_key``: Ed25519 public, ``sealing_key``: X25519 public, 32 bytes each. Certificates may overlap
        (rotation). Raises RegistrarError.
        """
        if not (0 <= generation <= _MAX_UINT32 and 0 <= first_round <= last_round <= _MAX_UINT32):
            raise RegistrarError(
                f"generation {generation}, rounds {first_round}..{last_round}: whole numbers up to {_MAX_UINT32} "
                "are wanted, the first not after the last"
            )
        certificate = AggregatorCertificate(
            federation=self.federation,
            signing_key=signing_key,
            sealing_key=sealing_key,
            generation=generation,
            first_round=first_round,
            last_round=last_round,
        )
        try:
            AggregatorCertificate.decode(certificate.encode())
        except RemoteProtocolError as error:
            raise RegistrarError(f"the aggregator's keys cannot be certified: {error.detail}") from None
        return issue_aggregator(CRYPTO, self._root, certificate)

    def new_token(self, broker_url: str, expires_at: int, device: str | None = None) -> EnrolToken:
        """A token for one key, good until ``expires_at`` (Unix seconds); ``device`` fixes the name.

        Only the hash of its secret is kept. Raises RegistrarError, TransportError for the URL, TokenError.
        """
        parse_broker_url(broker_url)
        if not 0 < expires_at <= _MAX_UNIX_S:
            raise RegistrarError(f"{expires_at} is no time in Unix seconds for a token to expire")
        token = EnrolToken(
            federation=self.federation,
            broker_url=broker_url,
            root=self.root,
            registrar=self.sealing_key,
            token_id=self._entropy(_TOKEN_ID_BYTES).hex(),
            secret=self._entropy(SECRET_BYTES),
            device=None if device is None else _named(device_id, device),
        )
        with self._store.transaction() as rows:
            rows.add_token(token.token_id, sha256(token.secret), expires_at, token.device)
        return token

    def devices(self) -> list[DeviceRow]:
        """All enrolled, in the order of names. Raises RegistrarError."""
        with self._store.transaction() as rows:
            return rows.devices()

    def tokens(self) -> list[TokenRow]:
        """All ever made, in the order of expiry. Raises RegistrarError."""
        with self._store.transaction() as rows:
            return rows.tokens()

    # ---- what devices ask ---------------------------------------------------------------------------

    def answer(self, now: float, topic: str, payload: bytes) -> tuple[str, bytes] | None:
        """Topic and payload of the answer to a message of ``topics.all_enrol``; ``now``: Unix seconds.

        None for what is not provably said by the holder of the key inside: a root-signed refusal of a request that
        somebody altered on the way would turn the honest device away. The same request gets the same answer, byte
        for byte, also after a restart. Raises RegistrarError if the database fails; nothing was decided then.
        """
        try:
            device, digest, request = self._open(topic, payload)
        except RemoteProtocolError as error:
            self._count(error, topic)
            return None
        reject, certificate = None, b""
        try:
            with self._store.transaction() as rows:
                certificate, issued = self._enrol(rows, now, device, request)
        except RemoteProtocolError as error:
            self._count(error, topic)
            reject = error.reject
        else:
            self.enrolled += issued
            log.info("%s %s with token %s", "enrolled" if issued else "confirmed", device, request.token_id)
        body = EnrolAnswer(reject=reject, certificate=certificate, request_digest=digest).encode()
        header = Header(
            kind=Kind.ENROLLED, federation=self.federation, device=device, payload_digest=sha256(body)
        )
        (raw,) = pack(header, body, lambda message: CRYPTO.sign(self._root, message))
        return topics.down(self.federation, device), raw

    def _open(self, topic: str, payload: bytes) -> tuple[DeviceId, Digest, EnrolRequest]:
        sender = topics.sender_of(topic)
        envelope = unpack(payload, self.federation, Kind.ENROL)
        header = envelope.header
        if topic != topics.enrol(self.federation, sender.device) or header.device != sender.device:
            raise RemoteProtocolError(Reject.WRONG_TOPIC, f"a request of {header.device!r} on {topic!r}")
        if header.chunk_count != 1:
            raise RemoteProtocolError(Reject.MALFORMED, "an enrolment request comes in one piece")
        plain = CRYPTO.open(self._sealing, seal_context(header), b"", envelope.body)
        request = EnrolRequest.decode(plain)
        CRYPTO.verify(VerifyKey(request.signing_key), envelope.signed_bytes(), envelope.signature)
        return sender.device, header.payload_digest, request

    def _enrol(
        self, rows: Transaction, now: float, device: DeviceId, request: EnrolRequest
    ) -> tuple[bytes, bool]:
        """The certificate, and whether it is a new one. Raises RemoteProtocolError with the refusal."""
        key = request.signing_key
        token, secret_hash = rows.token(request.token_id) or (None, _NO_HASH)
        if not hmac.compare_digest(sha256(request.token_secret), secret_hash) or token is None:
            raise RemoteProtocolError(
                Reject.BAD_TOKEN, f"{request.token_id!r} is unknown or its secret is wrong"
            )
        if token.device not in (None, device):
            raise RemoteProtocolError(
                Reject.BAD_TOKEN, f"{token.token_id} is for {token.device!r}, not {device!r}"
            )
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
        if holder is not None and holder.signing_key != key:
            raise RemoteProtocolError(
                Reject.NAME_TAKEN, f"{device!r} is {holder.signing_key.hex()}, not {key.hex()}"
            )
        issued = holder is None
        if holder is None:
            certificate = DeviceCertificate(federation=self.federation, device=device, signing_key=key)
            holder = DeviceRow(device, key, issue_device(CRYPTO, self._root, certificate), int(now))
            rows.add_device(holder)
        rows.use_token(token.token_id, key, device)
        return holder.certificate, issued

    def _count(self, error: RemoteProtocolError, topic: str) -> None:
        self.refusals[error.reject] += 1
        log.warning("refused a request on %r: %s", topic[:120], error)

    # ---- the loop -----------------------------------------------------------------------------------

    def serve(
        self, transport: Transport, should_stop: Callable[[], bool], clock: Callable[[], float] = time.time
    ) -> None:
        """Answer over an opened transport until ``should_stop()``, asked 5 times a second. ``clock``: Unix seconds.

        A request is acknowledged after its decision is committed; one whose answer cannot be sent is asked again by
        the device. Raises RegistrarError if the database fails, the request then stays with the broker.
        """
        transport.subscribe(topics.all_enrol(self.federation))
        while not should_stop():
            event = transport.next_event(_POLL_S)
            if not isinstance(event, Received):
                continue
            answer = self.answer(clock(), event.topic, event.payload)
            if answer is not None:
                try:
                    transport.publish(*answer)
                except TransportError as error:
                    log.warning("the answer on %s was not sent: %s", answer[0], error)
            transport.ack(event)


def _named(check: Callable[[str], _Name], text: str) -> _Name:
    try:
        return check(text)
    except RemoteProtocolError as error:
        raise RegistrarError(error.detail) from None
