"""One connection to the broker, step by step, so that what stands in the way has its own name.

The client library folds name, TCP, TLS and CONNECT into one error. Here the first packet is written by hand (MQTT
5.0, 3.1 and 3.2; MQTT 3.1.1 where the broker speaks no 5), under a client id that disturbs no running device.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from edge_runtime.protocol.crypto.x509_validity import Validity
from edge_runtime.transport.address import BrokerAddress

TIMEOUT_S = 5.0
_MAX_ANSWER_BYTES = 1 << 16
_DISCONNECT = b"\xe0\x00"
_MAXIMUM_PACKET_SIZE = 0x27
# Bytes of each property a CONNACK may hold (MQTT 5.0, 2.2.2.2); "s": a length of two bytes and so many more.
_PROPERTY_BYTES: dict[int, int | str] = {
    **dict.fromkeys((0x24, 0x25, 0x28, 0x29, 0x2A), 1),
    **dict.fromkeys((0x13, 0x21, 0x22), 2),
    **dict.fromkeys((0x11, _MAXIMUM_PACKET_SIZE), 4),
    **dict.fromkeys((0x12, 0x15, 0x16, 0x1A, 0x1C, 0x1F), "s"),
    0x26: "ss",
}


class Step(Enum):
    """How far a connection can come, in order."""

    NAME = "name"
    TCP = "tcp"
    TLS = "tls"
    MQTT = "mqtt"


class Obstacle(Enum):
    """(what stands in the way, what to do)."""

    NAME_UNKNOWN = ("the host name is unknown", "check the spelling of the URL, and the DNS of this network")
    REFUSED = ("the host refuses the port", "start the broker there, or correct the port of the URL")
    TIMED_OUT = ("no answer in time", "check network and firewall; is the host switched on?")
    UNREACHABLE = ("there is no way to the host", "check this device's network and the address")
    NO_TLS = ("the port speaks no TLS", "write mqtt:// with this port, or name the broker's TLS port (8883)")
    WANTS_TLS = ("the port wants TLS, the URL says mqtt://", "write mqtts:// and set broker.ca_file")
    WRONG_CA = (
        "the broker's certificate is not from a CA that is trusted here",
        "set broker.ca_file to the CA that signed the broker's certificate",
    )
    OTHER_NAME = (
        "the broker's certificate is for another host name",
        "use the name in the certificate in the URL, or have one made for this name",
    )
    SERVER_EXPIRED = (
        "the broker's certificate has expired",
        "have it renewed; if it has not expired, set this device's clock",
    )
    SERVER_TOO_YOUNG = (
        "the broker's certificate is not valid yet",
        "set this device's clock: it is probably behind",
    )
    CERTIFICATE_REQUIRED = (
        "the broker wants a client certificate",
        "set broker.cert_file and broker.key_file to those the operator made for this device",
    )
    CLIENT_EXPIRED = ("this device's certificate has expired", "ask the operator for a new one")
    CLIENT_REVOKED = ("this device's certificate is revoked", "ask the operator")
    CLIENT_REFUSED = (
        "the broker does not take this device's certificate",
        "ask the operator which CA the broker trusts for clients, and for a certificate of it",
    )
    TLS_FAILED = ("TLS failed", "compare the TLS settings of both sides; 1.2 is the oldest version used here")
    CREDENTIALS = (
        "the broker refuses the user name or password",
        "correct broker.username and password_file",
    )
    FORBIDDEN = ("the broker refuses this device", "ask the operator about its user and the broker's ACLs")
    OVERLOADED = ("the broker is busy or unavailable", "try again later; ask the operator")
    CLOSED = ("the broker hangs up without an answer", "is this an MQTT broker? Its log tells why it hung up")
    NO_MQTT = ("what answers is no MQTT broker", "correct host and port of the URL")

    @property
    def finding(self) -> str:
        return self.value[0]

    @property
    def remedy(self) -> str:
        return self.value[1]


# Reason codes of CONNACK: MQTT 5.0 from 0x80 on, below them those of 3.1.1.
_REFUSALS = {
    **dict.fromkeys((4, 0x86), Obstacle.CREDENTIALS),
    **dict.fromkeys((2, 5, 0x85, 0x87, 0x8A, 0x8C), Obstacle.FORBIDDEN),
    **dict.fromkeys((3, 0x88, 0x89, 0x97, 0x9F), Obstacle.OVERLOADED),
}
# X509_V_ERR_... of OpenSSL (man X509_STORE_CTX_get_error).
_VERIFY_CODES = {
    9: Obstacle.SERVER_TOO_YOUNG,
    10: Obstacle.SERVER_EXPIRED,
    62: Obstacle.OTHER_NAME,
    64: Obstacle.OTHER_NAME,
}
# Alerts of the broker, in OpenSSL's names (RFC 8446, section 6.2).
_TLS_REASONS = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": Obstacle.CERTIFICATE_REQUIRED,
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": Obstacle.CLIENT_EXPIRED,
    "SSLV3_ALERT_CERTIFICATE_REVOKED": Obstacle.CLIENT_REVOKED,
    **dict.fromkeys(
        (
            "TLSV1_ALERT_UNKNOWN_CA",
            "TLSV1_ALERT_ACCESS_DENIED",
            "TLSV1_ALERT_DECRYPT_ERROR",
            "SSLV3_ALERT_BAD_CERTIFICATE",
            "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
            "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE",
        ),
        Obstacle.CLIENT_REFUSED,
    ),
    **dict.fromkeys(
        ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "UNKNOWN_PROTOCOL"),
        Obstacle.NO_TLS,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Contact:
    """``step``: the last one taken, where ``obstacle`` stands, if one does; ``detail``: in the words of the system.

    server: validity of the broker's certificate. max_packet_bytes: what the broker takes; None: it does not say.
    """

    step: Step
    obstacle: Obstacle | None = None
    detail: str = ""
    addresses: tuple[str, ...] = ()
    tls_version: str | None = None
    server: Validity | None = None
    mqtt_version: str | None = None
    max_packet_bytes: int | None = None


class _Blocked(Exception):
    def __init__(self, obstacle: Obstacle, detail: str = "") -> None:
        super().__init__(detail)
        self.obstacle = obstacle
        self.detail = detail


def contact(address: BrokerAddress, client_id: str, timeout_s: float = TIMEOUT_S) -> Contact:
    """Connects as far as it goes, at most ``timeout_s`` for each step, and says goodbye. Never raises."""
    first = _attempt(address, client_id, timeout_s, v5=True)
    if first.step is Step.MQTT and first.obstacle in (Obstacle.CLOSED, Obstacle.NO_MQTT):
        second = _attempt(address, client_id, timeout_s, v5=False)
        if second.obstacle is not Obstacle.CLOSED:
            return second
        if address.tls is None and _speaks_tls(address, timeout_s):
            return replace(first, obstacle=Obstacle.WANTS_TLS, detail="")
    return first


def _attempt(address: BrokerAddress, client_id: str, timeout_s: float, *, v5: bool) -> Contact:
    found = Contact(step=Step.NAME)
    with contextlib.ExitStack() as stack:
        try:
            found = replace(found, addresses=_resolve(address), step=Step.TCP)
            started = time.monotonic()
            line: socket.socket = stack.enter_context(
                socket.create_connection((address.host, address.port), timeout_s)
            )
            round_trip_s = time.monotonic() - started
            if address.tls is not None:
                found = replace(found, step=Step.TLS)
                secure = stack.enter_context(address.tls.wrap_socket(line, server_hostname=address.host))
                found = replace(found, tls_version=secure.version(), server=_validity(secure))
                # With TLS 1.3 a broker says what it thinks of our certificate only after the handshake; if we wrote
                # before reading that, the connection might be reset and the reason lost.
                _listen(secure, min(0.2 + 3 * round_trip_s, timeout_s))
                secure.settimeout(timeout_s)
                line = secure
            found = replace(found, step=Step.MQTT)
            line.sendall(connect_packet(address, client_id, v5=v5))
            limit = _greeted(line, v5=v5)
            found = replace(found, mqtt_version="5.0" if v5 else "3.1.1", max_packet_bytes=limit)
            line.sendall(_DISCONNECT)
        except _Blocked as blocked:
            return replace(found, obstacle=blocked.obstacle, detail=blocked.detail)
        except (OSError, UnicodeError) as error:
            obstacle, words = _obstacle(error, found), _words(error)
            return found if found.mqtt_version else replace(found, obstacle=obstacle, detail=words)
    return found


def _speaks_tls(address: BrokerAddress, timeout_s: float) -> bool:
    """Whether a handshake comes so far that TLS is what the port wants; nobody is trusted for it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with (
            socket.create_connection((address.host, address.port), timeout_s) as line,
            context.wrap_socket(line, server_hostname=address.host),
        ):
            return True
    except (OSError, UnicodeError):
        return False


