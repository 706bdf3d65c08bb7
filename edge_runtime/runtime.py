"""The shell around the session: one loop that takes events, runs effects and trains a step at a time.

One thread does it all, so nothing here needs a lock; the transport has its own and keeps the connection alive
while a long step runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edge_runtime import session_values as sv
from edge_runtime.backends.base import Backend, BackendError
from edge_runtime.config import DeviceConfig
from edge_runtime.data import DataError
from edge_runtime.device import readings
from edge_runtime.device.snapshot import Sensors, Snapshot
from edge_runtime.device.watch import PolicyWatch
from edge_runtime.protocol import codecs, topics
from edge_runtime.protocol.crypto.prg import derive_seed
from edge_runtime.protocol.crypto.provider import CryptoProvider
from edge_runtime.protocol.errors import Fault, FleetgradError, RemoteProtocolError
from edge_runtime.protocol.ids import Digest, RoundId
from edge_runtime.protocol.messages import Telemetry
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import FederationState
from edge_runtime.protocol.tensors import TensorError, vector_from_bytes
from edge_runtime.session import Session, standing_subscriptions
from edge_runtime.store import DeviceStore
from edge_runtime.training.trainer import TrainingDiverged, TrainingResult, batch_seed
from edge_runtime.training_run import LoadedModel, TrainingRun, load_model
from edge_runtime.transport import base as transport_base
from edge_runtime.transport.base import NotConnected, Transport

ONLINE = b"online"
OFFLINE = b"offline"
FLUSH_POLL_S = 0.5
MAX_UPLOAD_S = 600.0
IDLE_WAIT_S = 1.0  # how often the loop looks whether it should stop
STEPS_BETWEEN_POLLS_S = 0.02  # while training, messages wait no longer than this or one step

_log = logging.getLogger(__name__)

Report = Callable[..., None]
"""``report(event, **fields)``: what the device is doing, for the terminal and the log."""


class NotEnrolled(
    FleetgradError,
    fault=Fault.ENGINEER,
    remedy="enrol once with `edge-runtime enroll` and a token of the operator",
):
    """The state folder has no certificate."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"{folder} is not enrolled: get a token from the operator (`aggregator enroll-token`) and run "
            "`edge-runtime enroll --config device.toml --device NAME --token-file FILE`"
        )


