"""What a courier of messages promises. At least once, in any order across reconnects, trusted with nothing.

``publish`` means "handed to the connection", no more: a broker's PUBACK is not durable, so the transport keeps no
outbox of its own. What must arrive is kept by the caller until the peer's receipt, and sent again after a
``Disconnected`` or a ``Connected`` whose session was lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from edge_runtime.protocol.chunks import MIN_CHUNK_BYTES
from edge_runtime.protocol.envelope import OVERHEAD_BYTES
from edge_runtime.protocol.errors import Fault, FleetgradError, LocalProtocolError

MQTT_MAX_PACKET_BYTES = 268_435_460  # MQTT 5.0, 1.5.5: a remaining length of 2^28 - 1, and the fixed header
_TOPIC_BYTES = 65_535


class TransportError(
    FleetgradError, fault=Fault.SURROUNDINGS, remedy="check broker address, certificates and network"
):
    """The courier cannot do what was asked; the text says what to change."""


class BrokerUnreachable(
    TransportError,
    fault=Fault.SURROUNDINGS,
    remedy="check that the broker runs and can be reached, and the address and TLS files of the settings",
):
    """No broker answered at the first connect, or it refused us."""

    def __init__(self, host: str, port: int, reason: str, remedy: str) -> None:
        super().__init__(f"no MQTT connection to {host}:{port}: {reason}; {remedy}")
        self.host = host
        self.port = port
        self.reason = reason


class NotConnected(
    TransportError, fault=Fault.SURROUNDINGS, remedy="nothing: it is sent again after the next connect"
):
    """Nothing was sent and nothing is queued: send again after the next ``Connected``."""


class Congested(NotConnected):
    """The broker acknowledges nothing though the connection stands; nothing was sent."""


class PayloadTooLarge(
    TransportError,
    fault=Fault.OPERATOR,
    remedy="lower [delivery] chunk_bytes, or raise the packet limit of the broker",
):
    """Refused before sending: a broker drops the connection over such a packet, and would at every resend."""

    def __init__(self, packet_bytes: int, limit_bytes: int) -> None:
        room = limit_bytes - OVERHEAD_BYTES
        lower = f"set [delivery] `chunk_bytes` of aggregator.toml to at most {room}, or "
        super().__init__(
            f"a packet of {packet_bytes} bytes is above the {limit_bytes} bytes this broker takes: "
            f"{lower if room >= MIN_CHUNK_BYTES else ''}raise the broker's limit (mosquitto: max_packet_size)"
        )
        self.packet_bytes = packet_bytes
        self.limit_bytes = limit_bytes


@dataclass(frozen=True)
class Connected:
    """Every remembered subscription has been asked for again before this event is seen.

    ``session_present`` False: the broker knew nothing of us, messages may be lost; send again what has no receipt.
    ``max_packet_bytes``: the largest packet the broker takes (payload, topic, header), None where it does not say.
    """

    session_present: bool
    max_packet_bytes: int | None


@dataclass(frozen=True)
class Disconnected:
    """An established connection ended; the transport goes on trying by itself."""

    reason: str


@dataclass(frozen=True)
class Received:
    """A message; ``token`` is the transport's own, for ``ack``. ``retained``: stored before we subscribed."""

    topic: str
    payload: bytes = field(repr=False)
    retained: bool
    token: object = field(repr=False)


Event = Connected | Disconnected | Received


@dataclass(frozen=True, kw_only=True)
class Will:
    """What the broker publishes (QoS 1) when this client vanishes without saying goodbye."""

    topic: str
    payload: bytes
    retain: bool = True


@dataclass(kw_only=True)
class Counters:
    """``bytes_up``/``bytes_down``: MQTT PUBLISH packets with their headers, first transmissions and redeliveries
    alike; not acknowledgements, TCP or TLS. ``refused``: publishes the broker answered with an error (MQTT 5).
    ``dropped``: QoS 0 strays beyond the queue's bound, and messages whose topic is not UTF-8."""

    bytes_up: int = 0
    bytes_down: int = 0
    reconnects: int = 0
    refused: int = 0
    dropped: int = 0