def connect_packet(address: BrokerAddress, client_id: str, *, v5: bool) -> bytes:
    """CONNECT with a clean start, so that nothing of us stays behind (MQTT 5.0, 3.1)."""
    flags = (
        0x02 | (0x80 if address.username is not None else 0) | (0x40 if address.password is not None else 0)
    )
    body = _text("MQTT") + bytes([5 if v5 else 4, flags]) + struct.pack(">H", 30) + (b"\0" if v5 else b"")
    body += b"".join(
        _text(part) for part in (client_id, address.username, address.password) if part is not None
    )
    return b"\x10" + _length(len(body)) + body


def _resolve(address: BrokerAddress) -> tuple[str, ...]:
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))


def _validity(secure: ssl.SSLSocket) -> Validity | None:
    certificate = secure.getpeercert() or {}
    try:
        start, end = (ssl.cert_time_to_seconds(str(certificate[key])) for key in ("notBefore", "notAfter"))
    except (KeyError, ValueError):
        return None
    return Validity(float(start), float(end))


def _listen(secure: ssl.SSLSocket, seconds: float) -> None:
    """Raises what the broker says against us; a broker never speaks first, so silence is good."""
    secure.settimeout(seconds)
    try:
        if not secure.recv(1):
            raise _Blocked(Obstacle.CLOSED)
    except TimeoutError:
        return
    raise _Blocked(Obstacle.NO_MQTT, "it speaks first")


