"""Taking in what devices say: verify, look inside, append to the inbox, put the question to the core."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from aggregator.blob_server import BlobServer
from aggregator.core import step as core
from aggregator.core.records import UpdateStored
from aggregator.core.state import State
from aggregator.inbox.updates import UpdateInbox
from aggregator.intake import (
    CheckInRequest,
    FetchRequest,
    Intake,
    KnownDevice,
    TelemetryReport,
    UpdatePiece,
    open_update,
)
from aggregator.ledger.ledger import Ledger
from aggregator.ledger.values import Count, DeviceSeen
from aggregator.round_keys import RoundKeyMissing, RoundKeys
from aggregator.round_maker import RoundMaker
from aggregator.rules.mean import decode_update
from aggregator.work import Incoming, Outgoing, Work
from edge_runtime.protocol import topics
from edge_runtime.protocol.errors import LocalProtocolError, RemoteProtocolError
from edge_runtime.protocol.identities import DeviceCertificate, SignedBytes
from edge_runtime.protocol.ids import DeviceId, FederationId, RoundId
from edge_runtime.protocol.messages import Receipt
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import Verdict


@dataclass(kw_only=True)
class Reception:
    """``decide``: runs the core's step and gathers its decision; ``state``: the core's, read only here."""

    federation: FederationId
    plan: Plan
    parameter_count: int
    ledger: Ledger
    updates: UpdateInbox
    keys: RoundKeys
    maker: RoundMaker
    blobs: BlobServer
    clock: Callable[[], float]
    state: State
    decide: Callable[[core.Event, Work], None]
    intake: Intake = field(init=False)
    _known: dict[DeviceId, KnownDevice] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        identity = self.maker.identity
        self.intake = Intake(
            federation=self.federation,
            provider=self.maker.provider,
            root=identity.root,
            sealing_key=identity.sealing_key,
            lookup=self._lookup,
        )

    def take(self, message: Incoming, work: Work) -> None:
        """One message; a refusal is counted, told to its sender where it is known, and has no other effect."""
        try:
            self._take(message, work)
        except RemoteProtocolError as error:
            work.counts[error.reject] += 1
            work.say("refused", topic=message.topic, reject=error.reject.name.lower(), detail=error.detail)

    def _take(self, message: Incoming, work: Work) -> None:
        request = self.intake.accept(message.topic, message.payload)
        match request:
            case CheckInRequest():
                self._check_in(request, work)
            case FetchRequest():
                self.blobs.request(self.clock(), request.device, request.fetch)
            case TelemetryReport():
                work.telemetry.append((request.device, request.telemetry))
                self._saw(request.device, request.header.sequence, work)
            case UpdatePiece():
                work.counts[Count.UPDATE_BYTES] += len(message.payload)
                self._update(request, work)

    def _check_in(self, request: CheckInRequest, work: Work) -> None:
        sequence = request.header.sequence
        self._known[request.device] = KnownDevice(
            signing_key=request.certificate.signing_key,
            epoch=request.certificate.epoch,
            last_sequence=sequence,
        )
        work.devices[request.device] = DeviceSeen(
            device=request.device,
            signing_key=request.certificate.signing_key,
            certificate=request.checkin.certificate,
            sequence=sequence,
        )
        event = core.CheckInArrived(
            device=request.device,
            sequence=sequence,
            ttl_s=request.checkin.ttl_s,
            samples=request.checkin.samples,
            codecs=request.checkin.codecs,
        )
        self.decide(event, work)

    def _saw(self, device: DeviceId, sequence: int, work: Work) -> None:
        known = self._known[device]
        self._known[device] = dataclasses.replace(known, last_sequence=sequence)
        row = work.devices.get(device) or self.ledger.device(device)
        if row is None:
            raise LocalProtocolError(f"{device} is known but not in the ledger")
        work.devices[device] = DeviceSeen(
            device=device, signing_key=row.signing_key, certificate=row.certificate, sequence=sequence
        )

    def _update(self, request: UpdatePiece, work: Work) -> None:
        header, device = request.envelope.header, request.device
        round_id, digest = header.round_id, header.payload_digest

        def answer(verdict: Verdict, reject: Reject | None = None, samples: int = 0) -> None:
            capped = samples >= self.plan.sample_cap
            receipt = Receipt(verdict=verdict, reject=reject, update_digest=digest, capped=capped)
            payload = self.maker.receipt(device, round_id, header.manifest_digest, receipt)
            work.outgoing.append(Outgoing(topics.down(self.federation, device), payload))

        try:
            settled = core.screen(self.state, device, round_id, header.manifest_digest, digest)
            known = self.state.stored.get(device) if settled is Verdict.STORED else None
            if settled is Verdict.LATE and (row := self.ledger.find_update(round_id, device)) is not None:
                settled = Verdict.STORED if row.digest == digest else Reject.CONFLICTING
                known = UpdateStored(round_id=round_id, device=device, digest=row.digest, samples=row.samples)
            if isinstance(settled, Reject):
                raise RemoteProtocolError(settled, f"update of {device} for round {tuple(round_id)}")
            if settled is not None:
                work.counts[Count.LATE if settled is Verdict.LATE else Count.DUPLICATE] += 1
                event = "update_late" if settled is Verdict.LATE else "update_again"
                work.say(event, round=round_id.number, device=device)
                answer(settled, samples=known.samples if known else 0)
                return
            samples = self._store(request, work)
        except RemoteProtocolError as error:
            answer(Verdict.REJECTED, error.reject)
            raise
        if samples is not None:
            counted = min(samples, self.plan.sample_cap)
            arrived = core.UpdateArrived(device=device, round_id=round_id, digest=digest, samples=counted)
            self.decide(arrived, work)
            work.say("update_stored", round=round_id.number, device=device, samples=counted)

    def _store(self, request: UpdatePiece, work: Work) -> int | None:
        """The sample count of an update that is complete and usable; None while pieces are missing."""
        header, device = request.envelope.header, request.device
        sealed: bytes | None = request.envelope.body
        samples = None
        if header.chunk_count == 1:  # looked into before a byte is written
            samples = self._look_inside(header.round_id, request, request.envelope.body)
        piece, sealed = self.updates.add(device, header, request.envelope.body)
        if samples is None and sealed is not None:
            try:
                samples = self._look_inside(header.round_id, request, sealed)
            except RemoteProtocolError:
                self.updates.forget(header.round_id, device, header.payload_digest)
                raise
        if piece is not None:
            work.pieces.append(piece)
        return samples

    def _look_inside(self, round_id: RoundId, request: UpdatePiece, sealed: bytes) -> int:
        try:
            key = self.keys.get(round_id)
        except RoundKeyMissing as error:
            raise RemoteProtocolError(Reject.BAD_SEAL, str(error)) from error
        update = open_update(self.maker.provider, key, request.envelope.header, sealed)
        decode_update(update, self.plan, self.parameter_count)
        return update.samples

    def _lookup(self, device: DeviceId) -> KnownDevice | None:
        known = self._known.get(device)
        if known is None and (row := self.ledger.device(device)) is not None:
            certificate = DeviceCertificate.decode(SignedBytes.decode(row.certificate).body)
            known = KnownDevice(
                signing_key=row.signing_key, epoch=certificate.epoch, last_sequence=row.last_sequence
            )
            self._known[device] = known
        return known
