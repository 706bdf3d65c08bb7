"""What the registrar hands over: folders of files for a broker, a role, or the engineer of a device."""

from __future__ import annotations

import json
from collections.abc import Sequence

from aggregator.access import Role
from aggregator.registrar.authority import Registrar
from aggregator.registrar.folder import CRL, RegistrarError
from edge_runtime.protocol.enrol_token import EnrolToken
from edge_runtime.protocol.ids import DeviceId
from edge_runtime.transport.address import parse_broker_url

CA, CLIENT_CERTIFICATE, CLIENT_KEY = "ca.crt", "client.crt", "client.key"


def broker_files(office: Registrar, hosts: Sequence[str], now: float, days: int) -> dict[str, bytes]:
    """What a broker needs that is reached as any of ``hosts``. Raises RegistrarError."""
    issued = office.broker_certificate(hosts, now, days)
    return {
        CA: office.authority_certificate(),
        CRL: office.crl(),
        "broker.key": issued.key,
        "broker.crt": issued.certificate,
    }


def client_files(office: Registrar, name: DeviceId | Role, now: float, days: int) -> dict[str, bytes]:
    """What a client needs: whom to trust, and who it is. Raises RegistrarError."""
    issued = office.client_certificate(name.value if isinstance(name, Role) else name, now, days)
    return {
        CA: office.authority_certificate(),
        CLIENT_KEY: issued.key,
        CLIENT_CERTIFICATE: issued.certificate,
    }


def device_kit(
    office: Registrar, device: DeviceId, broker_url: str, now: float, days: int, expires_at: int
) -> dict[str, bytes]:
    """All that ``device`` needs to enrol; for one that is enrolled already only new TLS files.

    ``days``: of the TLS certificate; ``expires_at``: of the token, Unix seconds. Raises RegistrarError: no TLS
    authority yet, or a URL without TLS; TransportError for the URL.
    """
    if not broker_url.startswith("mqtts://"):
        raise RegistrarError(
            f"a kit is for a broker with TLS: mqtts://host:port, not {broker_url[:80]!r}; without TLS a token "
            "is all a device needs (`aggregator enroll-token`)"
        )
    parse_broker_url(broker_url)
    enrolled = any(row.device == device and row.revoked_at is None for row in office.devices())
    files = client_files(office, device, now, days)
    if enrolled:
        return {**files, "README.md": _RENEWAL.format(device=device, days=days).encode()}
    token = office.new_token(broker_url, expires_at, device)
    settings = _SETTINGS.format(device=device, url=json.dumps(broker_url))
    readme = _README.format(device=device, federation=office.federation, days=days)
    return {
        **files,
        "token.txt": _line(token),
        "device.toml": settings.encode(),
        "README.md": readme.encode(),
    }


def _line(token: EnrolToken) -> bytes:
    return token.encode().encode() + b"\n"


_SETTINGS = """\
# The device {device}. Paths are relative to this file. All other keys, each with its comment, are in
# deploy/device.toml of the project; an unknown one stops edge-runtime with a line that names it.

# Keys, journal and outbox of this device. Made on first use, for this user only. Never copy it.
state_folder = "state"

[broker]
url = {url}
ca_file = "ca.crt"
cert_file = "client.crt"
key_file = "client.key"

[data]
# Your samples: a file of numpy.savez with the arrays x and y. A folder, CSV, SQLite, a function: see there.
source = "train.npz"
"""

_README = """\
# {device}, a device of {federation}

This folder is a secret until the device is enrolled: hand it over like a password, to one device, and delete other
copies. Put it where the device may keep it, name your samples in `device.toml` (`[data]`), then:

    edge-runtime enroll --config device.toml --device {device} --token-file token.txt
    edge-runtime run --config device.toml

The first needs the operator's `aggregator registrar serve`; afterwards `token.txt` is of no use and may be deleted.

| file | what | secret |
|---|---|---|
| `token.txt` | enrols one key under the name {device}, once | until it is used |
| `ca.crt` | the authority whose broker is to be trusted | |
| `client.crt`, `client.key` | let this device through the broker's TLS, for {days} days | the key |
| `device.toml` | settings | |

`client.key` was made on the operator's machine, so the operator could connect to the broker as {device}. That is
all it opens: what the device says is signed with a key that `enroll` makes here, in `state/`, and never leaves it.
"""

_RENEWAL = """\
# {device}: new TLS files

Good for {days} days. Put `ca.crt`, `client.crt` and `client.key` in place of the old ones that `device.toml` names,
and start `edge-runtime run` again. The device stays enrolled; the old certificate stays good until its own end.
"""