class Transport(Protocol):
    """All methods may be called from any thread; events are taken by one."""

    @property
    def counters(self) -> Counters: ...

    def open(self, timeout_s: float = 5.0) -> None:
        """Connect, trying for ``timeout_s`` (0: once). Raises BrokerUnreachable. Later losses are events."""

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """QoS 1. Blocks while the window of unacknowledged publishes is full, which paces an upload.

        Raises PayloadTooLarge, NotConnected (Congested if the window stays full); in each case nothing was sent.
        """

    def flush(self, timeout_s: float) -> bool:
        """Wait until the broker has taken all that was published; False if it has not after ``timeout_s``.

        True without a connection, too: nothing is on its way then.
        """

    def subscribe(self, pattern: str) -> None:
        """QoS 1; remembered and asked for again at every connect. A publish after it sees it in force."""

    def unsubscribe(self, pattern: str) -> None:
        """Forget the pattern; messages already on their way still arrive."""

    def next_event(self, timeout_s: float) -> Event | None:
        """The oldest event, or None after ``timeout_s`` (0: at once)."""

    def ack(self, received: Received) -> None:
        """Tell the broker to forget the message; call it after the commit, in the order of receipt.

        Without it the broker delivers again to the next connection and, once its window (``receive_maximum``) is
        full of unacknowledged messages, delivers nothing more. A token of an earlier connection is ignored.
        """

    def close(self) -> None:
        """Let what was published leave (within 2 s), then say goodbye: the last will does not fire."""


def full_jitter_s(
    attempt: int, random: Callable[[], float], *, base_s: float = 0.2, cap_s: float = 30.0
) -> float:
    """Seconds to wait before retry ``attempt`` (from 0): uniform in [0, min(cap, base 2^attempt)).

    ``random`` is uniform in [0, 1). Source: Brooker, "Exponential Backoff and Jitter" (AWS, 2015): full jitter.
    """
    return random() * min(cap_s, base_s * 2.0 ** min(attempt, 32))


def publish_packet_bytes(topic: str, payload_bytes: int) -> int:
    """Bytes of a QoS 1 PUBLISH packet, at the larger of MQTT 3.1.1 and 5 without properties (one byte more)."""
    remaining = 2 + len(topic.encode()) + 2 + 1 + payload_bytes
    length_bytes = 1 + (remaining >= 1 << 7) + (remaining >= 1 << 14) + (remaining >= 1 << 21)
    return 1 + length_bytes + remaining


def check_fits(topic: str, payload: bytes, limit_bytes: int | None) -> int:
    """Bytes of the packet. Raises PayloadTooLarge above the broker's limit (None: MQTT's own)."""
    packet_bytes = publish_packet_bytes(topic, len(payload))
    limit = MQTT_MAX_PACKET_BYTES if limit_bytes is None else limit_bytes
    if packet_bytes > limit:
        raise PayloadTooLarge(packet_bytes, limit)
    return packet_bytes


def check_chunks_fit(chunk_bytes: int, limit_bytes: int | None) -> None:
    """Raises PayloadTooLarge if a packet with ``chunk_bytes`` of content is above the broker's limit."""
    needed = chunk_bytes + OVERHEAD_BYTES
    if limit_bytes is not None and limit_bytes < needed:
        raise PayloadTooLarge(needed, limit_bytes)


def check_topic(topic: str) -> None:
    """Raises LocalProtocolError unless one may publish to it (MQTT 5.0, 4.7)."""
    if not topic or "\0" in topic or "+" in topic or "#" in topic or len(topic.encode()) > _TOPIC_BYTES:
        raise LocalProtocolError(f"{topic[:80]!r} is no topic to publish to")


def check_pattern(pattern: str) -> None:
    """Raises LocalProtocolError unless one may subscribe to it (MQTT 5.0, 4.7)."""
    levels = pattern.split("/")
    misplaced = any(("#" in part or "+" in part) and len(part) > 1 for part in levels) or "#" in levels[:-1]
    if not pattern or "\0" in pattern or misplaced or len(pattern.encode()) > _TOPIC_BYTES:
        raise LocalProtocolError(f"{pattern[:80]!r} is no subscription pattern")


def matches(pattern: str, topic: str) -> bool:
    """Whether a subscription covers a topic: ``+`` one level, a final ``#`` the parent and all below (4.7.1).

    A leading wildcard does not cover topics that begin with ``$`` (4.7.2).
    """
    wanted, levels = pattern.split("/"), topic.split("/")
    if levels[0].startswith("$") and wanted[0] in ("+", "#"):
        return False
    for i, part in enumerate(wanted):
        if part == "#":
            return True
        if i >= len(levels) or (part != "+" and part != levels[i]):
            return False
    return len(wanted) == len(levels)
