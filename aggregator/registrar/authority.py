"""The federation's root: it says which key is which device, and which keys speak for the aggregator.

Everything but ``serve`` is a function of the arguments and the store. A decision is committed before it is told.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from aggregator.access import Role
from aggregator.files import write_atomic
from aggregator.registrar import enrolment, revocation, tls
from aggregator.registrar import folder as files
from aggregator.registrar.folder import RegistrarError
from aggregator.registrar.revocation import Revoked
from aggregator.registrar.store import DeviceRow, Store, TlsRow, TokenRow
from edge_runtime.protocol import topics
from edge_runtime.protocol.certificates import issue_aggregator, issue_device
from edge_runtime.protocol.crypto.keys import SealingPrivateKey, SigningKey
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.enrol_token import SECRET_BYTES, EnrolToken
from edge_runtime.protocol.envelope import Header, pack
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.identities import (
    AggregatorCertificate,
    DeviceCertificate,
    EnrolAnswer,
)
from edge_runtime.protocol.ids import DeviceId, FederationId, device_id, federation_id, sha256
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
_MAX_UINT32 = 2**32 - 1
_NO_AUTHORITY = "there is no TLS authority yet: make it with `aggregator registrar tls`"
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
    return Registrar(name, root, sealing, store, folder, entropy)


def open(folder: Path, entropy: Entropy = os.urandom) -> Registrar:
    """The registrar of a folder made by ``create``. Raises RegistrarError."""
    if not folder.is_dir():
        raise RegistrarError(f"there is no registrar in {folder}: make one with `aggregator init`")
    if (inside := folder / "registrar").is_dir() and not (folder / files.ROOT_KEY).exists():
        raise RegistrarError(f"there is no registrar in {folder} itself: did you mean {inside}?")
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
        return Registrar(_named(federation_id, name), root, sealing, store, folder, entropy)
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
        folder: Path,
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
        self._folder = folder
        self._entropy = entropy
        self._sign_list = revocation.signer(federation, root)
        with store.transaction() as rows:
            if rows.published() is None:
                revocation.next_list(rows, self._sign_list, None, 0)
        self._write_published()  # a crash may have come between the commit and the files

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

    # ---- revocation and TLS -------------------------------------------------------------------------

    @property
    def revocations_file(self) -> Path:
        """The newest signed RevocationList, hex in one line; always there. The aggregator's settings name it."""
        return self._folder / files.REVOCATIONS

    @property
    def tls_folder(self) -> Path:
        """The TLS authority, the registrar's own client certificate, and the CRL for the broker."""
        return self._folder / files.TLS

    @property
    def crl_file(self) -> Path:
        """The newest list of revoked TLS certificates, PEM; there once TLS is set up."""
        return self.tls_folder / files.CRL

    def tls_files(self) -> tuple[Path, Path, Path] | None:
        """The registrar's own: whom to trust, its certificate, its key. None if TLS is not set up."""
        names = (files.AUTHORITY_CERTIFICATE, files.OWN_CERTIFICATE, files.OWN_KEY)
        ca, certificate, key = (self.tls_folder / name for name in names)
        return (ca, certificate, key) if key.is_file() and certificate.is_file() else None

    def revoke(self, name: str, now: float) -> Revoked:
        """Void certificate, TLS certificates and unused tokens of a device, or the TLS certificates of a role.

        The files are rewritten even if nothing new was voided. Raises RegistrarError: nothing was ever issued.
        """
        if name not in {role.value for role in Role}:
            _named(device_id, name)
        authority = self._tls_authority()
        with self._store.transaction() as rows:
            known = rows.device(DeviceId(name)) or any(row.name == name for row in rows.tls_certificates())
            if not known and all(row.device != name for row in rows.tokens()):
                raise RegistrarError(
                    f"nothing was issued to {name!r}: `aggregator registrar devices` lists the names"
                )
            revoked = revocation.void(rows, name, int(now))
            if not revoked.nothing:
                revocation.next_list(rows, self._sign_list, authority, int(now))
        self._write_published()
        return revoked

    def set_up_tls(self, now: float, days: int) -> None:
        """Make the TLS authority unless there is one, and a new certificate for the registrar itself."""
        if self._tls_authority() is None:
            made = tls.new_authority(self.federation, now)
            files.write_folder(
                self.tls_folder,
                {files.AUTHORITY_KEY: made.key, files.AUTHORITY_CERTIFICATE: made.certificate},
            )
        authority = self._required_authority()
        with self._store.transaction() as rows:
            row = rows.published()
            if row is not None and (row.crl is None or not tls.is_crl_of(authority, row.crl)):
                rows.publish(row._replace(crl=revocation.crl(rows, authority, row.number, int(now))))
        self._write_published()
        own = self.client_certificate(Role.REGISTRAR.value, now, days)
        write_atomic(self.tls_folder / files.OWN_KEY, own.key)
        write_atomic(self.tls_folder / files.OWN_CERTIFICATE, own.certificate)

    def authority_certificate(self) -> bytes:
        """PEM. Raises RegistrarError if ``set_up_tls`` was never called."""
        return self._required_authority().pem

    def crl(self) -> bytes:
        """PEM of the newest list of revoked TLS certificates. Raises RegistrarError as above."""
        with self._store.transaction() as rows:
            row = rows.published()
        if row is None or row.crl is None:
            raise RegistrarError(_NO_AUTHORITY)
        return row.crl

    def client_certificate(self, name: str, now: float, days: int) -> tls.Issued:
        """For a device or the value of a Role; on record before it is returned. Raises RegistrarError."""
        issued = tls.issue_client(self._required_authority(), name, now, days)
        with self._store.transaction() as rows:
            rows.add_tls(TlsRow(issued.serial, name, issued.not_after))
        return issued

    def broker_certificate(self, hosts: Sequence[str], now: float, days: int) -> tls.Issued:
        """For the broker under these names and addresses. Raises RegistrarError."""
        return tls.issue_server(self._required_authority(), self.federation, hosts, now, days)

    def tls_certificates(self) -> list[TlsRow]:
        """Of all clients, in the order of names and expiry. Raises RegistrarError."""
        with self._store.transaction() as rows:
            return rows.tls_certificates()

    def _required_authority(self) -> tls.TlsAuthority:
        authority = self._tls_authority()
        if authority is None:
            raise RegistrarError(_NO_AUTHORITY)
        return authority

    def _tls_authority(self) -> tls.TlsAuthority | None:
        if not self.tls_folder.exists():
            return None
        certificate = self.tls_folder / files.AUTHORITY_CERTIFICATE
        return tls.load_authority(
            files.read_file(certificate), files.read_secret(self.tls_folder / files.AUTHORITY_KEY)
        )

    def _write_published(self) -> None:
        """What is committed, in its files. Inside a transaction, so that two processes take turns."""
        with self._store.transaction() as rows:
            row = rows.published()
            if row is None:
                return
            _write_if_new(self.revocations_file, row.revocations.hex().encode() + b"\n")
            if row.crl is not None:
                _write_if_new(self.crl_file, row.crl)

    # ---- what devices ask ---------------------------------------------------------------------------

    def answer(self, now: float, topic: str, payload: bytes) -> tuple[str, bytes] | None:
        """Topic and payload of the answer to a message of ``topics.all_enrol``; ``now``: Unix seconds.

        None for what is not provably said by the holder of the key inside: a root-signed refusal of a request that
        somebody altered on the way would turn the honest device away. The same request gets the same answer, byte
        for byte, also after a restart. Raises RegistrarError if the database fails; nothing was decided then.
        """
        try:
            device, digest, request = enrolment.read_request(self.federation, self._sealing, topic, payload)
        except RemoteProtocolError as error:
            self._count(error, topic)
            return None
        reject, certificate = None, b""
        try:
            with self._store.transaction() as rows:
                certificate, issued = enrolment.decide(rows, now, device, request, self._certify)
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

    def _certify(self, device: DeviceId, key: bytes, epoch: int) -> bytes:
        certificate = DeviceCertificate(
            federation=self.federation, device=device, signing_key=key, epoch=epoch
        )
        return issue_device(CRYPTO, self._root, certificate)

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


def _write_if_new(path: Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        write_atomic(path, content)
