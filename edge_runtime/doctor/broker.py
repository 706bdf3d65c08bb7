"""The way to the broker, who this device is to it, and what the aggregator announces there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.doctor.check import Check, good, problem, warning
from edge_runtime.doctor.contact import Contact, Step
from edge_runtime.protocol import topics
from edge_runtime.protocol.certificates import check_aggregator
from edge_runtime.protocol.chunks import MIN_CHUNK_BYTES
from edge_runtime.protocol.crypto.keys import VerifyKey
from edge_runtime.protocol.crypto.provider import CryptoProvider
from edge_runtime.protocol.crypto.x509_validity import Validity, pem_validity
from edge_runtime.protocol.envelope import unpack
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.ids import FederationId
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.manifest import Manifest
from edge_runtime.protocol.rounds import FederationState
from edge_runtime.transport.address import BrokerAddress
from edge_runtime.transport.base import (
    PayloadTooLarge,
    Received,
    TransportError,
    check_chunks_fit,
)
from edge_runtime.transport.mqtt import MqttOptions, MqttTransport

SOON_S = 30 * 86_400.0
LATE_S = 3600.0
_NAMES = {step: f"broker {step.value}" for step in Step}


@dataclass(frozen=True)
class Announcement:
    """What lies at the manifest's topic. ``manifest`` None: ``trouble`` says why."""

    manifest: Manifest | None
    trouble: str = ""


def checks(address: BrokerAddress, found: Contact, now: float) -> Iterator[Check]:
    """One for each step that was taken; pure."""
    taken = {
        Step.NAME: f"{address.host} is {', '.join(found.addresses[:4])}",
        Step.TCP: f"port {address.port} answers",
        Step.TLS: f"{found.tls_version}, the certificate verifies",
        Step.MQTT: f"MQTT {found.mqtt_version}, the broker welcomes us",
    }
    for step, finding in taken.items():
        if step is Step.TLS and address.tls is None:
            continue
        if step is found.step and found.obstacle is not None:
            words = f" ({found.detail})" if found.detail else ""
            yield problem(
                _NAMES[step], f"{address.url}: {found.obstacle.finding}{words}", found.obstacle.remedy
            )
            return
        yield good(_NAMES[step], finding)
        if step is Step.TLS and found.server is not None:
            yield _validity("broker certificate", found.server, now, "ask the operator to renew it")
    yield _packet_limit(found.max_packet_bytes)


def client_certificate(file: Path, now: float) -> Check:
    """Whether the certificate that this device shows to the broker is still good."""
    name = "client certificate"
    try:
        validity = pem_validity(file.read_bytes())
    except OSError as error:
        return problem(name, f"{file} cannot be read: {error.strerror}", "check broker.cert_file")
    if validity is None:
        return problem(name, f"{file} holds no PEM certificate", "check broker.cert_file")
    return _validity(name, validity, now, "ask the operator for a new one")


def aggregator(found: Announcement, max_packet_bytes: int | None, now: float) -> Check:
    """Pure."""
    name, manifest = "aggregator", found.manifest
    if manifest is None:
        return warning(name, found.trouble, "ask the operator whether `aggregator serve` runs on this broker")
    try:
        check_chunks_fit(manifest.chunk_bytes, max_packet_bytes)
    except PayloadTooLarge as error:
        return problem(name, str(error), "tell the operator")
    told = f"round {manifest.round_id.number}, {manifest.state.name.lower()}, signed as it should be"
    late_s = now - manifest.deadline_unix_ms / 1000
    if manifest.state is FederationState.COLLECTING and late_s > LATE_S:
        return warning(
            name,
            f"{told}, but its deadline passed {late_s / 3600:.0f} h ago",
            "compare this device's clock; if it is right, the aggregator has stopped: tell the operator",
        )
    return good(name, told)


def announcement(
    address: BrokerAddress,
    client_id: str,
    federation: FederationId,
    root: VerifyKey,
    provider: CryptoProvider,
    timeout_s: float,
) -> Announcement:
    """The manifest the broker keeps, verified. Never raises for what broker or aggregator do."""
    options = MqttOptions(address=address, client_id=client_id, session_expiry_s=0)
    transport = MqttTransport(options)
    try:
        transport.open(timeout_s)
        transport.subscribe(topics.manifest(federation))
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            event = transport.next_event(left)
            if isinstance(event, Received):
                transport.ack(event)
                return Announcement(verified(event.payload, federation, root, provider))
    except TransportError as error:
        return Announcement(None, str(error))
    except RemoteProtocolError as error:
        return Announcement(None, f"a manifest that a device refuses: {error}")
    finally:
        transport.close()
    return Announcement(None, f"no manifest of {federation!r} came within {timeout_s:g} s")


def verified(payload: bytes, federation: FederationId, root: VerifyKey, provider: CryptoProvider) -> Manifest:
    """The manifest in a message. Raises RemoteProtocolError for one that a device would refuse."""
    envelope = unpack(payload, federation, Kind.MANIFEST)
    manifest = Manifest.decode(envelope.body)
    certificate = check_aggregator(provider, root, manifest.certificate, federation, manifest.round_id)
    provider.verify(VerifyKey(certificate.signing_key), envelope.signed_bytes(), envelope.signature)
    return manifest


def _packet_limit(limit: int | None) -> Check:
    name = "broker packet limit"
    if limit is None:
        return good(name, "the broker names none")
    try:
        check_chunks_fit(MIN_CHUNK_BYTES, limit)
    except PayloadTooLarge as error:
        return problem(name, str(error), "tell the operator")
    return good(name, f"{limit} bytes")


def _validity(name: str, validity: Validity, now: float, remedy: str) -> Check:
    days = time.strftime("%Y-%m-%d", time.gmtime(validity.not_after))
    if now < validity.not_before:
        return problem(name, "it is not valid yet", "set this device's clock: it is probably behind")
    if now > validity.not_after:
        return problem(name, f"it expired on {days}", remedy)
    if now > validity.not_after - SOON_S:
        return warning(name, f"it expires on {days}", remedy)
    return good(name, f"valid until {days}")
