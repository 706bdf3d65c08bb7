"""Where the broker is and how we prove who we are: ``mqtt://[user[:password]@]host[:port]``, ``mqtts://``."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from edge_runtime.transport.base import TransportError

PASSWORD_VARIABLE = "FLEETGRAD_MQTT_PASSWORD"  # noqa: S105 - the name of a variable, no password
_DEFAULT_PORT = {"mqtt": 1883, "mqtts": 8883}


@dataclass(frozen=True, kw_only=True)
class BrokerAddress:
    """A parsed broker URL; the password neither prints nor compares. Make it with ``parse_broker_url``."""

    host: str
    port: int
    tls: ssl.SSLContext | None = field(default=None, repr=False, compare=False)
    username: str | None = None
    password: str | None = field(default=None, repr=False, compare=False)

    @property
    def url(self) -> str:
        """The URL without credentials, for logs."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"


def parse_broker_url(
    url: str,
    *,
    password: str | None = None,
    ca_file: Path | None = None,
    cert_file: Path | None = None,
    key_file: Path | None = None,
) -> BrokerAddress:
    """A broker URL and, for ``mqtts``, PEM files: ``ca_file`` (None: the system's), client certificate and its key.

    ``password`` (see ``read_password``) overrides one inside the URL. Raises TransportError: a malformed URL, files
    that are missing or do not fit, TLS files with ``mqtt://``. No text of it repeats a password.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise TransportError(f"the broker URL has a bad host or port ({_FORM})") from error
    if parts.scheme not in _DEFAULT_PORT:
        instead = f", not {parts.scheme[:20]!r}" if parts.scheme else ""
        raise TransportError(f"a broker URL begins with mqtt:// or mqtts://{instead} ({_FORM})")
    if not parts.hostname:
        raise TransportError(f"the broker URL names no host ({_FORM})")
    if port == 0:
        raise TransportError(f"port 0 of the broker URL is no port ({_FORM})")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise TransportError(f"the broker URL ends after the port ({_FORM})")
    username, inline = _credentials(parts)
    secret = inline if password is None else password
    if secret is not None and username is None:
        raise TransportError(
            "a broker password was given, but the broker URL names no user (mqtt://user@host)"
        )
    tls_files = [str(path) for path in (ca_file, cert_file, key_file) if path is not None]
    if parts.scheme == "mqtt" and tls_files:
        raise TransportError(f"TLS files ({', '.join(tls_files)}) have no effect on mqtt://: write mqtts://")
    return BrokerAddress(
        host=parts.hostname,
        port=port or _DEFAULT_PORT[parts.scheme],
        tls=_tls_context(ca_file, cert_file, key_file) if parts.scheme == "mqtts" else None,
        username=username,
        password=secret,
    )


def read_password(file: Path | None, environ: Mapping[str, str]) -> str | None:
    """The broker password: first line of ``file``, else the variable FLEETGRAD_MQTT_PASSWORD, else None.

    Raises TransportError if the file cannot be read or is empty.
    """
    if file is None:
        return environ.get(PASSWORD_VARIABLE) or None
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise TransportError(f"cannot read the broker password from {file}: {reason}") from error
    if not lines or not lines[0]:
        raise TransportError(f"the broker password file {file} is empty")
    return lines[0]


_FORM = "expected mqtt://[user[:password]@]host[:port] or mqtts://..."


def _credentials(parts: SplitResult) -> tuple[str | None, str | None]:
    if parts.username == "":
        raise TransportError(f"the broker URL has an @ but no user name ({_FORM})")
    username = None if parts.username is None else unquote(parts.username)
    return username, None if parts.password is None else unquote(parts.password)


def _tls_context(ca_file: Path | None, cert_file: Path | None, key_file: Path | None) -> ssl.SSLContext:
    if key_file is not None and cert_file is None:
        raise TransportError(f"the key {key_file} was given without its certificate")
    try:
        context = ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
    except OSError as error:
        raise TransportError(f"cannot use {ca_file} as CA certificates: {_why(error)}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cert_file is not None:
        try:
            # Without a password callback OpenSSL would ask on the terminal, and a service would hang.
            context.load_cert_chain(cert_file, key_file, password=lambda: b"")
        except OSError as error:
            files = f"{cert_file} with key {key_file or cert_file}"
            raise TransportError(f"cannot use {files}: {_why(error)}") from error
    return context


def _why(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return f"not PEM, encrypted, or the two do not belong together ({error.reason or 'unreadable'})"
    return error.strerror or str(error)
