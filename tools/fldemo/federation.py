"""The fleet of the demo as real processes: set up, rounds followed, devices killed and started again, the end."""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aggregator.broker import RunningBroker, start_broker
from edge_runtime.protocol.errors import Fault, FleetgradError
from fldemo.baselines import seed_bytes
from fldemo.data import Samples, Split, write_npz
from fldemo.examples import Example
from fldemo.memory import MemorySampler
from fldemo.processes import Child, Event, Supervisor, program, tail
from fldemo.scenario import AGGREGATOR, DEVICES, FEDERATION, Faults, Round, settings

BROKER, REGISTRAR = "broker", "registrar"
STALL_S = 60.0  # six times the deadline of a round
_END_S = 20.0

# Every device and the aggregator get one core's worth: idle thread pools of BLAS only take memory.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class DemoError(FleetgradError, fault=Fault.SURROUNDINGS, remedy="read the log that is named"):
    """The demo cannot go on; the text says what happened and where to look."""


@dataclass(frozen=True)
class Folders:
    """Where everything of a run lies under ``root``."""

    root: Path

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def aggregator(self) -> Path:
        return self.root / "aggregator"

    @property
    def registrar(self) -> Path:
        return self.aggregator / "registrar"

    @property
    def config(self) -> Path:
        return self.aggregator / "aggregator.toml"

    @property
    def held_out(self) -> Path:
        return self.root / "held-out.npz"

    @property
    def model(self) -> Path:
        return self.root / "model"

    def device(self, name: str) -> Path:
        return self.root / "devices" / name

    def device_config(self, name: str) -> Path:
        return self.device(name) / "device.toml"

    def version(self, number: int) -> Path:
        return self.aggregator / "state" / "versions" / f"{number:06d}"


@dataclass
class Run:
    """What happened. ``counts``: events of the aggregator by kind; times: ``time.monotonic`` seconds.

    ``late``: updates that came after their round had closed; ``update_bytes``: of each update, sealed and signed.
    """

    rounds: list[Round] = field(default_factory=list)
    faults: Faults = field(default_factory=Faults)
    counts: Counter[str] = field(default_factory=Counter)
    exit_codes: dict[str, int] = field(default_factory=dict)
    killed_codes: dict[str, int] = field(default_factory=dict)
    first_round_at: float = 0.0
    last_published_at: float = 0.0
    finished: bool = False
    late: set[tuple[int, str]] = field(default_factory=set)
    update_bytes: list[int] = field(default_factory=list)
    status: Mapping[str, Any] = field(default_factory=dict)

    @property
    def published(self) -> list[Round]:
        return [round_ for round_ in self.rounds if round_.published]

    def round(self, number: int) -> Round:
        """The round of this number. Raises DemoError if it was never opened."""
        for round_ in reversed(self.rounds):
            if round_.number == number:
                return round_
        raise DemoError(f"the aggregator speaks of round {number}, which it never opened")


