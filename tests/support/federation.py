"""A federation of real processes over a real broker, reproducible, whose parts a test may kill and start again.

``aggregator serve`` and every ``edge-runtime run`` are processes. Setting up (``init``, registrar, enrolment) runs
in the test's own process, over the same broker. Seeds, data and one thread are fixed, so two federations with the
same accepted sets make the same models, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from aggregator import registrar
from aggregator.config import AggregatorConfig, load_aggregator_config
from aggregator.setup import initialise
from aggregator.status import collect
from edge_runtime.enrolment import enrol
from edge_runtime.protocol.crypto.keys import SigningKey
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.enrol_token import EnrolToken
from edge_runtime.protocol.ids import DeviceId
from edge_runtime.store import DeviceStore, Enrolment
from tests.support.brokers import ROOT, BrokerUnderTest
from tests.support.programs import HANG_S, Program, eventually
from tests.support.traffic import FEDERATION, Recorder

ARTIFACT = ROOT / "examples" / "digits" / "artifact"
RUN_SEED = hashlib.sha256(b"the run seed of the tests").digest()

SAMPLES = (1237, 1361, 1489)  # numbers that stand out in recorded traffic

# Strict rounds: everybody takes part, nobody is given up. A test overrides what it is about.
STRICT: Mapping[str, object] = {
    "round.rounds": 3,
    "round.deadline_s": 600.0,
    "round.patience_s": 600.0,
    "round.retry_s": 0.2,
    "plan.epochs": 2,
}


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

    def __post_init__(self) -> None:
        programs = [self.aggregator, *self.devices.values()]
        for program in programs:
            program.fellows = [fellow for fellow in programs if fellow is not program]

    def finish(self) -> dict[int, str]:
        """Wait for the last version; end all but the broker. SHA-256 of params.bin by version."""
        self.aggregator.wait_for("finished")
        for program in (*self.devices.values(), self.aggregator):
            program.close()
        return self.models()

    def moved_to(self, folder: Path) -> None:
        """The aggregator's state lies elsewhere from now on."""
        self.config = replace(self.config, folder=folder)

    def models(self) -> dict[int, str]:
        """SHA-256 of the params.bin on disk, by version."""
        folders = sorted((self.config.folder / "versions").iterdir())
        return {int(f.name): hashlib.sha256((f / "params.bin").read_bytes()).hexdigest() for f in folders}

    def version(self, number: int) -> Path:
        return self.config.folder / "versions" / f"{number:06d}"

    def status(self) -> dict[str, Any]:
        """What ``aggregator status --json --verify`` prints."""
        return collect(self.config, verify=True)

    def key_file(self, round_number: int) -> Path:
        """Where the private key of a round of generation 1 lies while it is open."""
        return self.config.folder / "round-keys" / f"000001-{round_number:08d}.key"

    def inbox_folder(self, round_number: int) -> Path:
        """Where the sealed updates of a round of generation 1 lie while it is open."""
        return self.config.folder / "inbox" / f"000001-{round_number:08d}"

    def wait_at_gate(self, device: str) -> None:
        """Until a gated device has its model and is about to train."""
        eventually((self.folder / f"{device}.waits").exists, f"{device} is about to train")

    def open_gate(self, device: str) -> None:
        """Let it train."""
        (self.folder / f"{device}.gate").touch()

    def signing_key(self, device: str) -> SigningKey:
        """The identity of a device that does not run."""
        with DeviceStore(self.folder / device) as store:
            return store.signing_key(_never)

    def enrol_again(self, device: str) -> None:
        """A device that does not run gets a new token and, in a new state folder, a new key under its old name."""
        state_folder = self.folder / f"{device}-again"
        with _registrar(self.folder / "aggregator" / "registrar", self.broker) as office:
            _enrol(office, self.broker, state_folder, DeviceId(device))
        settings = self.folder / f"{device}.toml"
        found = settings.read_text()
        settings.write_text(
            found.replace(f'state_folder = "{device}"', f'state_folder = "{state_folder.name}"')
        )

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
    samples: Sequence[int] = SAMPLES,
    record: bool = False,
    gated: Sequence[str] = (),
    broker: str = "mosquitto",
    **settings: object,
) -> Federation:
    """A broker, an aggregator's folder and one enrolled device for each count of samples; nothing runs yet.

    settings: of aggregator.toml, ``__`` for the dot; cohort, goal and minimum are all devices unless given.
    gated: devices that stop before their first training step until ``open_gate``.
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
            _write_device(folder, name, seeds[name], device_data(index, count), gated=name in gated)
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


def _write_device(folder: Path, name: str, seed: bytes, data: Mapping[str, Any], *, gated: bool) -> None:
    np.savez(folder / f"{name}.npz", **data)
    (folder / f"{name}.seed").write_text(seed.hex())
    module = name.replace("-", "_")
    if gated:
        (folder / f"{module}.py").write_text(_GATED_DATA.format(path=folder / name))
    source = f"python:{module}:load" if gated else f"{name}.npz"
    (folder / f"{name}.toml").write_text(
        f'state_folder = "{name}"\n'
        f'[data]\nsource = "{source}"\n'
        f'[training]\nseed_file = "{name}.seed"\n'
        "[checkin]\nttl_s = 3600\n"
        "[policy]\nenabled = false\n"
    )


# A device loads its data when it has the model of its first round and is about to train.
_GATED_DATA = """
import time
from pathlib import Path
import numpy

def load():
    Path("{path}.waits").touch()
    while not Path("{path}.gate").exists():
        time.sleep(0.005)
    data = numpy.load("{path}.npz")
    return data["x"], data["y"]
"""


def _enrol_all(folder: Path, broker: BrokerUnderTest, names: Sequence[str]) -> list[EnrolToken]:
    """Through the registrar's own loop and the broker."""
    with _registrar(folder / "aggregator" / "registrar", broker) as office:
        return [_enrol(office, broker, folder / name, DeviceId(name)) for name in names]


def _enrol(
    office: registrar.Registrar, broker: BrokerUnderTest, state_folder: Path, device: DeviceId
) -> EnrolToken:
    token = office.new_token(broker.url, int(time.time()) + 3600, device)
    transport = broker.transport(f"enrol-{device}")
    transport.open()
    with DeviceStore(state_folder) as store:
        key = store.signing_key(lambda: CRYPTO.generate_signing_key(os.urandom(32)))
        try:
            enrolled = enrol(transport, token, device, key, CRYPTO, os.urandom, time.monotonic, HANG_S)
        finally:
            transport.close()
        store.enrol(
            Enrolment(
                federation=enrolled.federation,
                device=device,
                broker_url=enrolled.broker_url,
                root_key=enrolled.root,
                certificate=enrolled.certificate,
            )
        )
    return token


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
