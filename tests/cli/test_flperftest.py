"""The load test, small, as a user starts it: real broker, real processes, both paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flperftest.cli import main

from tests.support.brokers import mosquitto_installed
from tests.support.command_line import run

pytestmark = pytest.mark.skipif(not mosquitto_installed(), reason="mosquitto is not installed")
CLIENTS, CHUNKS = 20, 13  # 200 KB in chunks of 16 KiB


def _blobs(folder: Path, *words: str) -> tuple[int, list[dict]]:
    report = folder / "out" / "figures.json"
    small = ("--clients", str(CLIENTS), "--size-mb", "0.2", "--chunk-kib", "16", "--folder", str(folder))
    done = run(main, "blobs", *small, "--json", str(report), *words)
    assert done.err == ""
    return done.code, json.loads(report.read_text("utf-8"))["runs"]


def test_both_paths_bring_the_whole_blob_to_every_client_and_are_measured(tmp_path: Path) -> None:
    code, runs = _blobs(tmp_path)
    assert code == 0
    by_path = {run["case"]["path"]: run for run in runs}
    assert set(by_path) == {"wave", "pull"}
    for result in runs:
        clients = result["clients"]
        assert (result["lost"], clients["wrong"], clients["done"]) == (0, 0, CLIENTS)
        assert clients["pieces"] - clients["pieces_twice"] == CLIENTS * (1 + CHUNKS)
        assert 0 < result["p50_s"] <= result["p95_s"] <= result["wall_s"]
        assert set(result["usage"]) == {"broker", "server", "clients-0", "clients-1"}
        assert all(usage["rss_peak"] > 1e6 and usage["pss_mean"] > 1e5 for usage in result["usage"].values())
        assert result["loopback_bytes_per_s"] > 0
    wave, pull = by_path["wave"], by_path["pull"]
    assert wave["server"]["asked_wave"] == CLIENTS
    assert wave["server"]["sent_to_all"] >= 1 + CHUNKS
    assert "asked_wave" not in pull["server"]
    assert pull["server"]["sent_alone"] >= CLIENTS * (1 + CHUNKS)
    assert wave["server"]["bytes_up"] < pull["server"]["bytes_up"] / 4
    logs = sorted(path.name for path in tmp_path.rglob("*.log"))
    assert logs == sorted(["broker.log", "clients-0.log", "clients-1.log", "server.log"] * 2)


def test_clients_that_run_out_of_time_count_as_lost_and_fail_the_command(tmp_path: Path) -> None:
    code, (result,) = _blobs(tmp_path, "--path", "pull", "--bytes-per-s", "100000", "--timeout-s", "1")
    assert code == 1
    assert 0 < result["lost"] <= CLIENTS


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run(main, "blobs", "--clients", "1", "--folder", str(tmp_path / "file"))
    assert (done.code, done.out) == (1, "")
    assert "file" in done.err
    assert "--folder" in done.err
    assert done.err.count("\n") == 1
