"""The fetching side of a blob run as a program: many clients that use the shipped fetch, envelope and chunk code.

Each client is what ``edge_runtime.session`` is while it fetches: it listens to its own topic and to the wave, asks,
checks each piece against the index, asks again for what is missing. They begin when a message on the manifest's
topic says so, as devices do.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

from edge_runtime.blob_fetch import BlobFetch
from edge_runtime.command_line import json_report, run_program
from edge_runtime.protocol import topics
from edge_runtime.protocol.chunks import Assembler, BlobIndex
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.envelope import Header, pack, unpack
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.ids import DeviceId, Digest, sha256
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.manifest import BlobRef
from edge_runtime.protocol.messages import Chunk
from edge_runtime.transport.address import parse_broker_url
from edge_runtime.transport.mqtt import MqttOptions
from flperftest.blob_case import FEDERATION, FLEET_KEY, BlobCase, Path, content_of
from flperftest.fleet import FleetClient, connect_all, keep_all_alive

_TURN_S = 0.05
_PROGRESS_S = 0.25


class ComparingAssembler(Assembler):
    """Compares each chunk, after its digest was checked, with the known content instead of keeping a copy.

    A thousand clients with 10 MB each would measure the machine's memory.
    """

    def __init__(self, ref: BlobRef, expected: bytes) -> None:
        super().__init__(ref.digest, ref.size)
        self._expected = memoryview(expected)
        self.wrong = 0

    def add_index(self, raw: bytes) -> None:
        super().add_index(raw)
        self._content = bytearray()  # nothing is kept in it

    def _place(self, index: BlobIndex, i: int, chunk: bytes | memoryview) -> None:
        self.wrong += self._expected[index.span(i)] != chunk
        self._have.add(i)


@dataclass(kw_only=True)
class Shared:
    """What the clients of one process have in common."""

    random: Random
    sequence: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    counts: Counter[str] = field(default_factory=Counter)


class Fetcher:
    """One client and its fetch. ``seconds``: from the start signal to the last piece, None until then."""

    def __init__(
        self, device: DeviceId, case: BlobCase, url: str, ref: BlobRef, expected: bytes, shared: Shared
    ) -> None:
        self.device = device
        self.ready = False
        self.started_at: float | None = None
        self.seconds: float | None = None
        self.assembler = ComparingAssembler(ref, expected)
        self.fetch = BlobFetch(ref, wave=case.path is Path.WAVE, assembler=self.assembler)
        self.client = FleetClient(
            MqttOptions(address=parse_broker_url(url), client_id=f"fleetgrad-{FEDERATION}-{device}"),
            v5=case.broker == "mosquitto",
            patterns=[topics.manifest(FEDERATION), topics.down(FEDERATION, device)],
            on_ready=self._on_ready,
            on_message=self._on_message,
            random=shared.random,
        )
        self._heard_at = 0.0
        self._wave = topics.all_pieces(FEDERATION, ref.digest)
        self._shared = shared

    def turn(self, now: float) -> None:
        """Ask, if it is time."""
        fetch, shared = self.fetch, self._shared
        if self.started_at is None or self.seconds is not None or now < fetch.next_ask_at:
            return
        silent = (
            fetch.asked > 0 and now > self._heard_at
        )  # else the piece that just came was the last of a batch
        ask = fetch.ask(now, shared.random.random)
        shared.counts["asks"] += 1
        shared.counts["asked_again"] += silent
        shared.counts["pieces_asked"] += len(ask.chunks) + ask.want_index
        header = Header(
            kind=Kind.FETCH,
            federation=FEDERATION,
            device=self.device,
            sequence=next(shared.sequence),
            payload_digest=sha256(),
        )
        (raw,) = pack(header, ask.encode(), lambda message: CRYPTO.sign(FLEET_KEY, message))
        self.client.publish(topics.up_topic(Kind.FETCH, FEDERATION, self.device), raw)

    def _on_ready(self) -> None:
        self.ready = True
        self.fetch.next_ask_at = time.monotonic()

    def _on_message(self, topic: str, payload: bytes) -> None:
        now = time.monotonic()
        if topic == topics.manifest(FEDERATION):
            self.started_at = float(payload)
            self.fetch.next_ask_at = now
            if self.fetch.wave:
                self.client.subscribe(self._wave)
            self.turn(now)
            return
        counts = self._shared.counts
        counts["pieces"] += 1
        counts["bytes_down"] += len(payload)
        try:
            chunk = Chunk.decode(unpack(payload, FEDERATION, Kind.CHUNK).body)
            news = self.fetch.take(chunk, now, self._shared.random.random)
        except RemoteProtocolError as error:
            counts[f"refused_{error.reject.name.lower()}"] += 1
            return
        counts["pieces_twice"] += not news
        self._heard_at = now
        if self.seconds is not None:
            return
        if self.fetch.complete():
            self.seconds = now - (self.started_at or now)
            counts["done"] += 1
            self.client.unsubscribe(self._wave)
        else:
            self.turn(now)


async def _run(case: BlobCase, url: str, process: int, ref: BlobRef) -> None:
    report = json_report(process=process)
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    expected = content_of(case.size_bytes)
    shared = Shared(random=Random(process))  # noqa: S311 - spreads retries, nothing secret
    fetchers = [Fetcher(device, case, url, ref, expected, shared) for device in case.devices(process)]
    clients = [fetcher.client for fetcher in fetchers]
    keeping_alive = asyncio.create_task(keep_all_alive(clients))
    await connect_all(clients)
    while not stopped.is_set() and not all(fetcher.ready for fetcher in fetchers):
        await asyncio.sleep(_TURN_S)
    report("connected", clients=len(clients))
    said_at = 0.0
    while not stopped.is_set() and shared.counts["done"] < len(fetchers):
        now = time.monotonic()
        for fetcher in fetchers:
            fetcher.turn(now)
        if now >= said_at + _PROGRESS_S:
            said_at = now
            report("progress", done=shared.counts["done"], bytes_down=shared.counts["bytes_down"])
        await asyncio.sleep(_TURN_S)
    report(
        "fetched",
        seconds=[round(fetcher.seconds, 4) for fetcher in fetchers if fetcher.seconds is not None],
        wrong=sum(fetcher.assembler.wrong for fetcher in fetchers),
        reconnects=sum(client.reconnects for client in clients),
        **shared.counts,
    )
    await stopped.wait()  # connected until everybody has finished: leaving costs the broker time
    keeping_alive.cancel()
    for client in clients:
        client.close()
    await asyncio.sleep(_TURN_S)


def main(words: list[str]) -> None:
    """``CASE URL PROCESS DIGEST``: connect, wait for the start signal, fetch; SIGTERM ends it."""
    case, url, process = BlobCase.from_json(words[0]), words[1], int(words[2])
    ref = BlobRef(digest=Digest(bytes.fromhex(words[3])), size=case.size_bytes)
    asyncio.run(_run(case, url, process, ref))


if __name__ == "__main__":
    run_program("blob-clients", lambda: main(sys.argv[1:]))
