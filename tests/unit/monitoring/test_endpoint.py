"""The endpoint over real sockets: answers, refuses what it should, and gives a hostile client little."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from aggregator import cli
from aggregator.config import load_aggregator_config
from aggregator.monitoring import endpoint
from aggregator.monitoring.endpoint import Endpoint, ListenError
from aggregator.monitoring.listen import parse_listen, spelt
from aggregator.monitoring.monitor import Monitor
from aggregator.setup import initialise
from aggregator.status import collect
from edge_runtime.settings import ConfigError
from tests.support.brokers import ROOT
from tests.support.command_line import refusal
from tests.support.programs import HANG_S, eventually

ADDRESS = ("127.0.0.1", 0)


@pytest.fixture
def monitor(tmp_path: Path) -> Monitor:
    return Monitor(folder=tmp_path, release="1", stalled_s=60.0)


@pytest.fixture
def served(monitor: Monitor) -> Iterator[tuple[str, int]]:
    with Endpoint(monitor, ADDRESS) as running:
        yield parse_listen(running.url.removeprefix("http://"))


def ask(address: tuple[str, int], path: str, method: str = "GET") -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection(*address, timeout=HANG_S)
    connection.request(method, path)
    answer = connection.getresponse()
    try:
        return answer.status, answer.getheader("Content-Type", ""), answer.read()
    finally:
        connection.close()


def test_metrics_health_and_readiness_are_served_as_what_tools_expect(served):
    status, kind, body = ask(served, "/metrics?name=x")
    assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert b"# HELP fleetgrad_build_info" in body
    status, kind, body = ask(served, "/healthz")
    assert (status, kind) == (200, "application/json")
    assert json.loads(body) == {"ok": True, "checks": {"loop": {"ok": True, "detail": "starting"}}}
    status, _, body = ask(served, "/readyz")
    assert status == 503
    assert json.loads(body)["ok"] is False
    assert ask(served, "/healthz", "HEAD") == (200, "application/json", b"")
    assert ask(served, "/")[0] == ask(served, "/../etc/passwd")[0] == 404
    assert ask(served, "/metrics", "POST")[0] == 501


def test_a_port_in_use_or_an_address_of_another_machine_is_a_clear_error(monitor, served):
    with pytest.raises(
        ListenError, match=rf"\[monitoring\] listen = 127.0.0.1:{served[1]}: Address already in use"
    ):
        Endpoint(monitor, served)
    with pytest.raises(ListenError, match=r"192\.0\.2\.1:9464"):
        Endpoint(monitor, ("192.0.2.1", 9464))


def test_clients_that_ask_nothing_are_cut_off_and_make_room(monkeypatch, monitor):
    monkeypatch.setattr(endpoint, "CLIENT_S", 0.3)
    with Endpoint(monitor, ADDRESS) as running:
        address = parse_listen(running.url.removeprefix("http://"))
        idle = [socket.create_connection(address, timeout=HANG_S) for _ in range(endpoint.MAX_CLIENTS)]
        for connection in idle:
            connection.sendall(b"GET /metrics HTTP/1.1\r\nX-Slow: ")
        # One more than there is room for is turned away, not queued.
        turned_away = socket.create_connection(address, timeout=HANG_S)
        with turned_away, contextlib.suppress(ConnectionResetError):
            assert turned_away.recv(1) == b""
        for connection in idle:  # each hears the end, whatever it goes on sending
            with connection:
                while connection.recv(4096):
                    pass
        monkeypatch.setattr(endpoint, "CLIENT_S", HANG_S)

        def answered() -> bool:
            try:
                return ask(address, "/healthz")[0] == 200
            except (
                OSError,
                http.client.HTTPException,
            ):  # a client hears the end a moment before its place is free
                return False

        eventually(answered, "there is room again")


def test_many_questions_at_once_are_answered_from_one_page(monkeypatch, monitor):
    pages: list[bytes] = []
    make = monitor.page
    monkeypatch.setattr(monitor, "page", lambda: pages.append(make()) or pages[-1])
    monkeypatch.setattr(endpoint, "KEPT_S", 3600.0)
    with Endpoint(monitor, ADDRESS) as running:
        address = parse_listen(running.url.removeprefix("http://"))
        threads = [threading.Thread(target=ask, args=(address, "/metrics")) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG_S)
        ask(address, "/metrics")
    assert len(pages) == 1


def test_garbage_ends_one_connection_and_nothing_else(served):
    for garbage in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET " + b"a" * 70_000,
        b"\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
    ):
        connection = socket.create_connection(served, timeout=HANG_S)
        with connection, contextlib.suppress(ConnectionError):
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    assert ask(served, "/healthz")[0] == 200


def test_after_it_ended_nobody_listens(monitor):
    with Endpoint(monitor, ADDRESS) as running:
        address = parse_listen(running.url.removeprefix("http://"))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=1.0)


@pytest.mark.parametrize("text", ["127.0.0.1:9464", "[::1]:0", "localhost:65535", "0.0.0.0:1"])
def test_an_address_is_read_as_it_is_spelt(text):
    assert spelt(*parse_listen(text)) == text


@pytest.mark.parametrize(
    "text", ["9464", ":9464", "host:", "host:70000", "host:x", "::1:9464", "[::1]", "h:-1"]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ValueError, match=r"expected|brackets"):
        parse_listen(text)


def test_serve_says_in_one_line_that_its_port_is_taken_and_gives_the_ledger_back(tmp_path, served):
    artifact = ROOT / "examples" / "digits" / "artifact"
    taken = spelt(*served)
    settings = [f"monitoring.listen={taken}"]
    path = initialise(tmp_path / "agg", "digits", artifact, "mqtt://127.0.0.1:1", settings)
    for _ in range(2):
        found = refusal(cli.main, "serve", "--config", str(path))
        assert found == f"aggregator: [monitoring] listen = {taken}: Address already in use"
    assert collect(load_aggregator_config(path))["served"] is False


def test_an_address_that_is_none_is_refused_in_the_settings(tmp_path):
    artifact = ROOT / "examples" / "digits" / "artifact"
    with pytest.raises(ConfigError, match=r'monitoring\.listen: "9464"; host:port is expected'):
        initialise(tmp_path / "agg", "digits", artifact, "mqtt://127.0.0.1:1", ["monitoring.listen='9464'"])
