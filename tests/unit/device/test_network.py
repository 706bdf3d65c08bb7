"""Metered or not: the modem of the default route, and NetworkManager's word on a bus of its own."""

from __future__ import annotations

import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge_runtime.device import network

V4 = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"


def route(root: Path, *lines: str, v6: str = "") -> None:
    (root / "proc/net").mkdir(parents=True, exist_ok=True)
    (root / "proc/net/route").write_text(V4 + "\n".join(lines))
    (root / "proc/net/ipv6_route").write_text(v6)


def interface(root: Path, name: str, kind: str) -> None:
    (root / "sys/class/net" / name).mkdir(parents=True)
    (root / "sys/class/net" / name / "uevent").write_text(f"DEVTYPE={kind}\nINTERFACE={name}\n")


def test_a_modem_that_the_default_route_takes_is_metered_and_one_that_is_only_there_is_not(tmp_path):
    interface(tmp_path, "wwan0", "wwan")
    interface(tmp_path, "wlan0", "wlan")
    eth = "eth0 0000A8C0 00000000 0001 0 0 0 00FFFFFF 0 0 0"
    wlan = "wlan0 00000000 0100A8C0 0003 0 0 600 00000000 0 0 0"
    wwan = "wwan0 00000000 0100A8C0 0003 0 0 700 00000000 0 0 0"
    route(tmp_path, eth, wlan, wwan)
    assert network.metered(tmp_path) is None
    route(tmp_path, eth, wlan.replace(" 0003", " 0002"), wwan)  # the other route is down
    assert network.metered(tmp_path) is True
    route(tmp_path, eth)
    assert network.metered(tmp_path) is None


def test_a_modem_for_ipv6_alone_counts_too(tmp_path):
    interface(tmp_path, "wwan0", "wwan")
    zero = "0" * 32
    lo = f"{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200 lo\n"
    route(tmp_path, v6=lo + f"{zero} 00 {zero} 00 fe80 000002bc 00000001 00000000 00000003 wwan0\n")
    assert network.metered(tmp_path) is True


# ---- NetworkManager ---------------------------------------------------------------------------------


def _reply(serial: int, body: bytes, kind: int = 2) -> bytes:
    """A method return as dbus-daemon writes it: REPLY_SERIAL, DESTINATION and SIGNATURE among the fields."""
    fields = b"\x06\x01s\0" + struct.pack("<I", 4) + b":1.7\0" + bytes(3)
    fields += b"\x05\x01u\0" + struct.pack("<I", serial)
    fields += b"\x08\x01g\0\x01v\0"
    head = struct.pack("<cBBBIII", b"l", kind, 1, 1, len(body), 99, len(fields)) + fields
    return head + bytes(-len(head) % 8) + body


def _signal() -> bytes:
    fields = b"\x01\x01o\0" + struct.pack("<I", 1) + b"/\0"
    head = struct.pack("<cBBBIII", b"l", 4, 1, 1, 0, 1, len(fields)) + fields
    return head + bytes(-len(head) % 8)


@contextmanager
def bus(root: Path, *, answer: bytes, hello: bytes = b"OK 0123\r\n") -> Iterator[None]:
    """One connection's worth of a system bus that answers the second call with these bytes."""
    (root / "run/dbus").mkdir(parents=True)

    def serve() -> None:
        line, _ = server.accept()
        with line:
            line.recv(4096)
            line.sendall(hello)
            line.recv(4096)  # BEGIN, and Hello behind it, or soon
            line.sendall(_signal() + _reply(1, b"\x04\0\0\0:1.7\0"))
            while b"Metered" not in line.recv(4096):
                pass
            line.sendall(answer)
            line.recv(1)

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "run/dbus/system_bus_socket"))
        server.listen()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        thread.join(10)


@pytest.mark.parametrize(
    ("word", "metered"), [(0, None), (1, True), (2, False), (3, True), (4, False), (77, None)]
)
def test_network_managers_word_counts_also_where_it_guesses(tmp_path, word, metered):
    with bus(tmp_path, answer=_reply(2, b"\x01u\0\0" + struct.pack("<I", word))):
        assert network.metered(tmp_path) is metered


@pytest.mark.parametrize(
    "answer",
    [
        _reply(2, b"\x01s\0\0"),
        _reply(2, b"\x01u\0\0"),
        _reply(2, b"", kind=3),
        _reply(3, b"\x01u\0\0\1\0\0\0"),
        b"l" * 16,
    ],
)
def test_any_other_answer_means_unknown(tmp_path, answer):
    with bus(tmp_path, answer=answer):
        assert network.metered(tmp_path) is None


@pytest.mark.skipif(shutil.which("dbus-daemon") is None, reason="needs dbus-daemon")
def test_a_real_bus_without_network_manager_lets_us_in_and_says_that_it_is_not_there(tmp_path, monkeypatch):
    """And its own property ``Features`` is read by the same messages."""
    path = tmp_path / "run/dbus/system_bus_socket"
    path.parent.mkdir(parents=True)
    command = ["dbus-daemon", "--session", "--nofork", "--print-address=1", f"--address=unix:path={path}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as daemon:
        try:
            assert daemon.stdout is not None
            daemon.stdout.readline()
            with pytest.raises(ValueError, match="not on the bus"):
                network._network_manager(path)
            assert network.metered(tmp_path) is None
            replies = []
            receive = network._receive
            monkeypatch.setattr(
                network, "_receive", lambda line: replies.append(receive(line)) or replies[-1]
            )
            with pytest.raises(ValueError, match="not on the bus"):
                network._network_manager(path)
            assert [answers for _, answers, _ in replies if answers] == [1, 2]
            assert any(
                body.endswith(b":1.2\0") or b":1." in body for _, _, body in replies
            )  # our name, from Hello
        finally:
            daemon.kill()