def _greeted(line: socket.socket, *, v5: bool) -> int | None:
    """The broker's largest packet, from its CONNACK (MQTT 5.0, 3.2)."""
    kind = _exactly(line, 1)[0]
    if kind == 0x15:  # a TLS alert
        raise _Blocked(Obstacle.WANTS_TLS)
    if kind != 0x20:
        raise _Blocked(Obstacle.NO_MQTT, f"its answer begins with 0x{kind:02x}")
    body = _exactly(line, _read_length(lambda: _exactly(line, 1)[0]))
    if len(body) < 2:
        raise _Blocked(Obstacle.NO_MQTT, "its CONNACK is too short")
    code = body[1]
    if code in _REFUSALS:
        raise _Blocked(_REFUSALS[code], f"reason 0x{code:02x}")
    if code != 0:
        raise _Blocked(Obstacle.NO_MQTT, f"reason 0x{code:02x}: it wants another version or client")
    return _packet_limit(body[2:]) if v5 else None


def _packet_limit(raw: bytes) -> int | None:
    """Maximum Packet Size among the properties of a CONNACK; None: not there, or they make no sense."""
    position = 0

    def byte() -> int:
        nonlocal position
        position += 1
        return raw[position - 1]

    try:
        end = _read_length(byte)
        end += position
        while position < end:
            what = byte()
            if what == _MAXIMUM_PACKET_SIZE:
                return int(struct.unpack_from(">I", raw, position)[0])
            kind = _PROPERTY_BYTES[what]
            if isinstance(kind, int):
                position += kind
            else:
                for _ in kind:
                    position += 2 + int(struct.unpack_from(">H", raw, position)[0])
    except (IndexError, KeyError, struct.error, _Blocked):
        return None
    return None


def _obstacle(error: OSError | UnicodeError, found: Contact) -> Obstacle:
    if isinstance(error, socket.gaierror | UnicodeError):
        return Obstacle.NAME_UNKNOWN
    if isinstance(error, ssl.SSLCertVerificationError):
        return _VERIFY_CODES.get(error.verify_code, Obstacle.WRONG_CA)
    handshake = found.step is Step.TLS and found.tls_version is None
    if isinstance(error, ssl.SSLError):
        if handshake and isinstance(error, ssl.SSLEOFError):
            return Obstacle.NO_TLS
        return _TLS_REASONS.get(error.reason or "", Obstacle.TLS_FAILED)
    if isinstance(error, ConnectionRefusedError):
        return Obstacle.REFUSED
    if isinstance(error, TimeoutError):
        return Obstacle.NO_MQTT if found.step is Step.MQTT else Obstacle.TIMED_OUT
    if isinstance(error, ConnectionError):
        return Obstacle.NO_TLS if handshake else Obstacle.CLOSED
    return Obstacle.UNREACHABLE


def _words(error: OSError | UnicodeError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return error.reason or "TLS error"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _exactly(line: socket.socket, count: int) -> bytes:
    raw = b""
    while len(raw) < count:
        piece = line.recv(count - len(raw))
        if not piece:
            raise _Blocked(Obstacle.CLOSED)
        raw += piece
    return raw


def _read_length(byte: Callable[[], int]) -> int:
    """A variable byte integer (MQTT 5.0, 1.5.5)."""
    value = 0
    for shift in (0, 7, 14, 21):
        digit = byte()
        value |= (digit & 0x7F) << shift
        if not digit & 0x80:
            break
    if value > _MAX_ANSWER_BYTES:
        raise _Blocked(Obstacle.NO_MQTT, "its answer is too long")
    return value


def _length(value: int) -> bytes:
    raw = b""
    while value > 0x7F:
        raw += bytes([value & 0x7F | 0x80])
        value >>= 7
    return raw + bytes([value])


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack(">H", len(raw)) + raw
