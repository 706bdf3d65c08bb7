"""A device's session with real cryptography on one side, on the other a hand-driven aggregator. Time is virtual."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from aggregator.blob_server import BlobServer
from edge_runtime.protocol import certificates, topics
from edge_runtime.protocol.crypto.keys import SealingPrivateKey, SigningKey
from edge_runtime.protocol.crypto.prg import Stream
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.envelope import Envelope, Header, pack, seal_context, unpack
from edge_runtime.protocol.errors import LocalProtocolError
from edge_runtime.protocol.identities import AggregatorCertificate, DeviceCertificate
from edge_runtime.protocol.ids import DeviceId, Digest, FederationId, RoundId, sha256
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.manifest import Cohort, Manifest
from edge_runtime.protocol.messages import CheckIn, Fetch, Receipt, Telemetry, Update
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import FederationState, Verdict
from edge_runtime.session import Session
from edge_runtime.session_values import (
    Capability,
    Connected,
    Disconnected,
    Effect,
    Eligibility,
    Event,
    Identity,
    Journal,
    KeepArtifact,
    Received,
    Remember,
    Send,
    SendUpdate,
    Settle,
    Subscribe,
    Tick,
    Train,
    Trained,
    Unsubscribe,
    UpdateSent,
)
from edge_runtime.store.outbox import Message, OutboxEntry

FEDERATION = FederationId("digits")
DEVICE = DeviceId("pi-3")
OTHER = DeviceId("pi-4")
NO_ROUND = RoundId(0, 0)
CHUNK_BYTES = 8192
TTL_S = 600
MODEL = Stream(bytes([1]) * 32).bytes(3 * CHUNK_BYTES)
ARTIFACT = Stream(bytes([2]) * 32).bytes(CHUNK_BYTES + 5)


def signing_key(tag: int) -> SigningKey:
    return CRYPTO.generate_signing_key(bytes([tag]) * 32)


def sealing_key(tag: int) -> SealingPrivateKey:
    return CRYPTO.generate_sealing_key(bytes([tag]) * 32)


def an_update(delta: bytes = b"delta") -> Update:
    return Update(
        samples=100,
        steps=10,
        loss_first=2.0,
        loss_last=1.0,
        codec="float32",
        delta=delta,
        parameter_count=len(delta) // 4,
    )


@dataclass(frozen=True)
class Published:
    """A signed manifest as the broker retains it."""

    manifest: Manifest
    payload: bytes
    digest: Digest


@dataclass(kw_only=True)
class Aggregator:
    """Signs whatever it is told to. ``root``, ``signing``: another key plays a forger."""

    federation: FederationId = FEDERATION
    generation: int = 1
    root: SigningKey = field(default_factory=lambda: signing_key(10))
    signing: SigningKey = field(default_factory=lambda: signing_key(11))
    sealing: SealingPrivateKey = field(default_factory=lambda: sealing_key(12))
    round_key: SealingPrivateKey = field(default_factory=lambda: sealing_key(13))
    chunk_bytes: int = CHUNK_BYTES
    first_round: int = 0
    last_round: int = 1000
    blobs: BlobServer = field(init=False)

    def __post_init__(self) -> None:
        self.blobs = BlobServer(self.federation, self.chunk_bytes, gather_s=0.0, bytes_per_s=1e12)

    def sign(self, message: bytes) -> bytes:
        return CRYPTO.sign(self.signing, message)

    def certificate(self, **changes: object) -> bytes:
        certificate = AggregatorCertificate(
            federation=self.federation,
            signing_key=CRYPTO.verify_key(self.signing).raw,
            sealing_key=CRYPTO.sealing_public_key(self.sealing).raw,
            generation=self.generation,
            first_round=self.first_round,
            last_round=self.last_round,
        )
        return certificates.issue_aggregator(CRYPTO, self.root, replace(certificate, **changes))  # type: ignore[arg-type]

    def manifest(
        self,
        number: int,
        state: FederationState = FederationState.COLLECTING,
        *,
        cohort: Sequence[DeviceId] = (DEVICE,),
        model: bytes = MODEL,
        artifact: bytes = ARTIFACT,
        certificate: bytes | None = None,
        **changes: object,
    ) -> Published:
        """A round's manifest; its blobs are on offer."""
        collecting = state is FederationState.COLLECTING
        manifest = Manifest(
            federation=self.federation,
            round_id=RoundId(self.generation, number),
            state=state,
            base_version=max(number - 1, 0),
            deadline_unix_ms=0,
            plan=Plan(codecs=("float32",)),
            model=self.blobs.offer(model),
            artifact=self.blobs.offer(artifact),
            cohort=self.blobs.offer(Cohort(devices=tuple(sorted(cohort))).encode()) if collecting else None,
            sealing_key=CRYPTO.sealing_public_key(self.round_key).raw if collecting else b"",
            chunk_bytes=self.chunk_bytes,
            certificate=self.certificate() if certificate is None else certificate,
            parameter_count=len(model) // 4,
        )
        return self.publish(replace(manifest, **changes))  # type: ignore[arg-type]

    def publish(self, manifest: Manifest) -> Published:
        body = manifest.encode()
        header = Header(
            kind=Kind.MANIFEST,
            federation=manifest.federation,
            round_id=manifest.round_id,
            payload_digest=sha256(body),
        )
        (payload,) = pack(header, body, self.sign)
        return Published(manifest, payload, sha256(body))

    def receipt(
        self,
        entry: OutboxEntry,
        verdict: Verdict = Verdict.STORED,
        reject: Reject | None = None,
        *,
        device: DeviceId = DEVICE,
    ) -> bytes:
        """A receipt for this update; ``dataclasses.replace`` the entry to speak of another."""
        receipt = Receipt(verdict=verdict, reject=reject, update_digest=entry.update_digest)
        body = receipt.encode()
        header = Header(
            kind=Kind.RECEIPT,
            federation=self.federation,
            round_id=entry.round_id,
            manifest_digest=entry.manifest_digest,
            device=device,
            payload_digest=sha256(body),
        )
        (payload,) = pack(header, body, self.sign)
        return payload

    def open(self, envelope: Envelope, payload: bytes | None = None) -> bytes:
        """What a device sealed for this aggregator, or for its round."""
        key = self.round_key if envelope.header.kind is Kind.UPDATE else self.sealing
        sealed = envelope.body if payload is None else payload
        return CRYPTO.open(key, seal_context(envelope.header), b"", sealed)


