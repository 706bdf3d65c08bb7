"""A whole device and a whole aggregator, with something wrong between them or in the device's data."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator import registrar
from aggregator.config import load_aggregator_config
from aggregator.service import Service
from aggregator.setup import initialise
from aggregator.status import collect
from edge_runtime.backends.ort import OrtBackend
from edge_runtime.config import load_device_config
from edge_runtime.data import DataError
from edge_runtime.device.snapshot import Snapshot
from edge_runtime.protocol import wire_pb2 as wire
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.envelope import unpack
from edge_runtime.protocol.ids import DeviceId, FederationId, sha256
from edge_runtime.protocol.kinds import Kind
from edge_runtime.runtime import Runtime
from edge_runtime.store import DeviceStore, Enrolment
from edge_runtime.transport.base import Event, Received, Transport
from edge_runtime.transport.memory import MemoryBroker, MemoryTransport
from tests.support import enrolling
from tests.support.brokers import ROOT

FEDERATION, DEVICE = FederationId("digits"), DeviceId("pi-1")
ARTIFACT = ROOT / "examples" / "digits" / "artifact"
IMAGES = np.random.default_rng(0).random((64, 1, 8, 8), np.float32)
LABELS = np.arange(64) % 10


class ForgingTransport(MemoryTransport):
    """A broker that shows, before each message of one kind, the same with one bit of its body changed."""

    def __init__(self, broker: MemoryBroker, kind: Kind, *, mend_digest: bool) -> None:
        super().__init__(broker, "device")
        self.kind = kind
        self.mend_digest = mend_digest
        self.forged = 0
        self._held: deque[Event] = deque()

    def next_event(self, timeout_s: float) -> Event | None:
        if self._held:
            return self._held.popleft()
        event = super().next_event(timeout_s)
        if not isinstance(event, Received):
            return event
        envelope = unpack(event.payload, FEDERATION, Kind.MANIFEST, Kind.CHUNK, Kind.RECEIPT)
        if envelope.header.kind is not self.kind:
            return event
        self._held.append(event)
        self.forged += 1
        return replace(event, payload=self._forge(event.payload), token=None)

    def ack(self, received: Received) -> None:
        if received.token is not None:
            super().ack(received)

    def _forge(self, payload: bytes) -> bytes:
        message = wire.Envelope.FromString(payload)
        body = bytearray(message.body)
        body[-1] ^= 1
        message.body = bytes(body)
        if self.mend_digest:
            header = wire.Header.FromString(message.header)
            header.payload_digest = sha256(message.body)
            message.header = header.SerializeToString(deterministic=True)
        return message.SerializeToString(deterministic=True)


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[tuple[MemoryBroker, Path]]:
    """An aggregator for one device and one round over a broker in memory, and the device's settings."""
    words = [f"round.{key}=1" for key in ("rounds", "cohort", "goal", "minimum")]
    path = initialise(
        tmp_path / "agg", FEDERATION, ARTIFACT, "mqtt://unused", [*words, "delivery.chunk_bytes=16384"]
    )
    broker, stop = MemoryBroker(), threading.Event()
    office = registrar.open(path.parent / "registrar")
    np.savez(tmp_path / "train.npz", x=IMAGES, y=LABELS)
    config = tmp_path / "device.toml"
    config.write_text('state_folder = "state"\n[data]\nsource = "train.npz"\n')
    with DeviceStore(tmp_path / "state") as store:
        key = store.signing_key(lambda: CRYPTO.generate_signing_key(os.urandom(32)))
        token = office.new_token("mqtt://unused", int(time.time()) + 600)
        answer = office.answer(time.time(), *enrolling.request(token, DEVICE, key))
        assert answer is not None
        certificate = enrolling.read(token, answer[1]).certificate
        store.enrol(
            Enrolment(
                federation=FEDERATION,
                device=DEVICE,
                broker_url="mqtt://unused",
                root_key=office.root,
                certificate=certificate,
            )
        )
    office.close()
    with Service(
        config=load_aggregator_config(path),
        report=lambda *_, **__: None,
        transport=MemoryTransport(broker, "aggregator"),
    ) as service:
        thread = threading.Thread(target=service.run, kwargs={"should_stop": stop.is_set})
        # SQLite's connections belong to the engine's pool, not to a thread; the loop alone uses them from now on.
        thread.start()
        try:
            yield broker, path
        finally:
            stop.set()
            thread.join()


