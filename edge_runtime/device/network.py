"""Is the network paid by volume? A mobile modem is; of other links NetworkManager knows, asked over D-Bus.

NetworkManager writes its answer into no file that every user may read, so its property ``Metered`` is read from the
system bus: three small messages of the D-Bus specification 0.43, without a library.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from edge_runtime.device.readings import read_text

ANSWER_WITHIN_S = 0.5
_MAX_MESSAGE_BYTES = 1 << 16
_ROUTE_UP = 1
# NMMetered: 1 yes, 2 no, 3 and 4 the same as NetworkManager guesses; 0 unknown
_METERED = {1: True, 2: False, 3: True, 4: False}
_CALL, _RETURN, _ERROR = 1, 2, 3


def metered(root: Path) -> bool | None:
    """Of the network that the default route takes; None: nobody knows."""
    bus = root / "run/dbus/system_bus_socket"
    try:
        if any(
            "DEVTYPE=wwan" in read_text(root / "sys/class/net" / name / "uevent") for name in _ways_out(root)
        ):
            return True
        return _METERED.get(_network_manager(bus)) if bus.is_socket() else None
    except (OSError, ValueError, struct.error):
        return None


def _ways_out(root: Path) -> Iterator[str]:
    """The interfaces of the default routes with the best metric, IPv4 and IPv6 (man 5 proc)."""
    v4 = [line.split() for line in read_text(root / "proc/net/route").splitlines()[1:]]
    v6 = [line.split() for line in read_text(root / "proc/net/ipv6_route").splitlines()]
    # (metric, flags, interface)
    routes = [
        [(int(r[6]), int(r[3], 16), r[0]) for r in v4 if len(r) >= 8 and r[1] == r[7] == "00000000"],
        [
            (int(r[5], 16), int(r[8], 16), r[9])
            for r in v6
            if len(r) >= 10 and r[0] == "0" * 32 and r[1] == "00"
        ],
    ]
    for family in routes:
        used = [(metric, name) for metric, flags, name in family if flags & _ROUTE_UP and name != "lo"]
        if used:
            yield min(used)[1]


# ---- D-Bus ------------------------------------------------------------------------------------------


def _network_manager(bus: Path) -> int:
    """NMMetered. Raises OSError, ValueError or struct.error for no bus, no NetworkManager, no sense."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(ANSWER_WITHIN_S)
        line.connect(str(bus))
        line.sendall(b"\0AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode() + b"\r\n")
        if not _exactly_line(line).startswith(b"OK "):
            raise ValueError("the bus does not let this user in")
        line.sendall(b"BEGIN\r\n")
        _call(line, 1, "org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "Hello")
        nm = "org.freedesktop.NetworkManager"
        path = "/org/freedesktop/NetworkManager"
        body = _call(line, 2, nm, path, "org.freedesktop.DBus.Properties", "Get", nm, "Metered")
        if body[:3] != b"\x01u\0":  # a variant that holds a uint32, aligned to 4
            raise ValueError("Metered is no number")
        return int(struct.unpack_from("<I", body, 4)[0])


def _call(
    line: socket.socket, serial: int, destination: str, path: str, interface: str, member: str, *words: str
) -> bytes:
    """The body of the reply, little-endian. Signals that come meanwhile are passed over."""
    fields = [(1, "o", path), (2, "s", interface), (3, "s", member), (6, "s", destination)]
    head = b""
    for code, kind, text in fields:
        head = _aligned(head, 8) + bytes([code, 1]) + kind.encode() + b"\0" + _string(text)
    if words:
        signature = "s" * len(words)
        head = (
            _aligned(head, 8) + bytes([8, 1]) + b"g\0" + bytes([len(signature)]) + signature.encode() + b"\0"
        )
    body = b""
    for word in words:
        body = _aligned(body, 4) + _string(word)
    start = struct.pack("<cBBBIII", b"l", _CALL, 0, 1, len(body), serial, len(head))
    line.sendall(_aligned(start + head, 8) + body)
    for _ in range(16):
        reply, answers, content = _receive(line)
        if answers == serial and reply == _ERROR:
            raise ValueError(f"{destination} is not on the bus, or refuses")
        if answers == serial and reply == _RETURN:
            return content
    raise ValueError("no answer among 16 messages")


def _receive(line: socket.socket) -> tuple[int, int | None, bytes]:
    """(type, serial it answers, body)."""
    start = _exactly(line, 16)
    order, kind, _, _, body_bytes, _, head_bytes = struct.unpack("<cBBBIII", start)
    if order != b"l" or body_bytes + head_bytes > _MAX_MESSAGE_BYTES:
        raise ValueError("a message in an order or of a size that is not expected")
    head = _exactly(line, head_bytes + -head_bytes % 8)[:head_bytes]
    at = head.find(b"\x05\x01u\0")  # REPLY_SERIAL; fields begin at multiples of 8
    while at % 8 and at >= 0:
        at = head.find(b"\x05\x01u\0", at + 1)
    answers = struct.unpack_from("<I", head, at + 4)[0] if at >= 0 else None
    return kind, answers, _exactly(line, body_bytes)


def _exactly(line: socket.socket, size: int) -> bytes:
    raw = b""
    while len(raw) < size:
        piece = line.recv(size - len(raw))
        if not piece:
            raise ValueError("the bus hung up")
        raw += piece
    return raw


def _exactly_line(line: socket.socket) -> bytes:
    raw = b""
    while not raw.endswith(b"\r\n") and len(raw) < 1024:
        raw += _exactly(line, 1)
    return raw


def _string(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode() + b"\0"


def _aligned(raw: bytes, to: int) -> bytes:
    return raw + bytes(-len(raw) % to)
