"""One blob case, run and measured: broker, serving process and clients are started, watched and ended."""

from __future__ import annotations

import queue
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fldemo.processes import Child, Event, Supervisor

from aggregator.broker import start_broker
from edge_runtime.protocol import topics
from edge_runtime.protocol.errors import Fault, FleetgradError
from edge_runtime.transport.address import parse_broker_url
from edge_runtime.transport.mqtt import MqttOptions, MqttTransport
from flperftest.blob_case import FEDERATION, BlobCase
from flperftest.ceiling import loopback_bytes_per_s
from flperftest.sampling import Sampler, Usage, socket_bytes

_SETUP_S = 60.0
_CLEAN_UP_S = 30.0

Progress = Callable[[int, int], None]
"""``progress(clients that have all, bytes received)``, several times a second."""


class MeasurementFailed(
    FleetgradError, fault=Fault.SURROUNDINGS, remedy="read the logs in the folder that is named"
):
    """A program of the measurement did not do its part."""


@dataclass(frozen=True, kw_only=True)
class BlobResult:
    """What one run of a case gave. ``seconds``: from the start signal to the whole blob, one for each client.

    ``loopback_bytes_per_s``: of a bare TCP connection, just before. ``usage``: "broker", "server", "clients-0", ...
    ``socket_bytes``: what TCP held in buffers at its highest, on the whole machine, above what it held before.
    ``clients``, ``server``: what each side counted, summed over processes.
    """

    case: BlobCase
    seconds: tuple[float, ...]
    wall_s: float
    loopback_bytes_per_s: float
    usage: Mapping[str, Usage]
    socket_bytes: int
    clients: Mapping[str, int]
    server: Mapping[str, int]

    @property
    def lost(self) -> int:
        """Clients that did not have the whole blob in time."""
        return self.case.clients - len(self.seconds)

    @property
    def delivered_bytes_per_s(self) -> float:
        """Content that arrived whole, over the time until the last client had it."""
        return len(self.seconds) * self.case.size_bytes / max(self.wall_s, 1e-9)

    @property
    def of_loopback(self) -> float:
        """``delivered_bytes_per_s`` as a share of ``loopback_bytes_per_s``."""
        return self.delivered_bytes_per_s / max(self.loopback_bytes_per_s, 1.0)

    def quantile_s(self, share: float) -> float:
        """Seconds within which this share of the clients that finished had all; 0 if none did."""
        ordered = sorted(self.seconds)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0

    def clients_usage(self) -> Usage:
        """All client processes together."""
        each = [usage for name, usage in self.usage.items() if name.startswith("clients-")]
        return Usage(
            cpu_s=sum(usage.cpu_s for usage in each),
            pss_mean=sum(usage.pss_mean for usage in each),
            pss_peak=sum(usage.pss_peak for usage in each),
            rss_peak=sum(usage.rss_peak for usage in each),
        )


def measure(case: BlobCase, folder: Path, progress: Progress) -> BlobResult:
    """Run one case in ``folder``, which should be new: a broker remembers. Call it from the main thread.

    Raises BrokerStartError, ProcessError, MeasurementFailed.
    """
    _wait_for_quiet_sockets()
    loopback = loopback_bytes_per_s()
    with (
        start_broker(folder / "broker", kind=case.broker) as broker,
        Supervisor(folder / "logs", grace_s=_CLEAN_UP_S) as supervisor,
    ):
        run = _Run(case, supervisor, broker.url, progress)
        sampler = Sampler()
        server = run.start_server()
        clients = run.start_clients()
        sampler.watch("broker", broker.pid)
        for child in (server, *clients):
            sampler.watch(child.name, child.pid)
        before = socket_bytes()
        sampler.start()
        started_at = run.go()
        run.wait_for_clients(started_at + case.timeout_s)
        wall_s = time.monotonic() - started_at
        usage = sampler.stop()
        results = run.end(clients)
        served = run.end([server])
    seconds = tuple(sorted(second for result in results for second in result["seconds"]))
    return BlobResult(
        case=case,
        seconds=seconds,
        wall_s=max(seconds, default=wall_s) if len(seconds) == case.clients else wall_s,
        loopback_bytes_per_s=loopback,
        usage=usage,
        socket_bytes=max(sampler.socket_bytes_peak - before, 0),
        clients=_summed(results),
        server=_summed(served),
    )