@dataclass(kw_only=True)
class Runtime:
    """A device that takes part. ``clock``: seconds that never go back; ``entropy``: n random bytes.

    ``sensors``: a fresh snapshot of the machine for the policy; None: of this one.
    """

    config: DeviceConfig
    store: DeviceStore
    transport: Transport
    backend: Backend
    runtime_name: str
    provider: CryptoProvider
    clock: Callable[[], float]
    entropy: Callable[[int], bytes]
    seed: bytes
    report: Report
    sensors: Callable[[], Snapshot] | None = None
    _session: Session = field(init=False)
    _watch: PolicyWatch = field(init=False)
    _run: TrainingRun | None = field(default=None, init=False)
    _model: LoadedModel | None = field(default=None, init=False)
    _samples: int = field(default=0, init=False)
    _max_packet_bytes: int | None = field(default=None, init=False)
    _should_stop: Callable[[], bool] = field(default=lambda: False, init=False)

    def __post_init__(self) -> None:
        enrolment = self.store.enrolment
        if enrolment is None:
            raise NotEnrolled(self.store.folder)
        entropy, provider = self.entropy, self.provider
        self.identity = sv.Identity(
            federation=enrolment.federation,
            device=enrolment.device,
            signing_key=self.store.signing_key(lambda: provider.generate_signing_key(entropy(32))),
            certificate=enrolment.certificate,
            root=enrolment.root_key,
        )
        entries = self.store.outbox.entries()
        for stale in entries[:-1]:  # only the newest round can still be answered usefully
            self.store.outbox.remove(stale.round_id)
        self._session = Session(
            identity=self.identity,
            provider=self.provider,
            capability=self._capability,
            next_sequence=self.store.next_sequence,
            entropy=self.entropy,
            highest_round=self.store.highest_round or RoundId(0, 0),
            settled=self.store.outbox.settled or RoundId(0, 0),
            pending=entries[-1] if entries else None,
            artifacts=set(self.store.blobs.digests()),
        )

        policy = self.config.policy
        read = self.sensors or Sensors(self.store.folder, policy.metered).read
        self._watch = PolicyWatch(policy, read)

    def run(
        self, *, should_stop: Callable[[], bool], until_finished: bool = False, open_timeout_s: float = 30.0
    ) -> None:
        """Until ``should_stop``, or until the federation is finished.

        should_stop: asked before each training step and each piece of an upload too; once True, for ever.
        Raises BrokerUnreachable, PayloadTooLarge, and DataError where the data never fitted: each says what to do.
        A backend that fails, or data that fitted once, cost the round alone: the next may find them mended.
        """
        self._should_stop = should_stop
        for pattern in standing_subscriptions(self.identity):
            self.transport.subscribe(pattern)
        self._heed_policy()
        self.transport.open(open_timeout_s)
        try:
            while not should_stop():
                if until_finished and self._finished():
                    return
                self._heed_policy()
                self._train_a_while()
                event = self.transport.next_event(self._patience())
                self._handle(self._translate(event))
                self._check_packet_limit()
                if isinstance(event, transport_base.Received):
                    self.transport.ack(event)
            self._pause_training("the runtime stops")
        finally:
            self._run = None
            self._say_presence(OFFLINE)
            self.transport.close()

    # ---- events -------------------------------------------------------------------------------------

    def _translate(self, event: transport_base.Event | None) -> sv.Event:
        match event:
            case None:
                return sv.Tick()
            case transport_base.Connected():
                self._max_packet_bytes = event.max_packet_bytes
                self.report("connected")
                self._say_presence(ONLINE)
                return sv.Connected(event.session_present)
            case transport_base.Disconnected():
                self.report("disconnected", reason=event.reason)
                return sv.Disconnected()
            case transport_base.Received():
                return sv.Received(event.topic, event.payload)

    def _handle(self, event: sv.Event) -> None:
        for effect in self._session.handle(self.clock(), event):
            self._perform(effect)
        if self._session.manifest_digest is not None:
            self.store.checkpoints.keep_only(self._session.manifest_digest)

    def _heed_policy(self) -> None:
        found = self._watch.look(self.clock())
        if found is None:
            return
        if found:
            why = "; ".join(violation.sentence for violation in found)
            self.report("ineligible", reasons=", ".join(violation.name for violation in found), detail=why)
        else:
            self.report("eligible")
        may_send = not any(violation.keeps_back for violation in found)
        self._handle(sv.Eligibility(may_train=not found, may_send=may_send))

    def _check_packet_limit(self) -> None:
        manifest = self._session.manifest
        if manifest is not None and manifest.state is not FederationState.FINISHED:
            transport_base.check_chunks_fit(manifest.chunk_bytes, self._max_packet_bytes)

    def _patience(self) -> float:
        if self._run is not None:
            return 0.0
        wake_at = self._session.wake_at()
        return IDLE_WAIT_S if wake_at is None else min(max(wake_at - self.clock(), 0.0), IDLE_WAIT_S)

    def _finished(self) -> bool:
        manifest = self._session.manifest
        return manifest is not None and manifest.state is FederationState.FINISHED

    # ---- effects ------------------------------------------------------------------------------------

    def _perform(self, effect: sv.Effect) -> None:
        match effect:
            case sv.Subscribe():
                self.transport.subscribe(effect.pattern)
            case sv.Unsubscribe():
                self.transport.unsubscribe(effect.pattern)
            case sv.Send():
                self._publish(effect.topic, effect.payload)
            case sv.SendUpdate():
                self._send_update(effect)
            case sv.Remember():
                self.store.advance_round(effect.round_id)
            case sv.Journal():
                self.store.outbox.put(effect.entry)
                self.store.checkpoints.keep_only(None)
                size = sum(len(message.payload) for message in effect.entry.messages)
                self.report("update_journalled", round=effect.entry.round_id.number, bytes=size)
            case sv.Settle():
                self.store.outbox.remove(effect.round_id)
                self.store.checkpoints.keep_only(None)  # no training runs while a round is settled
                self.report(
                    "settled",
                    round=effect.round_id.number,
                    verdict=effect.verdict.name.lower() if effect.verdict else "none",
                    reject=effect.reject.name.lower() if effect.reject else None,
                )
            case sv.KeepArtifact():
                self._session.artifacts -= self.store.blobs.put(effect.digest, effect.content)
            case sv.Train():
                self._start_training(effect)
            case sv.StopTraining():
                self._end_training(effect.reason)
            case sv.PauseTraining():
                if self._run is not None:
                    begun = self._run.train
                    self._pause_training("not eligible")
                    self._handle(sv.TrainingPaused(begun))
            case sv.Refused():
                self.report("refused", reject=effect.reject.name.lower(), detail=effect.detail)
            case sv.FederationFinished():
                self.report("finished", version=effect.manifest.base_version)

    def _publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        try:
            self.transport.publish(topic, payload, retain=retain)
        except NotConnected as error:
            _log.debug("%s waits for the next resend: %s", topic, error)
            return False
        return True

    def _send_update(self, effect: sv.SendUpdate) -> None:
        """Until the first piece that cannot be sent: each further one would wait in vain, up to 30 s.

        It ends when the broker has it, so that what a slow link still carries is not sent a second time.
        """
        started_at = self.clock()
        for message in effect.messages:
            if not self._may_go_on_sending() or not self._publish(message.topic, message.payload):
                break
        while self._may_go_on_sending() and not self.transport.flush(FLUSH_POLL_S):
            if self.clock() - started_at > MAX_UPLOAD_S:
                break
        self._handle(sv.UpdateSent(effect.round_id, self.clock() - started_at))

    def _may_go_on_sending(self) -> bool:
        self._heed_policy()
        return self._session.may_send and not self._should_stop()

    def _say_presence(self, word: bytes) -> None:
        self._publish(topics.presence(self.identity.federation, self.identity.device), word, retain=True)

    # ---- training -----------------------------------------------------------------------------------

    def _start_training(self, effect: sv.Train) -> None:
        manifest = effect.manifest
        try:
            model = self._load(effect.artifact)
            if model is None:
                self.report("artifact_lost", round=manifest.round_id.number)
                self._handle(sv.ArtifactLost(effect))
                return
            theta = vector_from_bytes(manifest.parameter_count, effect.model)
            if model.parameter_count != manifest.parameter_count:
                raise RemoteProtocolError(
                    Reject.WRONG_SIZE,
                    f"artifact of {model.parameter_count} parameters, manifest of {manifest.parameter_count}",
                )
            run = self._run = TrainingRun(
                *(effect, theta, model),
                seed=batch_seed(self.seed, manifest.round_id, self.identity.device),
                checkpoints=self.store.checkpoints,
                every_s=self.config.training.checkpoint_s,
                clock=self.clock,
            )
        except (RemoteProtocolError, TensorError, BackendError, DataError) as error:
            if isinstance(error, DataError) and self._samples == 0:
                raise  # it has never worked: better told to the engineer who has just started it
            self._sit_out(manifest.round_id, str(error))
            return
        number = manifest.round_id.number
        if run.damage is not None:
            self.report("checkpoint_damaged", round=number, detail=run.damage)
        if run.resumed_at:
            self.report("training_resumed", round=number, step=run.resumed_at)
        else:
            self.report("training_started", round=number, samples=model.dataset.samples)

    def _load(self, digest: Digest) -> LoadedModel | None:
        """None: the cache has it no longer."""
        data = self.config.data
        stamp = data.origin.stamp()
        if self._model is not None and (self._model.artifact, self._model.data_stamp) == (digest, stamp):
            return self._model
        content = self.store.blobs.get(digest)
        if content is None:
            return None
        self._model = None  # memory may not hold two
        self._model = load_model(digest, content, data, self.backend, self.config.limits.threads)
        self._samples = self._model.dataset.samples
        return self._model

    def _train_a_while(self) -> None:
        run = self._run
        if run is None:
            return
        until = self.clock() + STEPS_BETWEEN_POLLS_S
        try:
            while not self._should_stop():
                if (result := run.advance()) is not None:
                    self._run = None
                    self._finish_training(run, result)
                    return
                if self.clock() >= until:
                    break
        except (TrainingDiverged, BackendError) as error:
            self._run = None
            self._sit_out(run.round_id, str(error))
            return
        if run.checkpoint_due():
            self._checkpoint(run)

    def _finish_training(self, run: TrainingRun, result: TrainingResult) -> None:
        round_id = run.round_id
        seed = derive_seed(self.seed, "codec", round_id.generation, round_id.number, self.identity.device)
        update = run.update(result, seed)
        train_s = run.trained_s
        counters = self.transport.counters
        telemetry = Telemetry(
            train_s=train_s,
            steps=result.steps,
            samples=result.samples,
            peak_memory_bytes=readings.peak_memory_bytes() or 0,
            bytes_up=counters.bytes_up,
            bytes_down=counters.bytes_down,
            temperature_c=readings.temperature_c() or 0.0,
            resends=self._session.resends,
        )
        self.report(
            "trained", round=round_id.number, steps=result.steps, loss=result.loss_last, seconds=train_s
        )
        self._handle(sv.Trained(round_id, update, self.config.telemetry.permitted(telemetry)))

    def _sit_out(self, round_id: RoundId, reason: str) -> None:
        self.report("training_failed", round=round_id.number, reason=reason)
        self._handle(sv.TrainingFailed(round_id, reason))

    def _checkpoint(self, run: TrainingRun) -> None:
        number = run.round_id.number
        try:
            if run.save():
                self.report("checkpoint_written", round=number, step=run.step)
        except (
            OSError
        ) as error:  # it only saves time; a disk that takes no update either stops the device then
            self.report("checkpoint_failed", round=number, reason=str(error))

    def _pause_training(self, reason: str) -> None:
        """To be resumed, here or in the next life of this device; memory is free meanwhile."""
        if self._run is not None:
            self._checkpoint(self._run)
            self._end_training(reason)
            self._model = None

    def _end_training(self, reason: str) -> None:
        if self._run is not None:
            self.report("training_stopped", round=self._run.round_id.number, reason=reason)
            self._run = None

    def _capability(self) -> sv.Capability:
        return sv.Capability(
            samples=self._samples,
            free_memory_bytes=readings.free_memory_bytes() or 0,
            codecs=codecs.available(),
            runtime=self.runtime_name,
            ttl_s=self.config.checkin.ttl_s,
        )
