"""The device in a federation as (state, event) -> effects. Pure: time, randomness and storage are arguments.

``handle(now, event)`` returns effects that the shell runs in order. ``Remember`` and ``Journal`` must be durable
before the effects behind them run: a device killed anywhere sends identical bytes or none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_runtime import session_values as sv
from edge_runtime.blob_fetch import BlobFetch
from edge_runtime.outgoing import Outgoing
from edge_runtime.protocol import certificates, topics
from edge_runtime.protocol.crypto.keys import VerifyKey
from edge_runtime.protocol.crypto.provider import CryptoProvider
from edge_runtime.protocol.envelope import unpack
from edge_runtime.protocol.errors import LocalProtocolError, RemoteProtocolError
from edge_runtime.protocol.identities import AggregatorCertificate
from edge_runtime.protocol.ids import Digest, RoundId, sha256
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.manifest import BlobRef, Cohort, Manifest
from edge_runtime.protocol.messages import CheckIn, Chunk, Receipt
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import FederationState
from edge_runtime.store.outbox import OutboxEntry
from edge_runtime.transport.base import full_jitter_s

RESEND_BASE_S = 2.0
RESEND_CAP_S = 60.0
RETURN_WITHIN_S = 30.0  # after a time without eligibility, which may end for a whole fleet at the same moment


@dataclass(kw_only=True)
class Session:
    """``next_sequence``: numbers never given before, also across restarts. ``entropy``: n random bytes.

    ``pending`` and ``settled`` come from the journal after a restart; ``artifacts``: digests in the cache.
    """

    identity: sv.Identity
    provider: CryptoProvider
    capability: Callable[[], sv.Capability]
    next_sequence: Callable[[], int]
    entropy: Callable[[int], bytes]
    highest_round: RoundId = field(default_factory=lambda: RoundId(0, 0))
    settled: RoundId = field(default_factory=lambda: RoundId(0, 0))
    pending: OutboxEntry | None = None
    artifacts: set[Digest] = field(default_factory=set)

    online: bool = field(default=False, init=False)
    work: sv.Work = field(default=sv.Work.IDLE, init=False)
    manifest: Manifest | None = field(default=None, init=False)
    manifest_digest: Digest | None = field(default=None, init=False)
    resends: int = field(default=0, init=False)
    may_send: bool = field(default=True, init=False)
    _certificate: AggregatorCertificate | None = field(default=None, init=False)
    _fetches: dict[Digest, BlobFetch] = field(default_factory=dict, init=False)
    _blobs: dict[Digest, bytes] = field(default_factory=dict, init=False)
    _send_at: float = field(default=0.0, init=False)  # infinite while a sending runs
    _sent: int = field(default=0, init=False)
    _checkin_at: float = field(default=0.0, init=False)
    _absent_until: float = field(default=0.0, init=False)  # 0: eligible; infinite: not
    _artifact_lost_in: Digest | None = field(
        default=None, init=False
    )  # manifest in which one was fetched anew

    def __post_init__(self) -> None:
        self._outgoing = Outgoing(
            identity=self.identity,
            provider=self.provider,
            next_sequence=self.next_sequence,
            entropy=self.entropy,
        )

    # ---- the one entrance ---------------------------------------------------------------------------

    def handle(self, now: float, event: sv.Event) -> list[sv.Effect]:
        """Effects in order. Raises LocalProtocolError for an event that our own shell must not send now."""
        effects: list[sv.Effect] = []
        match event:
            case sv.Connected():
                self.online = True
                # What the broker may have lost with the connection is said again, soon but not all at once.
                self._send_at = now + (0.0 if self._sent == 0 else RESEND_BASE_S * self._random())
                for fetch in self._fetches.values():
                    fetch.next_ask_at = now
                if not event.session_present:
                    self._checkin_at = now
            case sv.Disconnected():
                self.online = False
            case sv.Received():
                try:
                    self._receive(now, event, effects)
                except RemoteProtocolError as error:
                    effects.append(sv.Refused(error.reject, error.detail))
            case sv.Trained():
                try:
                    self._trained(now, event, effects)
                except RemoteProtocolError as error:  # the manifest's key cannot be sealed to
                    effects.append(sv.Refused(error.reject, error.detail))
                    self._sit_out(now, event.round_id, effects)
            case sv.TrainingFailed():
                self._sit_out(now, event.round_id, effects)
            case sv.UpdateSent():
                if self.pending is not None and self.pending.round_id == event.round_id:
                    self._send_at = now + self._resend_pause_s(event.upload_s)
            case sv.ArtifactLost():
                self._fetch_artifact_again(now, event.train, effects)
            case sv.Eligibility():
                self._heed(now, event, effects)
            case sv.TrainingPaused():
                if self.manifest == event.train.manifest:
                    self._blobs[event.train.manifest.model.digest] = event.train.model
            case sv.Tick():
                pass
        self._due(now, effects)
        return effects

    def wake_at(self) -> float | None:
        """When a Tick is wanted at the latest; None while offline."""
        if not self.online:
            return None
        times = [fetch.next_ask_at for fetch in self._fetches.values()]
        if 0 < self._absent_until < math.inf:
            times.append(self._absent_until)
        if self.pending and self.may_send:
            times.append(self._send_at)
        if not self.pending and self._may_check_in():
            times.append(self._checkin_at)
        return min(times, default=None)

    # ---- what is due --------------------------------------------------------------------------------

    def _due(self, now: float, effects: list[sv.Effect]) -> None:
        if not self.online:
            return
        if 0 < self._absent_until <= now:
            self._absent_until, self._checkin_at = 0.0, now  # the last ticket may have been used up
            self._begin(now, effects)
        if self.pending and self.may_send and now >= self._send_at:
            self._sent += 1
            self.resends += self._sent > 1
            self._send_at = math.inf
            # From another piece each time: a link that never lives for a whole sending still brings every piece.
            messages = self.pending.messages
            first = int(self._random() * len(messages))
            effects.append(sv.SendUpdate(self.pending.round_id, messages[first:] + messages[:first]))
        if not self.pending and self._may_check_in() and now >= self._checkin_at:
            try:
                self._check_in(now, effects)
            except RemoteProtocolError as error:  # the aggregator's key cannot be sealed to
                effects.append(sv.Refused(error.reject, error.detail))
        for fetch in self._fetches.values():
            if now >= fetch.next_ask_at:
                generation = self.highest_round.generation
                ask = fetch.ask(now, self._random)
                effects.append(self._outgoing.plain(Kind.FETCH, generation, ask.encode()))

    def _may_check_in(self) -> bool:
        manifest = self.manifest
        if manifest is None or manifest.state is FederationState.FINISHED or self._absent_until:
            return False
        # Before it knows the cohort, too: the aggregator serves no blob to a device that has never checked in.
        unsure = manifest.cohort is not None and manifest.cohort.digest in self._fetches
        return self.work is sv.Work.IDLE or unsure

    def _check_in(self, now: float, effects: list[sv.Effect]) -> None:
        capability = self.capability()
        body = CheckIn(certificate=self.identity.certificate, **capability.__dict__)
        self._checkin_at = now + capability.ttl_s * (0.4 + 0.2 * self._random())
        effects.append(self._sealed_to_aggregator(Kind.CHECKIN, body.encode()))

    def _resend_pause_s(self, upload_s: float) -> float:
        """Full jitter under the bound of this attempt or, on a slow link, under the time the upload took."""
        draw = self._random()
        backoff_s = full_jitter_s(self._sent, lambda: draw, base_s=RESEND_BASE_S, cap_s=RESEND_CAP_S)
        return RESEND_BASE_S / 2 + max(backoff_s, draw * upload_s)

    # ---- eligibility --------------------------------------------------------------------------------

    def _heed(self, now: float, event: sv.Eligibility, effects: list[sv.Effect]) -> None:
        """Not eligible, nothing is said: the ticket runs out, or costs one round at most, which uses it up."""
        self.may_send = event.may_send
        if event.may_train:
            if self._absent_until == math.inf:
                self._absent_until = now + RETURN_WITHIN_S * self._random()
            return
        self._absent_until = math.inf
        if self.work is sv.Work.TRAINING:
            effects.append(sv.PauseTraining())
        self._lay_down(effects)

    # ---- what arrives -------------------------------------------------------------------------------

    def _receive(self, now: float, event: sv.Received, effects: list[sv.Effect]) -> None:
        if event.topic == topics.manifest(self.identity.federation):
            self._take_manifest(now, event.payload, effects)
            return
        envelope = unpack(event.payload, self.identity.federation, Kind.RECEIPT, Kind.CHUNK)
        if envelope.header.kind is Kind.RECEIPT:
            self._take_receipt(now, event.payload, effects)
        else:
            chunk = Chunk.decode(envelope.body)
            fetch = self._fetches.get(chunk.digest)
            if fetch is None or not fetch.take(chunk, now, self._random):
                return
            if (content := fetch.content()) is not None:
                del self._fetches[fetch.digest]
                effects.append(sv.Unsubscribe(topics.all_pieces(self.identity.federation, fetch.digest)))
                self._blobs[fetch.digest] = content
                self._advance(now, effects)

    def _take_manifest(self, now: float, payload: bytes, effects: list[sv.Effect]) -> None:
        identity = self.identity
        envelope = unpack(payload, identity.federation, Kind.MANIFEST)
        manifest = Manifest.decode(envelope.body)
        certificate = certificates.check_aggregator(
            self.provider, identity.root, manifest.certificate, identity.federation, manifest.round_id
        )
        self.provider.verify(VerifyKey(certificate.signing_key), envelope.signed_bytes(), envelope.signature)
        if (manifest.federation, manifest.round_id) != (identity.federation, envelope.header.round_id):
            raise RemoteProtocolError(Reject.WRONG_ROUND, "manifest and its header speak of different rounds")
        digest = sha256(envelope.body)
        if digest == self.manifest_digest:
            # Said again because broker or aggregator started anew: the last check-in may have been lost with it.
            self._checkin_at = min(self._checkin_at, now)
            return
        if manifest.round_id < self.highest_round:
            raise RemoteProtocolError(
                Reject.WRONG_ROUND, f"round {manifest.round_id} is before {self.highest_round}, seen already"
            )
        if manifest.round_id.number > self.highest_round.number + 1:
            self._checkin_at = now  # a round was missed, and it may have used up the last ticket
        if manifest.round_id > self.highest_round:
            self.highest_round = manifest.round_id
            effects.append(sv.Remember(manifest.round_id))
        if self.work is not sv.Work.IDLE:
            self._checkin_at = now  # the last ticket may have been used up by the round that is over
        self._drop_work("the round is over", effects)
        finished = manifest.state is FederationState.FINISHED
        if (pending := self.pending) and (
            finished or pending.round_id.generation < manifest.round_id.generation
        ):
            # There will be no other version; or the aggregator was restored from a backup. Nobody need answer.
            effects.append(sv.Settle(pending.round_id, None))
            self.pending, self.settled = None, pending.round_id
        self.manifest, self.manifest_digest, self._certificate = manifest, digest, certificate
        match manifest.state:
            case FederationState.FINISHED:
                effects.append(sv.FederationFinished(manifest))
            case FederationState.WAITING:
                self._checkin_at = min(self._checkin_at, now)
            case FederationState.COLLECTING:
                self._begin(now, effects)

    def _begin(self, now: float, effects: list[sv.Effect]) -> None:
        """Take up the open round, unless it is settled here or an update still waits for its receipt."""
        manifest = self.manifest
        if manifest is None or manifest.state is not FederationState.COLLECTING or self._absent_until:
            return
        if self.work is sv.Work.IDLE and self.pending is None and manifest.round_id > self.settled:
            self.work = sv.Work.FETCHING
            self._want(manifest.cohort, now, effects)
            self._advance(now, effects)

    def _advance(self, now: float, effects: list[sv.Effect]) -> None:
        """Go on once blobs have arrived: cohort first, then artifact and model, then train."""
        manifest, digest = self.manifest, self.manifest_digest
        if self.work is not sv.Work.FETCHING or manifest is None or digest is None or manifest.cohort is None:
            return
        raw = self._blobs.get(manifest.cohort.digest)
        if raw is None:
            return
        try:
            selected = self.identity.device in Cohort.decode(raw).devices
        except RemoteProtocolError:
            self._drop_work("its cohort is malformed", effects)
            raise
        if not selected:
            self._drop_work("not selected", effects)
            return
        wanted = [manifest.model]
        if manifest.artifact.digest not in self.artifacts:
            wanted.append(manifest.artifact)
        for ref in wanted:
            self._want(ref, now, effects)
        if any(ref.digest not in self._blobs for ref in wanted):
            return
        if manifest.artifact.digest not in self.artifacts:
            effects.append(sv.KeepArtifact(manifest.artifact.digest, self._blobs[manifest.artifact.digest]))
            self.artifacts.add(manifest.artifact.digest)
        model = self._blobs[manifest.model.digest]
        self._blobs = {
            manifest.cohort.digest: raw
        }  # if the artifact turns out to be lost, we are still in it
        self.work = sv.Work.TRAINING
        effects.append(sv.Train(manifest, digest, manifest.artifact.digest, model))

    def _fetch_artifact_again(self, now: float, train: sv.Train, effects: list[sv.Effect]) -> None:
        self.artifacts.discard(train.artifact)
        if self.work is not sv.Work.TRAINING or self.manifest != train.manifest:
            return
        if self._artifact_lost_in == self.manifest_digest:  # a disk that loses what was just written
            self._sit_out(now, train.manifest.round_id, effects)
            return
        self._artifact_lost_in = self.manifest_digest
        self.work = sv.Work.FETCHING
        self._blobs[train.manifest.model.digest] = train.model
        self._advance(now, effects)

    def _want(self, ref: BlobRef | None, now: float, effects: list[sv.Effect]) -> None:
        if ref is None or ref.digest in self._blobs or ref.digest in self._fetches:
            return
        self._fetches[ref.digest] = BlobFetch(ref, next_ask_at=now)
        effects.append(sv.Subscribe(topics.all_pieces(self.identity.federation, ref.digest)))

    def _drop_work(self, reason: str, effects: list[sv.Effect]) -> None:
        if self.work is sv.Work.TRAINING:
            effects.append(sv.StopTraining(reason))
        self._lay_down(effects)
        self._blobs.clear()

    def _lay_down(self, effects: list[sv.Effect]) -> None:
        effects += [
            sv.Unsubscribe(topics.all_pieces(self.identity.federation, digest)) for digest in self._fetches
        ]
        self._fetches.clear()
        self.work = sv.Work.IDLE

    # ---- updates and receipts -----------------------------------------------------------------------

    def _trained(self, now: float, event: sv.Trained, effects: list[sv.Effect]) -> None:
        manifest = self.manifest
        if self.work is not sv.Work.TRAINING or manifest is None or manifest.round_id != event.round_id:
            return  # the round was over before the training stopped
        if self.pending is not None or self.manifest_digest is None:
            raise LocalProtocolError(f"a second update for {event.round_id} while one is pending")
        self.pending = self._outgoing.update(manifest, self.manifest_digest, event.update)
        self.work = sv.Work.IDLE
        self._sent, self._send_at = 0, now
        effects.append(sv.Journal(self.pending))
        if event.telemetry is not None and self.online:
            effects.append(self._sealed_to_aggregator(Kind.TELEMETRY, event.telemetry.encode()))

    def _sit_out(self, now: float, round_id: RoundId, effects: list[sv.Effect]) -> None:
        if self.work is sv.Work.TRAINING and self._current_round() == round_id:
            self.work = sv.Work.IDLE
            self.settled = round_id
            self._checkin_at = now
            effects.append(sv.Settle(round_id, None))

    def _take_receipt(self, now: float, payload: bytes, effects: list[sv.Effect]) -> None:
        envelope = unpack(payload, self.identity.federation, Kind.RECEIPT)
        if self._certificate is None or self.pending is None:
            return  # the update will be sent again, and answered again
        if envelope.header.device != self.identity.device:
            raise RemoteProtocolError(Reject.WRONG_TOPIC, "a receipt for another device")
        key = VerifyKey(self._certificate.signing_key)
        self.provider.verify(key, envelope.signed_bytes(), envelope.signature)
        receipt = Receipt.decode(envelope.body)
        pending = self.pending
        if (envelope.header.round_id, envelope.header.manifest_digest, receipt.update_digest) != (
            pending.round_id,
            pending.manifest_digest,
            pending.update_digest,
        ):
            return  # about an earlier update
        self.pending = None
        self.settled = pending.round_id
        self._checkin_at = now
        effects.append(sv.Settle(pending.round_id, receipt.verdict, receipt.reject))
        self._begin(now, effects)  # the next round may have opened, with us in it, while the receipt was lost

    # ---- small helpers ------------------------------------------------------------------------------

    def _random(self) -> float:
        """Uniform in [0, 1)."""
        return int.from_bytes(self.entropy(4), "little") / 2**32

    def _current_round(self) -> RoundId | None:
        return self.manifest.round_id if self.manifest else None

    def _sealed_to_aggregator(self, kind: Kind, plain: bytes) -> sv.Send:
        if self._certificate is None:
            raise LocalProtocolError("nothing can be sealed before a manifest has named the aggregator's key")
        return self._outgoing.sealed(
            kind, self.highest_round.generation, plain, self._certificate.sealing_key
        )


def standing_subscriptions(identity: sv.Identity) -> tuple[str, ...]:
    """What the shell subscribes to once, before it connects; a transport asks again at every connect."""
    return (topics.manifest(identity.federation), topics.down(identity.federation, identity.device))
