"""The aggregator as a process: wires the parts of a folder together and runs the loop between broker and engine."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from types import TracebackType

from aggregator.blob_server import BlobServer
from aggregator.config import AggregatorConfig
from aggregator.engine import Engine
from aggregator.evaluation import Evaluator
from aggregator.files import make_private_folder, write_atomic
from aggregator.inbox.inbox import Inbox
from aggregator.inbox.updates import UpdateInbox
from aggregator.intake import max_update_bytes
from aggregator.ledger import database
from aggregator.ledger.ledger import Ledger, LedgerError
from aggregator.monitoring.gauges import Gauges, read_gauges
from aggregator.monitoring.monitor import Monitor
from aggregator.revocations import RevocationsFile
from aggregator.round_keys import RoundKeys
from aggregator.round_maker import Identity, RoundMaker
from aggregator.versions import VersionStore
from aggregator.work import Incoming, NoMeter, Report
from edge_runtime.backends.artifact_folder import read_artifact_folder
from edge_runtime.folder_lock import FolderLock
from edge_runtime.protocol import topics
from edge_runtime.protocol.artifact import Artifact
from edge_runtime.protocol.crypto.keys import SealingPrivateKey, SigningKey, VerifyKey
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.settings import read_hex_file, read_key_file
from edge_runtime.transport.base import (
    Congested,
    Connected,
    Disconnected,
    NotConnected,
    Received,
    Transport,
    check_chunks_fit,
)
from edge_runtime.transport.mqtt import MqttOptions, MqttTransport

BATCH_MESSAGES = 16  # one commit for so many messages, or for what arrives within BATCH_S
BATCH_S = 0.005
IDLE_WAIT_S = 0.5
LINGER_S = 2.0  # after the last round: late devices still get their receipts
LEDGER_FILE = "ledger.sqlite"
SEED_FILE = "run_seed"


def open_ledger(config: AggregatorConfig, *, read_only: bool = False) -> Ledger:
    """The ledger of an aggregator's folder. Raises LedgerError."""
    url = database.sqlite_url(config.folder / LEDGER_FILE)
    return Ledger.open(url, federation=config.federation_id, read_only=read_only)


def open_versions(config: AggregatorConfig) -> VersionStore:
    """The version files of an aggregator's folder. Raises what ``read_artifact_folder`` raises."""
    artifact = read_artifact_folder(config.artifact)
    return VersionStore(config.folder / "versions", artifact, keep=config.versions.keep)


def mqtt_transport(config: AggregatorConfig, client: str) -> MqttTransport:
    """A transport to the configured broker. Raises TransportError, ConfigError."""
    options = MqttOptions(
        address=config.broker.address(), client_id=f"fleetgrad-{config.federation}-{client}"
    )
    return MqttTransport(options)


