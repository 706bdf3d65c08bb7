"""Taking in what devices say: verify, look inside, append to the inbox, put the question to the events."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from aggregator.blob_server import BlobServer
from aggregator.core import events
from aggregator.core.records import UpdateStored
from aggregator.core.state import State
from aggregator.core.step import barred, screen
from aggregator.inbox.updates import UpdateInbox
from aggregator.intake import (
    CheckInRequest,
    FetchRequest,
    Intake,
    KnownDevice,
    Request,
    TelemetryReport,
    UpdatePiece,
    open_update,
)
from aggregator.ledger.ledger import Ledger
from aggregator.ledger.values import Count, DeviceSeen
from aggregator.round_keys import RoundKeyMissing, RoundKeys
from aggregator.round_maker import RoundMaker
from aggregator.rules.mean import decode_update
from aggregator.work import Incoming, Meter, Outgoing, Work
from edge_runtime.protocol import topics
from edge_runtime.protocol.errors import LocalProtocolError, RemoteProtocolError
from edge_runtime.protocol.identities import DeviceCertificate, SignedBytes
from edge_runtime.protocol.ids import DeviceId, Digest, FederationId, RoundId
from edge_runtime.protocol.messages import Receipt
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import Verdict


class About(NamedTuple):
    """The update that a receipt speaks of."""

    device: DeviceId
    round_id: RoundId
    manifest_digest: Digest | None
    digest: Digest


@dataclass(kw_only=True)
class Reception:
    """``decide``: runs the core's step and gathers its decision; ``state``: the core's, read only here.

    ``plan``: of the open round, as its manifest says.
    """

    federation: FederationId
    plan: Callable[[], Plan]
    parameter_count: int
    ledger: Ledger
    updates: UpdateInbox
    keys: RoundKeys
    maker: RoundMaker
    blobs: BlobServer
    clock: Callable[[], float]
    state: State
    decide: Callable[[events.Event, Work], object]
    meter: Meter
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
        request: Request | None = None
        try:
            request = self.intake.accept(message.topic, message.payload)
            self._handle(request, message, work)
        except RemoteProtocolError as error:
            work.counts[error.reject] += 1
            work.say(
                "refused",
                **_concerns(message.topic, request),
                topic=ascii(message.topic[:120]),
                reject=error.reject.name.lower(),
                detail=error.detail,
            )

    def _handle(self, request: Request, message: Incoming, work: Work) -> None:
        match request:
            case CheckInRequest():
                self._admit(request.device, request.certificate.epoch)
                self._check_in(request, work)
            case FetchRequest():
                self._admit(request.device)
                self.blobs.request(self.clock(), request.device, request.fetch)
            case TelemetryReport():
                self._admit(request.device)
                work.telemetry.append((request.device, request.telemetry))
                self._saw(request.device, request.header.sequence, work)
            case UpdatePiece():
                work.counts[Count.UPDATE_BYTES] += len(message.payload)
                self._update(request, work)

    def _admit(self, device: DeviceId, epoch: int | None = None) -> None:
        """``epoch``: of the certificate it shows; None: of the one on file. Raises RemoteProtocolError."""
        reject = barred(self.state, device, self._epoch(device) if epoch is None else epoch)
        if reject is not None:
            raise RemoteProtocolError(reject, f"{device} takes part in nothing")

    def _epoch(self, device: DeviceId) -> int:
        known = self._lookup(device)
        if known is None:
            raise LocalProtocolError(f"{device} was let in and is not on file")
        return known.epoch

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
        event = events.CheckInArrived(
            device=request.device,
            sequence=sequence,
            ttl_s=request.checkin.ttl_s,
            samples=request.checkin.samples,
            codecs=request.checkin.codecs,
            epoch=request.certificate.epoch,
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

    def answer(
        self, about: About, verdict: Verdict, reject: Reject | None = None, samples: int = 0
    ) -> Outgoing:
        """The receipt for an update; ``samples``: what is stored of it, 0 if nothing is."""
        self.meter.answered(verdict)
        capped = samples >= self.plan().sample_cap
        receipt = Receipt(verdict=verdict, reject=reject, update_digest=about.digest, capped=capped)
        return self.maker.receipt(about.device, about.round_id, about.manifest_digest, receipt)

    def _update(self, request: UpdatePiece, work: Work) -> None:
        header, device = request.envelope.header, request.device
        round_id, digest = header.round_id, header.payload_digest
        about = About(device, round_id, header.manifest_digest, digest)
        # An update in many pieces is answered once, whatever is wrong with it.
        last_piece = header.chunk_index == header.chunk_count - 1
        settled, stored = self._settled(about)
        if settled is not None and not last_piece:
            return
        try:
            if isinstance(settled, Reject):
                raise RemoteProtocolError(settled, f"update of {device} for round {tuple(round_id)}")
            if settled is not None:
                work.counts[Count.LATE if settled is Verdict.LATE else Count.DUPLICATE] += 1
                event = "update_late" if settled is Verdict.LATE else "update_again"
                work.say(event, round=round_id.number, device=device)
                work.outgoing.append(self.answer(about, settled, samples=stored))
                return
            samples = self._store(request, work)
        except RemoteProtocolError as error:
            work.outgoing.append(self.answer(about, Verdict.REJECTED, error.reject))
            raise
        if samples is not None:
            counted = min(samples, self.plan().sample_cap)
            update = UpdateStored(device=device, round_id=round_id, digest=digest, samples=counted)
            self.decide(events.UpdateArrived(update), work)
            work.say("update_stored", round=round_id.number, device=device, samples=counted)

    def _settled(self, about: About) -> tuple[Verdict | Reject | None, int]:
        """What is known of it without looking inside, and the samples of what is stored; None: nothing."""
        device, round_id, manifest_digest, digest = about
        settled = screen(self.state, device, round_id, manifest_digest, digest)
        if settled is Verdict.STORED:
            return settled, self.state.stored[device].samples
        if settled is Verdict.LATE and (row := self.ledger.find_update(round_id, device)) is not None:
            return (Verdict.STORED, row.samples) if row.digest == digest else (Reject.CONFLICTING, 0)
        if settled in (None, Reject.NOT_SELECTED):
            settled = barred(self.state, device, self._epoch(device)) or settled
        return settled, 0

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
        decode_update(update, self.plan(), self.parameter_count)
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


def _concerns(topic: str, request: Request | None) -> dict[str, object]:
    """For the log: the device that the topic names, and the round of an update that was read so far."""
    found: dict[str, object] = {}
    with contextlib.suppress(RemoteProtocolError):
        found["device"] = topics.sender_of(topic).device
    if isinstance(request, UpdatePiece):
        found["round"] = request.envelope.header.round_id.number
    return found