def device_identity(aggregator: Aggregator, device: DeviceId = DEVICE) -> Identity:
    key = signing_key(20)
    certificate = DeviceCertificate(
        federation=aggregator.federation, device=device, signing_key=CRYPTO.verify_key(key).raw
    )
    return Identity(
        federation=aggregator.federation,
        device=device,
        signing_key=key,
        certificate=certificates.issue_device(CRYPTO, aggregator.root, certificate),
        root=CRYPTO.verify_key(aggregator.root),
    )


@dataclass
class Device:
    """The shell around one session: it keeps what must be durable, and checks the order of effects."""

    aggregator: Aggregator
    name: DeviceId = DEVICE
    now: float = 1000.0
    upload_s: float = 0.0  # how long an update takes to leave
    effects: list[Effect] = field(default_factory=list)
    subscribed: set[str] = field(default_factory=set)
    journal: dict[RoundId, OutboxEntry] = field(default_factory=dict)  # all that were ever written
    outbox: dict[RoundId, OutboxEntry] = field(default_factory=dict)
    settled: RoundId = NO_ROUND
    highest: RoundId = NO_ROUND
    cache: dict[Digest, bytes] = field(default_factory=dict)
    policy: Eligibility = field(default_factory=lambda: Eligibility(True))
    session: Session = field(init=False)

    def __post_init__(self) -> None:
        self._identity = device_identity(self.aggregator, self.name)
        self._entropy = Stream(sha256(self.name.encode()))
        self._sequence = itertools.count(1)
        self.restart()

    def restart(self) -> None:
        """The process dies and begins again with what was durable."""
        self.subscribed, self.policy = set(), Eligibility(True)
        self.session = Session(
            identity=self._identity,
            provider=CRYPTO,
            capability=self._capability,
            next_sequence=self._sequence.__next__,
            entropy=self._entropy.bytes,
            highest_round=self.highest,
            settled=self.settled,
            pending=self.outbox[max(self.outbox)] if self.outbox else None,
            artifacts=set(self.cache),
        )

    def _capability(self) -> Capability:
        return Capability(
            samples=100, free_memory_bytes=1 << 30, codecs=("float32",), runtime="test 1.0", ttl_s=TTL_S
        )

    # ---- events -------------------------------------------------------------------------------------

    def handle(self, event: Event) -> list[Effect]:
        if isinstance(event, Eligibility):
            self.policy = event
        effects = self.session.handle(self.now, event)
        for at, effect in enumerate(effects):
            self._perform(at, effect)
        self.effects += effects
        for effect in effects:
            if isinstance(effect, SendUpdate):
                self.now += self.upload_s
                return effects + self.handle(UpdateSent(effect.round_id, self.upload_s))
        return effects

    def connect(self, *, session_present: bool = False) -> list[Effect]:
        return self.handle(Connected(session_present))

    def disconnect(self) -> list[Effect]:
        return self.handle(Disconnected())

    def hear(self, payload: bytes, topic: str | None = None) -> list[Effect]:
        """A message on the device's own topic, unless another is named."""
        return self.handle(Received(topic or topics.down(self.aggregator.federation, self.name), payload))

    def hear_manifest(self, published: Published | bytes) -> list[Effect]:
        payload = published if isinstance(published, bytes) else published.payload
        return self.handle(Received(topics.manifest(self._identity.federation), payload))

    def trained(
        self,
        update: Update | None = None,
        round_id: RoundId | None = None,
        telemetry: Telemetry | None = None,
    ) -> list[Effect]:
        assert self.session.manifest is not None
        return self.handle(
            Trained(round_id or self.session.manifest.round_id, update or an_update(), telemetry)
        )

    def wait(self, seconds: float) -> list[Effect]:
        """Time passes; the session is woken when it asked for it. Returns all effects of that time."""
        until, effects = self.now + seconds, []
        while (at := self.session.wake_at()) is not None and at <= until:
            self.now = max(self.now, at)
            effects += self.handle(Tick())
        self.now = max(self.now, until)
        return effects

    def fetch_all(self, lose: Callable[[str, bytes], bool] = lambda topic, payload: False) -> list[Effect]:
        """Carry fetches and pieces to and fro until nothing moves; ``lose`` picks the pieces that get lost.

        Only what was sent since the last call and what the server still owes; time stands still.
        """
        out: list[Effect] = []
        asked = self._unanswered()
        while True:
            for fetch in asked:
                self.aggregator.blobs.request(self.now, self.name, fetch)
            pieces = self.aggregator.blobs.due(self.now)
            if not pieces:
                return out
            effects = []
            for topic, payload in pieces:
                if not lose(topic, payload) and self._listens(topic):
                    effects += self.hear(payload, topic)
            out += effects
            asked = self._unanswered()

    def _unanswered(self) -> list[Fetch]:
        """Fetches sent since the last time this was asked."""
        fresh = self.fetches(self.effects[self._asked :])
        self._asked = len(self.effects)
        return fresh

    _asked: int = 0

    def _listens(self, topic: str) -> bool:
        own = topics.down(self._identity.federation, self.name)
        return topic == own or f"{topic.rsplit('/', 1)[0]}/+" in self.subscribed

    # ---- what it did --------------------------------------------------------------------------------

    def sent(self, kind: Kind, effects: list[Effect] | None = None) -> list[Envelope]:
        """The messages of one kind among these effects, or among all so far; signatures verified."""
        key, found = CRYPTO.verify_key(self._identity.signing_key), []
        for topic, payload in messages(self.effects if effects is None else effects):
            envelope = unpack(payload, self._identity.federation, *Kind)
            CRYPTO.verify(key, envelope.signed_bytes(), envelope.signature)
            assert topic == topics.up_topic(envelope.header.kind, self._identity.federation, self.name)
            if envelope.header.kind is kind:
                found.append(envelope)
        return found

    def fetches(self, effects: list[Effect] | None = None) -> list[Fetch]:
        return [Fetch.decode(envelope.body) for envelope in self.sent(Kind.FETCH, effects)]

    def checkins(self, effects: list[Effect] | None = None) -> list[CheckIn]:
        return [
            CheckIn.decode(self.aggregator.open(envelope)) for envelope in self.sent(Kind.CHECKIN, effects)
        ]

    def updates(self, effects: list[Effect] | None = None) -> list[bytes]:
        """The payloads of update messages, as sent."""
        chosen = self.effects if effects is None else effects
        return [
            message.payload
            for effect in chosen
            if isinstance(effect, SendUpdate)
            for message in effect.messages
        ]

    # ---- what a shell must be able to rely on -------------------------------------------------------

    def _perform(self, at: int, effect: Effect) -> None:
        match effect:
            case Subscribe():
                self.subscribed.add(effect.pattern)
            case Unsubscribe():
                self.subscribed.discard(effect.pattern)
            case Remember():
                assert at == 0, "the round is remembered before anything else"
                assert effect.round_id > self.highest
                self.highest = effect.round_id
            case Journal():
                entry = effect.entry
                assert entry.round_id not in self.journal, "two updates for one round"
                if entry.round_id <= self.settled:
                    raise LocalProtocolError("an update for a round that is over")
                self.journal[entry.round_id] = self.outbox[entry.round_id] = entry
            case Settle():
                self.outbox.pop(effect.round_id, None)
                self.settled = max(self.settled, effect.round_id)
            case KeepArtifact():
                self.cache[effect.digest] = effect.content
            case Train():
                assert self.policy.may_train, "nothing is trained while not eligible"
                assert effect.artifact in self.cache, "the artifact is cached before it is used"
                assert effect.manifest.round_id > self.settled
            case Send():
                assert self.session.online, "nothing is sent while offline"
                assert self.policy.may_train, "no check-in and no fetch while not eligible"
            case SendUpdate():
                assert self.session.online, "nothing is sent while offline"
                assert self.policy.may_send, "the update waits"
                journalled = self.journal[effect.round_id].messages
                assert sorted(effect.messages) == sorted(journalled), "not what was journalled"


def messages(effects: Sequence[Effect]) -> list[Message]:
    """All that these effects send, in order."""
    found: list[Message] = []
    for effect in effects:
        match effect:
            case Send():
                found.append(Message(effect.topic, effect.payload))
            case SendUpdate():
                found += effect.messages
    return found


def ready(aggregator: Aggregator | None = None) -> Device:
    """A connected device of a federation that has no round yet; its first check-in is out."""
    device = Device(aggregator or Aggregator())
    device.connect()
    device.hear_manifest(device.aggregator.manifest(0, FederationState.WAITING))
    return device


def training(number: int = 1, device: Device | None = None) -> Device:
    """A device that trains in this round."""
    device = device or ready()
    device.hear_manifest(device.aggregator.manifest(number))
    device.fetch_all()
    return device


def waiting_for_receipt(number: int = 1, device: Device | None = None) -> Device:
    """A device whose update for this round is journalled and sent once."""
    device = training(number, device)
    device.trained()
    return device