@dataclass(kw_only=True)
class Service:
    """Use as a context manager: it holds the folder's lock and the ledger's claim. One per folder."""

    config: AggregatorConfig
    report: Report
    transport: Transport | None = None
    take_over: bool = False
    monitor: Monitor | None = None
    connected: bool = field(default=False, init=False)
    engine: Engine = field(init=False)
    _open: ExitStack = field(default_factory=ExitStack, init=False)

    def __enter__(self) -> Service:
        with self._open as stack:
            config = self.config
            make_private_folder(config.folder)
            stack.enter_context(FolderLock(config.folder))
            artifact = read_artifact_folder(config.artifact)
            self.engine = self._build(artifact, stack)
            self.transport = self.transport or mqtt_transport(config, "aggregator")
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def run(self, *, should_stop: Callable[[], bool], until_finished: bool = False) -> None:
        """Serve until ``should_stop``, until a drain is done, or until all rounds are done and evaluated.

        Raises BrokerUnreachable, PayloadTooLarge, FencedError (another aggregator took over), CertificateError.
        """
        transport, engine = self._transport(), self.engine
        transport.subscribe(topics.all_up(self.config.federation_id))
        transport.open(10.0)
        finished_at: float | None = None
        try:
            engine.start()
            while not should_stop() and not engine.drained:
                if engine.finished and until_finished and not engine.evaluating:
                    finished_at = finished_at or time.monotonic()
                    if time.monotonic() - finished_at > LINGER_S:
                        return
                self._turn(transport, engine)
            self._say_what_is_left(transport, engine)
        finally:
            transport.close()

    # ---- the loop -----------------------------------------------------------------------------------

    def _turn(self, transport: Transport, engine: Engine) -> None:
        """One batch: take, commit, publish, acknowledge - in this order."""
        received = self._gather(transport, engine)
        if received:
            engine.handle([Incoming(event.topic, event.payload) for event in received])
        else:
            engine.tick()
        self._publish(transport, engine)
        for event in received:
            transport.ack(event)
        if self.monitor is not None:
            self.monitor.turned(lambda: self._gauges(transport, engine))

    def _gauges(self, transport: Transport, engine: Engine) -> Gauges:
        return read_gauges(engine, transport.counters, connected=self.connected, now=engine.clock())

    def _gather(self, transport: Transport, engine: Engine) -> list[Received]:
        wake_at = engine.next_wake()
        patience = IDLE_WAIT_S if wake_at is None else min(max(wake_at - engine.clock(), 0.0), IDLE_WAIT_S)
        received: list[Received] = []
        until: float | None = None
        while len(received) < BATCH_MESSAGES:
            event = transport.next_event(patience)
            match event:
                case None:
                    break
                case Received():
                    received.append(event)
                    until = until or time.monotonic() + BATCH_S
                case Connected():
                    self.connected = True
                    check_chunks_fit(self.config.delivery.chunk_bytes, event.max_packet_bytes)
                    self.report("connected", session_present=event.session_present)
                    engine.announce()
                    break
                case Disconnected():
                    self.connected = False
                    self.report("disconnected", reason=event.reason)
            patience = max((until or 0.0) - time.monotonic(), 0.0)
        return received

    def _publish(self, transport: Transport, engine: Engine) -> None:
        while engine.outgoing:
            message = engine.outgoing[0]
            try:
                transport.publish(message.topic, message.payload, retain=message.retain)
            except Congested:
                return  # the connection stands: what waits is sent when the broker takes it again
            except NotConnected:
                # Receipts are asked for again by the device; the manifest is announced at the next connect.
                engine.outgoing.clear()
                return
            engine.outgoing.popleft()

    def _say_what_is_left(self, transport: Transport, engine: Engine) -> None:
        """Receipts of what is committed save devices a resend; those that do not leave are asked for again."""
        until = time.monotonic() + LINGER_S
        while engine.outgoing and time.monotonic() < until:
            transport.flush(0.1)
            self._publish(transport, engine)

    def _transport(self) -> Transport:
        if self.transport is None:
            raise RuntimeError("a Service is used as a context manager")
        return self.transport

    # ---- wiring -------------------------------------------------------------------------------------

    def _build(self, artifact: Artifact, stack: ExitStack) -> Engine:
        config = self.config
        ledger = stack.enter_context(closing(open_ledger(config)))
        ledger.claim(
            # Without the host's name, which a container changes: whoever has this folder's lock may claim again.
            str(config.folder.resolve()),
            take_over=self.take_over,
            generation=config.generation,
        )
        stack.callback(_release, ledger)
        if self.monitor is not None:
            self.monitor.watch(ledger)
            stack.callback(self.monitor.unwatch)
        inbox = stack.enter_context(closing(Inbox(config.folder / "inbox", durable=ledger.durable_ends())))
        plan = config.round_plan()
        keys = RoundKeys(config.folder / "round-keys", CRYPTO, os.urandom)
        blobs = BlobServer(
            config.federation_id,
            config.delivery.chunk_bytes,
            gather_s=config.delivery.gather_s,
            bytes_per_s=config.delivery.bytes_per_s,
        )
        versions = VersionStore(config.folder / "versions", artifact, keep=config.versions.keep)
        evaluator = None
        if config.evaluation.data is not None:
            evaluator = stack.enter_context(
                closing(Evaluator(config.evaluation, artifact, versions.read_parameters))
            )
        return Engine(
            federation=config.federation_id,
            rules=config.round,
            run_seed=self._run_seed(),
            ledger=ledger,
            updates=UpdateInbox(
                federation=config.federation_id,
                provider=CRYPTO,
                inbox=inbox,
                max_bytes=max_update_bytes(plan, artifact.manifest.parameter_count),
            ),
            keys=keys,
            versions=versions,
            maker=RoundMaker(
                identity=self._identity(),
                provider=CRYPTO,
                plan=plan,
                artifact=artifact,
                blobs=blobs,
                keys=keys,
                entropy=os.urandom,
            ),
            blobs=blobs,
            clock=time.time,
            report=self.report,
            keep_updates=config.keep_updates,
            evaluator=evaluator,
            revocations=self._revocations(),
            meter=self.monitor or NoMeter(),
        )

    def _identity(self) -> Identity:
        config = self.config
        return Identity(
            federation=config.federation_id,
            generation=config.generation,
            signing_key=SigningKey(read_key_file(config.signing_key_file)),
            sealing_key=SealingPrivateKey(read_key_file(config.sealing_key_file)),
            certificate=read_hex_file(config.certificate_file),
            root=VerifyKey(config.root_key_bytes),
        )

    def _revocations(self) -> RevocationsFile | None:
        path, root = self.config.revocations_file, VerifyKey(self.config.root_key_bytes)
        return None if path is None else RevocationsFile(path, CRYPTO, root, self.config.federation_id)

    def _run_seed(self) -> bytes:
        config = self.config
        if config.run_seed_file is not None:
            return read_hex_file(config.run_seed_file, 32)
        path = config.folder / SEED_FILE
        if not path.exists():
            write_atomic(path, os.urandom(32).hex().encode())
        return read_hex_file(path, 32)


def _release(ledger: Ledger) -> None:
    """Let any holder have the ledger next; after a take-over or with a failing disk there is nothing to give up."""
    with contextlib.suppress(LedgerError):
        ledger.release()
