"""All checks of ``edge-runtime doctor``, in the order in which one depends on the other. It changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from edge_runtime.config import DataConfig, DeviceConfig, load_device_config
from edge_runtime.data import DataError, load_dataset
from edge_runtime.device import snapshot
from edge_runtime.device.policy import violations
from edge_runtime.device_status import DeviceState, read_state
from edge_runtime.doctor import broker, identity, installation, machine
from edge_runtime.doctor.check import Check, good, problem, unknown
from edge_runtime.doctor.contact import TIMEOUT_S, contact
from edge_runtime.protocol.artifact import from_bundle
from edge_runtime.protocol.crypto.keys import VerifyKey
from edge_runtime.protocol.crypto.provider import CryptoProvider
from edge_runtime.protocol.enrol_token import EnrolToken, TokenError
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.settings import ConfigError
from edge_runtime.store import DamagedFileError
from edge_runtime.store.blobs import read_newest
from edge_runtime.store.device import read_identity
from edge_runtime.transport.base import TransportError

_AGGREGATOR = "aggregator"


@dataclass(frozen=True, kw_only=True)
class Examination:
    """``token``: the text of an enrolment token, before enrolling. ``import_runtime`` raises if it cannot be used.

    entropy: n random bytes, for a name at the broker that no other client has. root: another file tree in tests.
    """

    config_file: Path
    token: str | None
    provider: CryptoProvider
    import_runtime: Callable[[], object]
    entropy: Callable[[int], bytes]
    root: Path = Path("/")
    timeout_s: float = TIMEOUT_S

    def checks(self) -> Iterator[Check]:
        """Each as soon as it is known. Raises nothing but bugs."""
        yield from installation.checks(installation.look(self.import_runtime, self.root))
        try:
            config = load_device_config(self.config_file)
        except ConfigError as error:
            findings = "; ".join(map(str, error.problems))
            yield problem("settings", f"{self.config_file}: {findings}", ConfigError.remedy)
            yield unknown("everything else", "it depends on the settings")
            return
        yield good("settings", f"{self.config_file} reads")
        yield from machine.checks(machine.look(config.state_folder, self.root))
        try:
            state = read_state(config.state_folder, self.provider)
            key = self._key(config.state_folder)
        except OSError as error:
            yield problem(
                "state folder",
                f"{config.state_folder} cannot be read: {error.strerror}",
                "run as the user that it belongs to",
            )
            return
        yield from identity.checks(state, key, time.time())
        token = None
        if self.token is not None:
            try:
                token = EnrolToken.parse(self.token)
                yield identity.token(token, state)
            except TokenError as error:
                yield problem("token", str(error), TokenError.remedy)
        yield data(config.data, config.state_folder)
        reading = snapshot.take(config.state_folder, config.policy.metered, root=self.root)
        yield machine.eligibility(violations(reading, config.policy, datetime.now()))
        yield from self._broker(config, state, token)

    def _key(self, folder: Path) -> VerifyKey | None:
        try:
            secret = read_identity(folder)
        except DamagedFileError:
            return None
        return self.provider.verify_key(secret) if secret is not None else None

    def _broker(self, config: DeviceConfig, state: DeviceState, token: EnrolToken | None) -> Iterator[Check]:
        now, enrolment = time.time(), state.enrolment
        if config.broker.cert_file is not None:
            yield broker.client_certificate(config.broker.cert_file, now)
        url = enrolment.broker_url if enrolment else token.broker_url if token else None
        if url is None and config.broker.url is None:
            yield unknown(
                "broker", "no address is known yet: the enrolment token brings it", "give --token-file"
            )
            return
        try:
            address = config.broker.address(url)
        except TransportError as error:
            yield problem("broker", str(error), TransportError.remedy)
            return
        client_id = f"fleetgrad-doctor-{self.entropy(4).hex()}"
        found = contact(address, client_id, self.timeout_s)
        yield from broker.checks(address, found, now)
        if found.obstacle is not None:
            yield unknown(_AGGREGATOR, "the broker was not reached")
        elif enrolment is None:
            yield unknown(_AGGREGATOR, "whom to believe is known after enrolling")
        else:
            announced = broker.announcement(
                address, client_id, enrolment.federation, enrolment.root_key, self.provider, self.timeout_s
            )
            yield broker.aggregator(announced, found.max_packet_bytes, now)


def data(config: DataConfig, state_folder: Path) -> Check:
    """Whether the samples are there and, once a model was fetched, fit it: then all of them are read."""
    try:
        config.origin.check()
        bundle = read_newest(state_folder / "blobs")
        if bundle is None:
            return good(
                "data", f"{config.origin} is there; whether it fits the model is told after the first round"
            )
        try:
            manifest = from_bundle(bundle).manifest
        except RemoteProtocolError as error:
            return unknown(
                "data", f"{config.origin} is there; the model fetched last cannot be used: {error}"
            )
        dataset = load_dataset(config.origin, manifest, max_bytes=config.max_bytes)
    except DataError as error:
        return problem("data", str(error), DataError.remedy)
    except OSError as error:
        return problem("data", f"{config.origin}: {error.strerror}", "check the path and its permissions")
    return good("data", f"{config.origin}: {dataset.samples} samples, which fit the model {manifest.name!r}")
