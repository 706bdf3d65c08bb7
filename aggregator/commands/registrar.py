"""``aggregator registrar``: what the holder of the root key does."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_runtime.command_line import OptionError, parsed, stopped_by_signal
from edge_runtime.protocol.ids import DeviceId, device_id

if TYPE_CHECKING:
    from aggregator.registrar import Registrar

registrar_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""The root of trust: certifies devices and aggregators. `aggregator init` makes its folder.

    Next: `aggregator registrar serve` while devices enrol; `aggregator registrar tls` first, for a broker that asks
    for certificates.""",
)
MAX_EXPIRES_H = 10 * 365 * 24
BrokerUrl = Annotated[str, typer.Option("--broker", help="mqtt://host:port, or mqtts:// for TLS.")]
RegistrarFolder = Annotated[Path, typer.Option("--folder", help="The registrar's folder, with the root key.")]
Days = Annotated[int, typer.Option(help="Days until the TLS certificates end; the same command renews them.")]
DEFAULT_DAYS = 730


def checked_expiry_h(expires_h: float) -> float:
    """Hours for which a token is good. Raises FleetgradError."""
    if not 0 < expires_h <= MAX_EXPIRES_H:
        raise OptionError(f"--expires-h {expires_h:g}: more than 0 and at most {MAX_EXPIRES_H} hours")
    return expires_h


@registrar_app.command("serve")
def registrar_serve(
    folder: RegistrarFolder,
    broker: BrokerUrl,
    ca_file: Annotated[
        Path | None,
        typer.Option(help="Whom to trust (PEM). With mqtts:// our own TLS authority, if there is one."),
    ] = None,
    cert_file: Annotated[
        Path | None, typer.Option(help="Who we are (PEM); from --folder by default.")
    ] = None,
    key_file: Annotated[Path | None, typer.Option(help="The key of --cert-file (PEM).")] = None,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="The log as JSON, one object per line.")
    ] = False,
) -> None:
    """Answer enrolment requests until Ctrl-C. Only needed while devices enrol.

    Next: `aggregator enroll-token` or `aggregator registrar kit` for each device, and `edge-runtime enroll` there.
    """
    from aggregator.monitoring.logs import structured_logs
    from edge_runtime.transport.address import parse_broker_url
    from edge_runtime.transport.mqtt import MqttOptions, MqttTransport

    with (
        _opened(folder) as authority,
        structured_logs(as_json=log_json, federation=authority.federation, libraries=logging.INFO),
    ):
        files = (ca_file, cert_file, key_file)
        if files == (None, None, None) and broker.startswith("mqtts:"):
            files = authority.tls_files() or files
        options = MqttOptions(
            address=parse_broker_url(broker, ca_file=files[0], cert_file=files[1], key_file=files[2]),
            client_id=f"fleetgrad-{authority.federation}-registrar",
        )
        transport = MqttTransport(options)
        transport.open(10.0)
        try:
            typer.echo(f"the registrar of {authority.federation} answers on {options.address.url}")
            authority.serve(transport, stopped_by_signal())
        finally:
            transport.close()


@registrar_app.command("devices")
def registrar_devices(folder: RegistrarFolder) -> None:
    """List the certified devices: key, whether it was revoked, and when the newest TLS certificate ends.

    What they do: `aggregator status`.
    """
    with _opened(folder) as authority:
        ends = {row.name: row.not_after for row in authority.tls_certificates() if row.revoked_at is None}
        devices = {row.device: row for row in authority.devices()}
        for name in sorted(devices.keys() | ends.keys()):
            row, end = devices.get(DeviceId(name)), ends.get(name)
            role = "a role" if name.startswith("@") else "not enrolled"
            words = [name, role if row is None else row.signing_key.hex()]
            if row is not None and row.revoked_at is not None:
                words.append(f"revoked {_day(row.revoked_at)}")
            if end is not None:
                words.append(f"TLS {'ended' if end < time.time() else 'until'} {_day(end)}")
            typer.echo("  ".join(words))
        if not devices:
            typer.echo("no device has enrolled yet: `aggregator enroll-token` makes what one needs")