class _Run:
    def __init__(self, case: BlobCase, supervisor: Supervisor, url: str, progress: Progress) -> None:
        self.case = case
        self._supervisor = supervisor
        self._url = url
        self._progress = progress
        self._digest = ""
        self._last: dict[str, Mapping[str, Any]] = {}  # the latest event of each program

    def start_server(self) -> Child:
        command = (sys.executable, "-m", "flperftest.blob_service", self.case.to_json(), self._url)
        child = self._supervisor.start("server", command, read_events=True)
        self._digest = self._wait_for("serving", 1)["server"]["digest"]
        return child

    def start_clients(self) -> list[Child]:
        children = []
        for process in range(self.case.processes):
            words = (self.case.to_json(), self._url, str(process), self._digest)
            command = (sys.executable, "-m", "flperftest.blob_clients", *words)
            children.append(self._supervisor.start(f"clients-{process}", command, read_events=True))
        self._wait_for("connected", len(children))
        return children

    def go(self) -> float:
        """Tell all clients to begin; when."""
        options = MqttOptions(address=parse_broker_url(self._url), client_id="flperftest")
        transport = MqttTransport(options)
        transport.open()
        started_at = time.monotonic()
        transport.publish(topics.manifest(FEDERATION), repr(started_at).encode())
        transport.close()
        return started_at

    def wait_for_clients(self, deadline: float) -> None:
        """Until all have finished or time is up."""
        finished: set[str] = set()
        while len(finished) < self.case.processes and time.monotonic() < deadline:
            event = self._next(0.5)
            if event is not None and event.kind == "fetched":
                finished.add(event.source)
            done = sum(int(fields.get("done", 0)) for fields in self._last.values())
            received = sum(int(fields.get("bytes_down", 0)) for fields in self._last.values())
            self._progress(done, received)

    def end(self, children: list[Child]) -> list[Mapping[str, Any]]:
        """SIGTERM; the last words of each."""
        for child in children:
            self._supervisor.stop(child)
            self._supervisor.wait(child, _CLEAN_UP_S)
        while self._next(0.0) is not None:
            pass
        missing = [
            child for child in children if self._last[child.name]["event"] not in ("fetched", "served")
        ]
        if missing:
            raise missing[0].failure("did not say what it had done")
        return [self._last[child.name] for child in children]

    def _wait_for(self, kind: str, count: int) -> dict[str, Mapping[str, Any]]:
        found: dict[str, Mapping[str, Any]] = {}
        deadline = time.monotonic() + _SETUP_S
        while len(found) < count:
            event = self._next(0.2)
            if event is not None and event.kind == kind:
                found[event.source] = event.fields
            if time.monotonic() > deadline:
                raise MeasurementFailed(
                    f"only {len(found)} of {count} programs got as far as {kind!r} in {_SETUP_S:g} s: "
                    f"see {self._supervisor.log_folder}"
                )
        return found

    def _next(self, timeout_s: float) -> Event | None:
        self._supervisor.check()
        try:
            event = (
                self._supervisor.events.get(timeout=timeout_s)
                if timeout_s
                else self._supervisor.events.get_nowait()
            )
        except queue.Empty:
            return None
        self._last[event.source] = event.fields
        return event


def _summed(reports: list[Mapping[str, Any]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for report in reports:
        total.update(
            {name: value for name, value in report.items() if isinstance(value, int) and name != "process"}
        )
    return dict(sorted(total.items()))


def _wait_for_quiet_sockets() -> None:
    """What the connections of the run before still hold is let go first."""
    deadline = time.monotonic() + 5.0
    while socket_bytes() > 1 << 20 and time.monotonic() < deadline:
        time.sleep(0.1)
