"""The serving side of a blob run as a program: the shipped ``BlobServer`` behind the shipped transport.

The loop is that of ``aggregator.service``: take up to a batch, verify each signature, ask the server what is due,
publish, acknowledge. Without ledger, rounds and check-ins: what is measured is delivery.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, deque

from aggregator.blob_server import BlobServer
from aggregator.service import BATCH_MESSAGES, BATCH_S, IDLE_WAIT_S
from edge_runtime.command_line import json_report, run_program, stopped_by_signal
from edge_runtime.protocol import topics
from edge_runtime.protocol.crypto.keys import VerifyKey
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.envelope import unpack
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.messages import Fetch
from edge_runtime.transport.address import parse_broker_url
from edge_runtime.transport.base import Congested, NotConnected, Received
from edge_runtime.transport.mqtt import MqttOptions, MqttTransport
from flperftest.blob_case import FEDERATION, FLEET_KEY, BlobCase, content_of


class _Service:
    def __init__(self, case: BlobCase, url: str) -> None:
        self.blobs = BlobServer(
            FEDERATION, case.chunk_bytes, gather_s=case.gather_s, bytes_per_s=case.bytes_per_s
        )
        self.counts: Counter[str] = Counter()
        self.transport = MqttTransport(
            MqttOptions(address=parse_broker_url(url), client_id=f"fleetgrad-{FEDERATION}-aggregator")
        )
        self._fleet_key = CRYPTO.verify_key(FLEET_KEY)
        self._outgoing: deque[tuple[str, bytes]] = deque()

    def turn(self) -> None:
        received = self._gather()
        now = time.monotonic()
        for event in received:
            try:
                self._take(now, event, self._fleet_key)
            except RemoteProtocolError as error:
                self.counts[f"refused_{error.reject.name.lower()}"] += 1
        self._outgoing.extend(self.blobs.due(time.monotonic()))
        self._publish()
        for event in received:
            self.transport.ack(event)

    def _gather(self) -> list[Received]:
        wake_at = self.blobs.wake_at()
        patience = IDLE_WAIT_S if wake_at is None else min(max(wake_at - time.monotonic(), 0.0), IDLE_WAIT_S)
        received: list[Received] = []
        until = None
        while len(received) < BATCH_MESSAGES:
            event = self.transport.next_event(patience)
            if event is None:
                break
            if isinstance(event, Received):
                received.append(event)
                until = until or time.monotonic() + BATCH_S
            patience = max((until or 0.0) - time.monotonic(), 0.0)
        return received

    def _take(self, now: float, event: Received, key: VerifyKey) -> None:
        envelope = unpack(event.payload, FEDERATION, Kind.FETCH)
        CRYPTO.verify(key, envelope.signed_bytes(), envelope.signature)
        sender = topics.sender_of(event.topic)
        fetch = Fetch.decode(envelope.body)
        self.counts["asked_wave" if fetch.wave else "asked_pull"] += 1
        self.blobs.request(now, sender.device, fetch)

    def _publish(self) -> None:
        while self._outgoing:
            topic, payload = self._outgoing[0]
            try:
                self.transport.publish(topic, payload)
            except Congested:
                self.counts["congested"] += 1
                return
            except NotConnected:
                self._outgoing.clear()
                return
            self.counts["sent_alone" if topic.split("/")[3] == "d" else "sent_to_all"] += 1
            self._outgoing.popleft()


def main(words: list[str]) -> None:
    """``CASE URL``: serve until SIGTERM, then say what was done."""
    case, url = BlobCase.from_json(words[0]), words[1]
    report = json_report()
    stopped = stopped_by_signal()
    service = _Service(case, url)
    ref = service.blobs.offer(content_of(case.size_bytes), expected=case.clients)
    service.transport.subscribe(topics.all_up(FEDERATION))
    service.transport.open(10.0)
    report("serving", digest=ref.digest.hex(), size=ref.size)
    while not stopped():
        service.turn()
    counters = service.transport.counters
    report("served", **service.counts, bytes_up=counters.bytes_up, refused_by_broker=counters.refused)
    service.transport.close()


if __name__ == "__main__":
    run_program("blob-service", lambda: main(sys.argv[1:]))