@registrar_app.command("tls")
def registrar_tls(
    folder: RegistrarFolder,
    host: Annotated[
        list[str], typer.Option(help="Name or IP address by which clients reach the broker; may be repeated.")
    ],
    out: Annotated[Path, typer.Option(help="A folder: broker/ and aggregator/ go into it.")],
    days: Days = DEFAULT_DAYS,
    observer: Annotated[
        bool, typer.Option("--observer", help="Also observer/, for a dashboard that only looks.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there: renewal.")] = False,
) -> None:
    """Make the TLS authority, and certificates for broker, aggregator and registrar; later: renew them.

    Next: `aggregator broker-config mosquitto` for the broker, `aggregator registrar kit` for each device.
    """
    from aggregator.access import Role
    from aggregator.registrar import kit
    from aggregator.registrar.folder import check_writable, write_folder

    now = time.time()
    roles = {"aggregator": Role.AGGREGATOR} | ({"observer": Role.OBSERVER} if observer else {})
    with _opened(folder) as authority:
        for name in ("broker", *roles):
            check_writable(out / name, force=force, otherwise=", or renew what is in it with --force")
        authority.set_up_tls(now, days)
        write_folder(out / "broker", kit.broker_files(authority, host, now, days), force=force)
        for name, role in roles.items():
            write_folder(out / name, kit.client_files(authority, role, now, days), force=force)
        typer.echo(
            f"{out}: certificates for {days} days, for the broker at {', '.join(host)}\n"
            f"next: aggregator broker-config mosquitto --federation {authority.federation} --out {out / 'broker'}\n"
            f'      in aggregator.toml, [broker]: url = "mqtts://{host[0]}:8883",\n'
            + "".join(
                f'          {key} = "{(out / "aggregator" / name).resolve()}"\n'
                for key, name in (
                    ("ca_file", kit.CA),
                    ("cert_file", kit.CLIENT_CERTIFICATE),
                    ("key_file", kit.CLIENT_KEY),
                )
            )
            + f"      aggregator registrar kit --folder {folder} --broker mqtts://{host[0]}:8883 --device NAME "
            "--out kit"
        )


@registrar_app.command("kit")
def registrar_kit(
    folder: RegistrarFolder,
    device: Annotated[str, typer.Option(help="The device's name: 1-48 of a-z 0-9 _ -.")],
    broker: Annotated[str, typer.Option(help="What the device can reach: mqtts://host:port.")],
    out: Annotated[Path, typer.Option(help="A new folder to hand over.")],
    days: Days = DEFAULT_DAYS,
    expires_h: Annotated[float, typer.Option(help="Hours until the token in it expires.")] = 24.0,
) -> None:
    """One folder for the engineer of a device: token, TLS files, device.toml and what to do with them.

    For a device that is enrolled already: new TLS files only. Next, on the device: `edge-runtime enroll`, while
    `aggregator registrar serve` runs.
    """
    from aggregator.registrar import kit
    from aggregator.registrar.folder import check_writable, write_folder

    lifetime_s = checked_expiry_h(expires_h) * 3600
    now = time.time()
    with _opened(folder) as authority:
        check_writable(out, force=False)
        files = kit.device_kit(authority, parsed(device_id, device), broker, now, days, int(now + lifetime_s))
        write_folder(out, files)
    secret = "client.key" + (", and token.txt until it is used" if "token.txt" in files else "")
    typer.echo(f"{out} is for {device}; secret in it: {secret}. What to do is in its README.md")


@registrar_app.command("revoke")
def registrar_revoke(
    folder: RegistrarFolder,
    device: Annotated[str, typer.Option(help="Its name; @aggregator or another role: its TLS files only.")],
) -> None:
    """Void a device's certificate, TLS certificates and unused tokens. Its key is never certified again.

    Next: bring the printed files to `aggregator serve` and to the broker. The name may enrol again, with a new key.
    """
    with _opened(folder) as authority:
        revoked = authority.revoke(device, time.time())
        if revoked.nothing:
            typer.echo(f"nothing of {device} was in force any more; the files are as they should be")
        else:
            certificate = (
                "no certificate" if revoked.epoch is None else f"its certificate (epoch {revoked.epoch})"
            )
            typer.echo(
                f"revoked of {device}: {certificate}, TLS certificates {revoked.tls_certificates}, "
                f"unused tokens {revoked.tokens}"
            )
        typer.echo(
            f"for the aggregator, at the place its revocations_file names: {authority.revocations_file}"
        )
        if authority.tls_files() is not None:
            typer.echo(
                f"for the broker, over its revoked.crl, then reload it (kill -HUP): {authority.crl_file}"
            )


@registrar_app.command("certify")
def registrar_certify(
    folder: RegistrarFolder,
    signing_key: Annotated[str, typer.Option(help="The aggregator's Ed25519 public key, hex.")],
    sealing_key: Annotated[str, typer.Option(help="The aggregator's X25519 public key, hex.")],
    out: Annotated[Path, typer.Option(help="The certificate file to write.")],
    generation: Annotated[int, typer.Option(help="The ledger's generation.")] = 1,
    first_round: Annotated[int, typer.Option(help="The first round it is good for.")] = 0,
    last_round: Annotated[int, typer.Option(help="And the last.")] = 1_000_000,
) -> None:
    """Certify an aggregator's keys, for a new machine, a rotation, or after a restore from a backup.

    Next: name the file as certificate_file in aggregator.toml, and start `aggregator serve` again.
    """
    from aggregator.setup import write_certificate

    with _opened(folder) as authority:
        keys = (_hex_key(signing_key), _hex_key(sealing_key))
        write_certificate(out, authority.certify_aggregator(*keys, generation, first_round, last_round))
    typer.echo(f"{out} certifies generation {generation}, rounds {first_round}..{last_round}")


@contextmanager
def _opened(folder: Path) -> Iterator[Registrar]:
    from aggregator import registrar

    authority = registrar.open(folder)
    try:
        yield authority
    finally:
        authority.close()


def _day(unix_s: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(unix_s))


def _hex_key(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise OptionError(f"{text[:80]!r} is no key: 64 hex digits are expected") from None
