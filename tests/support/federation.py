"""A whole federation of real processes over a real broker, reproducible, whose parts a test may kill and start again.

``aggregator serve`` and every ``edge-runtime run`` are processes. Setting up (``init``, registrar, enrolment) runs
in the test's own process, over the same broker. Seeds, data and one thread are fixed, so two federations with the
same accepted sets make the same models, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits

from aggregator import registrar
from aggregator.config import AggregatorConfig, load_aggregator_config
from aggregator.setup import initialise
from aggregator.status import collect
from edge_runtime.enrolment import enrol
from edge_runtime.protocol.chunks import PieceAssembler
from edge_runtime.protocol.crypto.keys import SigningKey
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.enrol_token import EnrolToken
from edge_runtime.protocol.envelope import Envelope, unpack
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.ids import DeviceId, Digest, FederationId
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.messages import Receipt
from edge_runtime.store import DeviceStore, Enrolment
from edge_runtime.transport.base import Received, Transport
from tests.support.brokers import ROOT, BrokerUnderTest

FEDERATION = FederationId("digits")
ARTIFACT = ROOT / "examples" / "digits" / "artifact"
RUN_SEED = hashlib.sha256(b"the run seed of the tests").digest()
HANG_S = 90.0  # what has not happened by then will not; no test asserts how long anything takes
_POLL_S = 0.004
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

# Strict rounds: everybody takes part, nobody is given up. A test overrides what it is about.
STRICT: Mapping[str, object] = {
    "round.rounds": 3,
    "round.deadline_s": 600.0,
    "round.patience_s": 600.0,
    "round.retry_s": 0.2,
    "plan.epochs": 1,
}


class Event(NamedTuple):
    """One line of a program's ``--log-json``; ``run`` counts the starts of that program from 0."""

    run: int
    name: str
    fields: dict[str, Any]