class Federation:
    """Ten devices, a registrar, an aggregator and a broker. Use it inside ``with supervisor``."""

    def __init__(self, folders: Folders, supervisor: Supervisor, memory: MemorySampler) -> None:
        self.folders = folders
        self._supervisor = supervisor
        self._memory = memory
        self.broker: RunningBroker | None = None
        self.run = Run()
        self._striking = threading.Lock()  # held while a device is chosen and until it is dead
        supervisor.on_read = self._strike

    def start_broker(self, kind: str | None, warn: Callable[[str], None]) -> RunningBroker:
        """mosquitto if it is installed, else amqtt. Raises BrokerStartError."""
        self.broker = start_broker(self.folders.root / BROKER, kind=kind, warn=warn)
        self._memory.watch(BROKER, self.broker.pid)
        return self.broker

    def set_up(self, artifact: Path, split: Split, example: Example, seed: int, rounds: int) -> None:
        """Keys, configuration, data and enrolment of all ten devices. Raises ProcessError."""
        url, folders = self._broker_url(), self.folders
        _write_private(folders.root / "run-seed.hex", seed_bytes(seed, "run").hex())
        write_npz(folders.held_out, split.held_out)  # what each version is judged by
        files = {"run_seed_file": folders.root / "run-seed.hex", "evaluation.data": folders.held_out}
        values = {
            **settings(example.plan, rounds),
            **{key: json.dumps(str(path)) for key, path in files.items()},
        }
        chosen = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
        init = ["--folder", str(folders.aggregator), "--federation", FEDERATION, "--artifact", str(artifact)]
        self._run_all({"init": _aggregator("init", *init, "--broker", url, *chosen)})
        registrar = _aggregator("registrar", "serve", "--folder", str(folders.registrar), "--broker", url)
        self._start(REGISTRAR, registrar)
        for device, samples in zip(DEVICES, split.devices, strict=True):
            self._write_device(device, example.write, samples, seed)
        ask = ("--folder", str(folders.registrar), "--broker", url)
        tokens = self._run_all({d: _aggregator("enroll-token", *ask, "--device", d) for d in DEVICES})
        for device in DEVICES:
            _write_private(folders.device(device) / "token.txt", tokens[device].strip() + "\n")
        self._run_all({device: self._enrolment(device) for device in DEVICES})

    def start(self) -> None:
        """The aggregator and the devices. The registrar has done its work and ends."""
        registrar = self._supervisor.children[REGISTRAR]
        self._supervisor.stop(registrar)
        self._memory.forget(REGISTRAR)
        config = ("--config", str(self.folders.config))
        self._start(AGGREGATOR, _aggregator("serve", *config, "--until-finished", "--log-json"), events=True)
        for device in DEVICES:
            self._start_device(device)

    def follow(self, on_round: Callable[[Round], None]) -> Run:
        """Until the last version is published; ``on_round`` is told of every round that ended.

        Raises ProcessError when a program fails, DemoError when nothing happens for STALL_S.
        """
        run, last_event = self.run, time.monotonic()
        while not run.finished:
            try:
                event = self._supervisor.events.get(timeout=0.5)
            except queue.Empty:
                self._supervisor.check()
                self._check_broker()
                if time.monotonic() - last_event > STALL_S:
                    raise self._stalled() from None
                continue
            if event.source == AGGREGATOR:
                last_event = time.monotonic()
            with self._striking:
                restart = run.faults.restart(event)
            if restart is not None:
                self._start_device(restart.device)
            ended = record(run, event)
            if ended is not None:
                on_round(ended)
        return run

    def _strike(self, event: Event) -> None:
        """Kills a device as soon as the news that it trains is read: it trains for a fraction of a second."""
        with self._striking:
            kill = self.run.faults.kill(event)
            if kill is not None:
                child = self._supervisor.children[kill.device]
                self._supervisor.kill(child)
                self._memory.forget(kill.device)
                self.run.killed_codes[kill.device] = child.process.returncode

    def finish(self, run: Run) -> None:
        """Waits until every program has ended by itself, then asks for the status and the model files."""
        faults = run.faults
        gone = {kill.device for kill in faults.kills} - {restart.device for restart in faults.restarts}
        waiting = [AGGREGATOR, *(device for device in DEVICES if device not in gone)]
        deadline = time.monotonic() + _END_S
        for name in waiting:
            child = self._supervisor.children[name]
            run.exit_codes[name] = self._supervisor.wait(child, max(0.0, deadline - time.monotonic()))
        while not self._supervisor.events.empty():
            record(run, self._supervisor.events.get())
        config = ("--config", str(self.folders.config))
        done = self._run_all(
            {
                "status": _aggregator("status", *config, "--json", "--verify"),
                "export-model": _aggregator("export-model", *config, "--out", str(self.folders.model)),
            }
        )
        try:
            run.status = json.loads(done["status"])
        except ValueError as error:
            raise DemoError(f"`aggregator status --json` wrote no JSON: {error}") from error

    # ---- pieces -------------------------------------------------------------------------------------

    def _write_device(
        self, device: str, write: Callable[[Path, Samples], str], samples: Samples, seed: int
    ) -> None:
        folder = self.folders.device(device)
        folder.mkdir(parents=True)
        data = write(folder, samples)
        _write_private(folder / "seed.hex", seed_bytes(seed, device).hex())
        lines = (
            'state_folder = "state"',
            data,
            "[limits]",
            "threads = 1",
            "[training]",
            'seed_file = "seed.hex"',
            "[policy]",
            "enabled = false",  # ten devices share this machine: it is loaded, and may be a laptop on battery
        )
        (folder / "device.toml").write_text("\n".join(lines) + "\n", "utf-8")

    def _enrolment(self, device: str) -> list[str]:
        token = self.folders.device(device) / "token.txt"
        config = str(self.folders.device_config(device))
        return _device("enroll", "--config", config, "--device", device, "--token-file", str(token))

    def _start_device(self, device: str) -> None:
        config = str(self.folders.device_config(device))
        self._start(device, _device("run", "--config", config, "--until-finished", "--log-json"), events=True)

    def _start(self, name: str, command: Sequence[str], *, events: bool = False) -> Child:
        child = self._supervisor.start(name, command, read_events=events)
        self._memory.watch(name, child.pid)
        return child

    def _run_all(self, commands: Mapping[str, Sequence[str]]) -> dict[str, str]:
        return self._supervisor.run_all(commands, at_once=max(2, os.cpu_count() or 2))

    def _broker_url(self) -> str:
        if self.broker is None:
            raise DemoError("start the broker first")
        return self.broker.url

    def _check_broker(self) -> None:
        if self.broker is not None and not self.broker.running():
            raise DemoError(f"the broker ended\n{tail(self.broker.log_file)}")

    def _stalled(self) -> DemoError:
        log = self._supervisor.children[AGGREGATOR].log_file
        return DemoError(f"no news from the aggregator for {STALL_S:g} s\n{tail(log)}")


def record(run: Run, event: Event) -> Round | None:
    """Enters ``event`` into ``run``; returns the round that it ended, if it did."""
    if event.kind == "update_journalled":
        run.update_bytes.append(int(event.fields["bytes"]))
    if event.source != AGGREGATOR:
        return None
    run.counts[event.kind] += 1
    match event.kind:
        case "round_opened":
            run.rounds.append(Round(event.round, tuple(event.fields["cohort"])))
            run.first_round_at = run.first_round_at or event.at
        case "round_frozen":
            run.round(event.round).accepted = tuple(event.fields["accepted"])
        case "update_late":
            run.late.add((event.round, str(event.fields["device"])))
        case "round_published":
            ended = run.round(event.round)
            ended.published = True
            ended.version = int(event.fields["version"])
            ended.seconds = event.at - (run.last_published_at or run.first_round_at)
            run.last_published_at = event.at
            return ended
        case "round_aborted":
            ended = run.round(event.round)
            ended.aborted = True
            return ended
        case "finished":
            run.finished = True
    return None


def exit_words(code: int) -> str:
    """An exit code in words."""
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _aggregator(*words: str) -> list[str]:
    return [program("aggregator"), *words]


def _device(*words: str) -> list[str]:
    return [program("edge-runtime"), *words]


def _write_private(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