def run_device(folder: Path, transport: Transport) -> list[tuple[str, dict[str, Any]]]:
    """Until the federation is finished; what it reported."""
    events: list[tuple[str, dict[str, Any]]] = []
    deadline = time.monotonic() + 60
    with DeviceStore(folder / "state") as store:
        Runtime(
            config=load_device_config(folder / "device.toml"),
            store=store,
            transport=transport,
            backend=OrtBackend(),
            runtime_name="test",
            provider=CRYPTO,
            clock=time.monotonic,
            entropy=os.urandom,
            seed=bytes(32),
            report=lambda event, **fields: events.append((event, fields)),
            sensors=lambda: Snapshot(charging=True),
        ).run(should_stop=lambda: time.monotonic() > deadline, until_finished=True)
        assert store.outbox.entries() == ()
    return events


@pytest.mark.parametrize(
    ("kind", "mend_digest", "reject", "at_least"),
    [
        (Kind.MANIFEST, False, "bad_digest", 2),
        (Kind.MANIFEST, True, "bad_signature", 2),
        (Kind.CHUNK, False, "bad_digest", 12),
        (Kind.CHUNK, True, "bad_digest", 12),
        (Kind.RECEIPT, False, "bad_digest", 1),
        (Kind.RECEIPT, True, "bad_signature", 1),
    ],
)
def test_every_forgery_is_refused_and_the_round_is_completed_through_the_honest_copy(
    serving: tuple[MemoryBroker, Path], tmp_path: Path, kind: Kind, mend_digest: bool, reject: str, at_least: int
) -> None:  # fmt: skip
    broker, path = serving
    transport = ForgingTransport(broker, kind, mend_digest=mend_digest)
    events = run_device(tmp_path, transport)
    refused = Counter(fields["reject"] for event, fields in events if event == "refused")
    assert transport.forged >= at_least
    assert refused == {reject: transport.forged}
    settled = [fields["verdict"] for event, fields in events if event == "settled"]
    assert settled == ["stored"]
    assert events[-1][0] == "finished"
    status = collect(load_aggregator_config(path))
    assert (status["version"], status["outcomes"], status["refused"]) == (1, {"aggregated": 1}, {})


@pytest.mark.parametrize(
    ("images", "labels", "complaint"),
    [
        (IMAGES[:, :, :7], LABELS, r"train.npz: 'x' has shape \(64, 1, 7, 8\); the model's 'image' needs"),
        (IMAGES, LABELS + 1, r"train.npz: 'y', row 9: label 10; the model has 10 classes, 0 to 9"),
        (np.where(IMAGES > 0.999, np.nan, IMAGES), LABELS, r"train.npz: 'x', row \d+: NaN"),
        (np.where(IMAGES > 0.999, np.inf, IMAGES), LABELS, r"train.npz: 'x', row \d+: infinity"),
        (None, LABELS, r"train.npz: cannot be read: No such file"),
    ],
)
def test_data_that_does_not_fit_stops_the_device_and_once_mended_it_takes_part(
    serving: tuple[MemoryBroker, Path], tmp_path: Path, images: Any, labels: Any, complaint: str
) -> None:
    """The round waits for it: nothing was sent, and the selection still holds."""
    broker, path = serving
    data = tmp_path / "train.npz"
    data.unlink()
    if images is not None:
        np.savez(data, x=images, y=labels)
    with pytest.raises(DataError, match=complaint):
        run_device(tmp_path, MemoryTransport(broker, "device"))
    assert collect(load_aggregator_config(path))["outcomes"] == {}
    np.savez(data, x=IMAGES, y=LABELS)
    events = run_device(tmp_path, MemoryTransport(broker, "device"))
    assert [fields["verdict"] for event, fields in events if event == "settled"] == ["stored"]
    assert collect(load_aggregator_config(path))["outcomes"] == {"aggregated": 1}