class Program:
    """One program, started any number of times; each run's output goes to a file of its own."""

    def __init__(self, name: str, command: Sequence[str], folder: Path) -> None:
        self.name = name
        self.command = list(command)
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.runs = 0

    @property
    def pid(self) -> int:
        return self._running().pid

    def start(self, *, command: Sequence[str] | None = None) -> None:
        if self._process is not None:
            raise RuntimeError(f"{self.name} runs already")
        with self._file(self.runs, "out").open("wb") as out, self._file(self.runs, "err").open("wb") as err:
            self._process = subprocess.Popen(
                list(command or self.command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=self._folder,
                env={**os.environ, **_ENVIRONMENT},
            )
        self.runs += 1

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        process = self._running()
        process.kill()
        process.wait()
        self._process = None

    def freeze(self) -> None:
        """SIGSTOP: it does nothing until ``thaw``."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def wait(self) -> int:
        """Its exit code, once it ended by itself; negative for a signal."""
        try:
            code = self._running().wait(HANG_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} does not end\n{self.output()}") from None
        self._process = None
        return code

    def close(self) -> None:
        """SIGTERM; SIGKILL if that does not help. Fine if it has ended."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def events(self) -> list[Event]:
        """All so far, of all runs; a line cut off by a kill is left out."""
        found = []
        for run in range(self.runs):
            for line in self._file(run, "out").read_bytes().splitlines(keepends=True):
                if line.startswith(b"{") and line.endswith(b"}\n"):
                    fields = json.loads(line)
                    found.append(Event(run, fields["event"], fields))
        return found

    def seen(self, event: str, **fields: object) -> list[Event]:
        """The events of this name whose fields have these values."""
        wanted = fields.items()
        return [e for e in self.events() if e.name == event and wanted <= e.fields.items()]

    def wait_for(self, event: str, *, times: int = 1, **fields: object) -> Event:
        """Until an event of this name with these fields has come (``times`` times, over all runs)."""
        deadline = time.monotonic() + HANG_S
        while len(found := self.seen(event, **fields)) < times:
            if not self.running and len(found := self.seen(event, **fields)) < times:
                raise AssertionError(f"{self.name} ended before {event} {fields}\n{self.output()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.name}: no {event} {fields} in {HANG_S:g} s\n{self.output()}")
            time.sleep(_POLL_S)
        return found[times - 1]

    def output(self) -> str:
        """The end of what it wrote, for the message of a failure."""
        parts = []
        for run in range(self.runs):
            text = self._file(run, "out").read_text() + self._file(run, "err").read_text()
            parts.append(f"--- {self.name}, run {run}\n" + "\n".join(text.splitlines()[-30:]))
        return "\n".join(parts)

    def errors(self) -> str:
        """What all runs wrote to stderr."""
        return "".join(self._file(run, "err").read_text() for run in range(self.runs))

    def _file(self, run: int, suffix: str) -> Path:
        return self._folder / f"{self.name}.{run}.{suffix}"

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError(f"{self.name} is not running")
        return self._process


class Recorder:
    """Everything that crosses the broker from now on, as any subscriber of ``#`` sees it."""

    def __init__(self, transport: Transport, *patterns: str) -> None:
        self._transport = transport
        self._stop = threading.Event()
        self._messages: queue.SimpleQueue[Received] = queue.SimpleQueue()
        self._kept: list[Received] = []
        for pattern in patterns or ("#",):
            transport.subscribe(pattern)
        transport.open()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def messages(self) -> list[Received]:
        while not self._messages.empty():
            self._kept.append(self._messages.get())
        return self._kept

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._transport.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            event = self._transport.next_event(0.1)
            if isinstance(event, Received):
                self._messages.put(event)
                self._transport.ack(event)

    def envelopes(self, *kinds: Kind) -> Iterator[tuple[bytes, Envelope]]:
        """(payload, envelope) of the messages of these kinds."""
        for message in self.messages():
            try:
                yield message.payload, unpack(message.payload, FEDERATION, *kinds)
            except RemoteProtocolError:
                continue

    def updates(self) -> dict[tuple[DeviceId, int], dict[int, set[bytes]]]:
        """By (device, round) and piece: the different payloads that were sent. One each, if all is well."""
        found: dict[tuple[DeviceId, int], dict[int, set[bytes]]] = {}
        for payload, envelope in self.envelopes(Kind.UPDATE):
            header = envelope.header
            if header.device is not None:
                pieces = found.setdefault((header.device, header.round_id.number), {})
                pieces.setdefault(header.chunk_index, set()).add(payload)
        return found

    def sendings(self, device: str, round_number: int) -> int:
        """How often the first piece of a device's update crossed the broker."""
        headers = [envelope.header for _, envelope in self.envelopes(Kind.UPDATE)]
        place = (device, round_number, 0)
        return sum((h.device, h.round_id.number, h.chunk_index) == place for h in headers)

    def sealed(self, device: str, round_number: int) -> bytes:
        """A device's sealed update, put together from its pieces."""
        assembler: PieceAssembler | None = None
        for _, envelope in self.envelopes(Kind.UPDATE):
            header = envelope.header
            if (header.device, header.round_id.number) == (device, round_number):
                digest = header.payload_digest
                assembler = assembler or PieceAssembler(header.chunk_count, digest, 1 << 24)
                assembler.add(header.chunk_index, header.chunk_count, digest, envelope.body)
        if assembler is None or not assembler.complete():
            raise AssertionError(f"no whole update of {device} for round {round_number} was recorded")
        return assembler.content()

    def receipts(self, device: str) -> list[tuple[int, Receipt]]:
        """(round, receipt) as they were sent to a device."""
        return [
            (envelope.header.round_id.number, Receipt.decode(envelope.body))
            for _, envelope in self.envelopes(Kind.RECEIPT)
            if envelope.header.device == device
        ]


@dataclass
class Federation:
    """Made by ``federation``; everything it started is ended by ``close``."""

    folder: Path
    broker: BrokerUnderTest
    aggregator: Program
    devices: dict[str, Program]
    config: AggregatorConfig
    tokens: list[EnrolToken]
    recorder: Recorder | None = None
    seeds: dict[str, bytes] = field(default_factory=dict)

    @property
    def traffic(self) -> Recorder:
        if self.recorder is None:
            raise RuntimeError("this federation is not recorded")
        return self.recorder

    def start(self) -> None:
        """The aggregator and all devices."""
        for program in (self.aggregator, *self.devices.values()):
            program.start()

    def finish(self) -> dict[int, str]:
        """Wait for the last version; end all but the broker. SHA-256 of params.bin by version."""
        self.aggregator.wait_for("finished")
        for program in (*self.devices.values(), self.aggregator):
            program.close()
        return self.models()

    def models(self) -> dict[int, str]:
        """SHA-256 of the params.bin on disk, by version."""
        folders = sorted((self.config.folder / "versions").iterdir())
        return {int(f.name): hashlib.sha256((f / "params.bin").read_bytes()).hexdigest() for f in folders}

    def version(self, number: int) -> Path:
        return self.config.folder / "versions" / f"{number:06d}"

    def status(self) -> dict[str, Any]:
        """What ``aggregator status --json`` prints."""
        return collect(self.config)

    def key_file(self, round_number: int) -> Path:
        """Where the private key of a round of generation 1 lies while it is open."""
        return self.config.folder / "round-keys" / f"000001-{round_number:08d}.key"

    def inbox_folder(self, round_number: int) -> Path:
        """Where the sealed updates of a round of generation 1 lie while it is open."""
        return self.config.folder / "inbox" / f"000001-{round_number:08d}"

    def signing_key(self, device: str) -> SigningKey:
        """The identity of a device that does not run."""
        with DeviceStore(self.folder / device) as store:
            return store.signing_key(_never)

    def command(self, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command line of this project to its end."""
        return subprocess.run(
            [sys.executable, "-m", program, *words], capture_output=True, text=True, timeout=HANG_S, cwd=ROOT
        )

    def close(self) -> None:
        for program in (*self.devices.values(), self.aggregator):
            program.close()
        if self.recorder is not None:
            self.recorder.close()
        self.broker.stop()

    def __enter__(self) -> Federation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + HANG_S
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {HANG_S:g} s: {what}")
        time.sleep(_POLL_S)


def device_name(index: int) -> str:
    return f"device-{index}"


def device_data(index: int, samples: int) -> dict[str, Any]:
    """x float32 (samples, 1, 8, 8), y int64 (samples,): scikit-learn's digits, drawn with replacement."""
    digits = load_digits()
    rows = np.random.default_rng(index).integers(0, len(digits.target), samples)
    return {
        "x": (digits.images[rows, np.newaxis] / 16).astype(np.float32),
        "y": digits.target[rows].astype(np.int64),
    }


def federation(
    folder: Path,
    *,
    samples: Sequence[int] = (160, 192, 224),
    record: bool = False,
    broker: str = "mosquitto",
    **settings: object,
) -> Federation:
    """A broker, an aggregator's folder and one enrolled device for each count of samples; nothing runs yet.

    settings: of aggregator.toml, ``__`` for the dot; cohort, goal and minimum are all devices unless given.
    """
    size = len(samples)
    chosen = {**STRICT, "round.cohort": size, "round.goal": size, "round.minimum": size}
    chosen |= {name.replace("__", "."): value for name, value in settings.items()}
    running = BrokerUnderTest(folder / "broker", broker)
    recorder: Recorder | None = None
    try:
        recorder = Recorder(running.transport("recorder")) if record else None
        seed_file = folder / "run_seed"
        seed_file.write_text(RUN_SEED.hex())
        words = [f"{name}={json.dumps(value)}" for name, value in chosen.items()]
        path = initialise(
            folder / "aggregator", FEDERATION, ARTIFACT, running.url, [*words, f"run_seed_file={seed_file}"]
        )
        seeds = {}
        for index, count in enumerate(samples):
            name = device_name(index)
            seeds[name] = hashlib.sha256(f"seed of {name}".encode()).digest()
            _write_device(folder, name, seeds[name], device_data(index, count))
        tokens = _enrol_all(folder, running, list(seeds))
    except BaseException:
        if recorder is not None:
            recorder.close()
        running.stop()
        raise
    serve = [sys.executable, "-m", "aggregator.cli", "serve", "--config", str(path), "--log-json"]
    run = [sys.executable, "-m", "edge_runtime.cli", "run", "--log-json", "--config"]
    return Federation(
        folder=folder,
        broker=running,
        aggregator=Program("aggregator", serve, folder),
        devices={name: Program(name, [*run, str(folder / f"{name}.toml")], folder) for name in seeds},
        config=load_aggregator_config(path),
        tokens=tokens,
        recorder=recorder,
        seeds=seeds,
    )


def _write_device(folder: Path, name: str, seed: bytes, data: Mapping[str, Any]) -> None:
    np.savez(folder / f"{name}.npz", **data)
    (folder / f"{name}.seed").write_text(seed.hex())
    (folder / f"{name}.toml").write_text(
        f'state_folder = "{name}"\n'
        f'[data]\nsource = "{name}.npz"\n'
        f'[training]\nseed_file = "{name}.seed"\n'
        "[checkin]\nttl_s = 3600\n"
    )


def _enrol_all(folder: Path, broker: BrokerUnderTest, names: Sequence[str]) -> list[EnrolToken]:
    """Through the registrar's own loop and the broker."""
    tokens = []
    with _registrar(folder / "aggregator" / "registrar", broker) as office:
        for name in names:
            token = office.new_token(broker.url, int(time.time()) + 3600, name)
            tokens.append(token)
            transport = broker.transport(f"enrol-{name}")
            transport.open()
            with DeviceStore(folder / name) as store:
                key = store.signing_key(lambda: CRYPTO.generate_signing_key(os.urandom(32)))
                try:
                    enrolled = enrol(
                        transport, token, DeviceId(name), key, CRYPTO, os.urandom, time.monotonic, HANG_S
                    )
                finally:
                    transport.close()
                store.enrol(
                    Enrolment(
                        federation=enrolled.federation,
                        device=DeviceId(name),
                        broker_url=enrolled.broker_url,
                        root_key=enrolled.root,
                        certificate=enrolled.certificate,
                    )
                )
    return tokens


@contextmanager
def _registrar(folder: Path, broker: BrokerUnderTest) -> Iterator[registrar.Registrar]:
    office = registrar.open(folder)
    transport = broker.transport("registrar")
    stop = threading.Event()
    transport.open()
    thread = threading.Thread(target=office.serve, args=(transport, stop.is_set))
    thread.start()
    try:
        yield office
    finally:
        stop.set()
        thread.join()
        transport.close()
        office.close()


def _never() -> SigningKey:
    raise AssertionError("the device has no key")


def aggregated_once(status: Mapping[str, Any], devices: int, versions: int) -> None:
    """The ledger's own invariants hold, and every version has one update of each device, no more."""
    assert status["invariant_violations"] == []
    assert status["version"] == versions
    published = [row for row in status["rounds"] if row["phase"] == "published"]
    assert [(row["stored"], row["accepted"]) for row in published] == [(devices, devices)] * versions
    assert status["outcomes"] == {"aggregated": devices * versions}


def digest_hex(digest: Digest) -> str:
    return digest.hex()
