"""One undisturbed run, recorded and watched, that all other runs are compared with."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.transport.base import Received
from tests.support.brokers import mosquitto_installed
from tests.support.federation import Federation, federation

ROUNDS = 3


@dataclass
class Watched:
    """What lay on the aggregator's disk, by round, looked at every few milliseconds while it ran."""

    keys: dict[int, bytes] = field(default_factory=dict)
    inbox_bytes: dict[int, int] = field(default_factory=dict)
    left_over: dict[int, list[Path]] = field(default_factory=dict)


@dataclass(frozen=True)
class Undisturbed:
    """``models``: SHA-256 of params.bin by version. ``second_serve``: others on the same folder meanwhile."""

    federation: Federation
    models: dict[int, str]
    status: dict[str, Any]
    printed_status: str
    watched: Watched
    traffic: list[Received]
    serving_pid: int
    second_serve: list[subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True, scope="session")
def _needs_mosquitto() -> None:
    if not mosquitto_installed():
        pytest.skip("needs mosquitto")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, _needs_mosquitto: None) -> Iterator[Undisturbed]:
    """Three devices, three rounds, nothing in the way."""
    # 10007: a public number that stands out, so that the search for secret ones is seen to work.
    with federation(tmp_path_factory.mktemp("undisturbed"), record=True, plan__sample_cap=10_007) as fed:
        watched, stop = Watched(), threading.Event()
        watcher = threading.Thread(target=_watch, args=(fed, watched, stop), daemon=True)
        watcher.start()
        try:
            fed.start()
            for number in range(2, ROUNDS + 1):
                fed.aggregator.wait_for("round_opened", round=number)
                watched.left_over[number - 1] = _left_over(fed, number - 1)
            fed.aggregator.wait_for("finished")
        finally:
            stop.set()
            watcher.join()
        watched.left_over[ROUNDS] = _left_over(fed, ROUNDS)
        pid, config = fed.aggregator.pid, str(fed.folder / "aggregator" / "aggregator.toml")
        second = [
            fed.command("aggregator.cli", "serve", "--config", config, *words)
            for words in ([], ["--take-over"])
        ]
        printed = fed.command("aggregator.cli", "status", "--json", "--config", config).stdout
        models = fed.finish()
        yield Undisturbed(
            federation=fed,
            models=models,
            status=fed.status(),
            printed_status=printed,
            watched=watched,
            traffic=fed.traffic.messages(),
            serving_pid=pid,
            second_serve=second,
        )


def _left_over(fed: Federation, number: int) -> list[Path]:
    return [path for path in (fed.key_file(number), fed.inbox_folder(number)) if path.exists()]


def _watch(fed: Federation, watched: Watched, stop: threading.Event) -> None:
    while not stop.wait(0.002):
        for number in range(1, ROUNDS + 1):
            try:
                if number not in watched.keys:
                    watched.keys[number] = fed.key_file(number).read_bytes()
                size = sum(path.stat().st_size for path in fed.inbox_folder(number).iterdir())
                watched.inbox_bytes[number] = max(size, watched.inbox_bytes.get(number, 0))
            except FileNotFoundError:
                continue
