"""Configuration of a mosquitto for one federation: mutual TLS, and an ACL from the table of kinds."""

from __future__ import annotations

import ipaddress
from itertools import groupby
from pathlib import Path

from aggregator.access import Action, Role, kept_from, rules
from aggregator.files import make_private_folder, write_atomic
from edge_runtime.protocol.chunks import DEFAULT_CHUNK_BYTES
from edge_runtime.protocol.envelope import OVERHEAD_BYTES
from edge_runtime.protocol.errors import Fault, FleetgradError
from edge_runtime.protocol.ids import FederationId

CONFIG_FILE = "mosquitto.conf"
ACL_FILE = "acl"
DATA_FOLDER = "data"
TLS_FILES = ("ca.crt", "broker.crt", "broker.key", "revoked.crl")  # as `aggregator registrar tls` names them
DEFAULT_PORT = 8883
_LEAST_PACKET_BYTES = 1 << 20


class BrokerConfigError(
    FleetgradError, fault=Fault.OPERATOR, remedy="choose another --out, port or address, as the text says"
):
    """The broker's configuration cannot be written as asked."""


def acl_text(federation: FederationId) -> str:
    """mosquitto's ACL file. What it does not allow is refused."""
    lines = [
        f"# Who may write and read what in {federation}. Made by `aggregator broker-config mosquitto` from",
        "# the table of kinds: make it again rather than change it. %u is the common name of the certificate.",
        "",
        "# A device: what carries its own name, and what is for all. (mosquitto warns of patterns without %u: here",
        "# they are meant.)",
    ]
    for role, group in groupby(rules(federation), key=lambda rule: rule.role):
        if role is not Role.DEVICE:
            lines += [
                "",
                f"user {role.value}",
                "# what a pattern above would allow: patterns are for every user",
            ]
            lines += [f"topic deny {pattern}" for pattern in kept_from(role, federation)]
        for rule in group:
            word = "pattern" if role is Role.DEVICE else "topic"
            lines += [f"# {rule.why}", f"{word} {_ACCESS[rule.action]} {rule.pattern}"]
    return "\n".join(lines) + "\n"


_ACCESS = {Action.WRITE: "write", Action.READ: "read"}


def config_text(
    federation: FederationId,
    folder: Path,
    *,
    port: int = DEFAULT_PORT,
    bind: str | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> str:
    """mosquitto.conf, for files in ``folder`` on the broker's machine; ``bind``: one IP address, None for all.

    ``chunk_bytes``: of the aggregator's settings; packets are a little larger. Raises BrokerConfigError.
    """
    if not 1 <= port <= 65_535:
        raise BrokerConfigError(f"port {port} is not between 1 and 65535")
    if bind is not None:
        try:
            ipaddress.ip_address(bind)
        except ValueError:
            raise BrokerConfigError(f"{bind[:80]!r} is no IP address to listen on") from None
    if any(ord(character) < 32 for character in str(folder)):
        raise BrokerConfigError(f"the folder has a control character in its name: {str(folder)!r}")
    packet_bytes = max(_LEAST_PACKET_BYTES, chunk_bytes + OVERHEAD_BYTES)
    ca, certificate, key, crl = (folder / name for name in TLS_FILES)
    return f"""\
# mosquitto 2 for the federation {federation}. Made by `aggregator broker-config mosquitto`.
# Start:                 mosquitto -c {folder / CONFIG_FILE}
# After a revocation:    copy the new revoked.crl over the one here, then `kill -HUP` (systemctl reload mosquitto).
# Started by root, mosquitto becomes the user `mosquitto`, who must be able to read all files named here and to
# write in {DATA_FOLDER}/:      chown -R mosquitto: {folder}
# and to enter every folder above: not below one that is closed to others, such as that of `aggregator init`.

# --- Who gets in ------------------------------------------------------------------------------------------------
# One port, TLS on both sides. `aggregator registrar tls` made these files; the same authority signs the clients'.
listener {port}{"" if bind is None else f" {bind}"}
tls_version tlsv1.2
cafile {ca}
certfile {certificate}
keyfile {key}
# Certificates that were taken back. Only a new connection is checked: one that stands stays until it ends.
crlfile {crl}
require_certificate true
# The common name of a certificate is the user name, and the client id too, so that nobody can throw another client
# out, or take over what waits for it, by taking its id. Two connections with one certificate throw each other out.
use_identity_as_username true
use_username_as_clientid true
allow_anonymous false

# --- Who may say and hear what ----------------------------------------------------------------------------------
# Subscribing is always answered with yes; what the ACL does not allow to read is not delivered.
acl_file {folder / ACL_FILE}

# --- Sizes and limits -------------------------------------------------------------------------------------------
# Largest packet: `chunk_bytes` of aggregator.toml ({chunk_bytes}) and {OVERHEAD_BYTES} bytes more must fit.
max_packet_size {packet_bytes}
# As good as no limit on messages that wait for a client: at a limit mosquitto drops them and the publisher never
# hears of it. (0 means no limit too, but makes mosquitto 2.0.11 hang up on whomever it refuses a publish.)
max_queued_messages 1000000000
# Small messages (receipts, acknowledgements) leave at once.
set_tcp_nodelay true

# --- What survives ----------------------------------------------------------------------------------------------
# Sessions and retained messages go to disk on SIGTERM and every autosave_interval seconds; kill -9 or a power cut
# loses what came after. Nothing of worth is lost by that: whoever has no signed receipt sends again.
persistence true
persistence_location {folder / DATA_FOLDER}/
autosave_interval 60
# Forget devices that have not been seen for so long, with all that waits for them.
persistent_client_expiration 14d

# --- Log --------------------------------------------------------------------------------------------------------
log_dest stderr
log_type error
log_type warning
log_type notice
log_timestamp_format %Y-%m-%dT%H:%M:%S
"""


def write_config(
    folder: Path,
    federation: FederationId,
    *,
    path: Path | None = None,
    port: int = DEFAULT_PORT,
    bind: str | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    force: bool = False,
) -> tuple[Path, list[str]]:
    """Write mosquitto.conf, acl and an empty data folder; the first's path, and which TLS files are not there yet.

    ``path``: where the folder will lie on the broker's machine; None: where it is. Others as ``config_text``.
    Raises BrokerConfigError: a file exists and ``force`` is not set; nothing is written then.
    """
    installed = folder.resolve() if path is None else path
    text = config_text(federation, installed, port=port, bind=bind, chunk_bytes=chunk_bytes)
    present = [name for name in (CONFIG_FILE, ACL_FILE) if (folder / name).exists()]
    if present and not force:
        raise BrokerConfigError(f"{' and '.join(present)} exist in {folder}: --force replaces them")
    make_private_folder(folder)
    make_private_folder(folder / DATA_FOLDER)
    write_atomic(folder / ACL_FILE, acl_text(federation).encode(), mode=0o600)
    write_atomic(folder / CONFIG_FILE, text.encode(), mode=0o644)
    return folder / CONFIG_FILE, [name for name in TLS_FILES if not (folder / name).exists()]
