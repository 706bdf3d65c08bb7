"""``aggregator``: set up, enrol devices, serve rounds, look, and take the model home."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from edge_runtime.command_line import json_report, run_program, stopped_by_signal, text_report
from edge_runtime.protocol.errors import FleetgradError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="""Run a federation: devices train, this sums their encrypted updates exactly once, whatever dies.

    First `aggregator init`, then `aggregator registrar serve` while devices enrol with tokens of
    `aggregator enroll-token`, then `aggregator serve`. It needs a broker: `aggregator broker` starts one.""",
)
registrar_app = typer.Typer(
    no_args_is_help=True, help="The root of trust: certifies devices and aggregators."
)
app.add_typer(registrar_app, name="registrar")

MAX_EXPIRES_H = 10 * 365 * 24
ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The file that `aggregator init` wrote.")]
BrokerUrl = Annotated[str, typer.Option("--broker", help="mqtt://host:port, or mqtts:// for TLS.")]
RegistrarFolder = Annotated[Path, typer.Option("--folder", help="The registrar's folder, with the root key.")]


@app.command()
def init(
    folder: Annotated[Path, typer.Option(help="A new folder for settings, keys and state.")],
    federation: Annotated[str, typer.Option(help="The federation's name: 1-48 of a-z 0-9 _ -.")],
    artifact: Annotated[Path, typer.Option(help="The folder that `model-export build` wrote.")],
    broker: BrokerUrl = "mqtt://127.0.0.1:1883",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, as section.key=value; may be repeated.")
    ] = None,
) -> None:
    """Make keys, a registrar and a commented aggregator.toml, all in one new folder.

    Next: `aggregator registrar serve` and `aggregator enroll-token` for each device, then `aggregator serve`.
    """
    from aggregator.setup import initialise

    path = initialise(folder, federation, artifact, broker, settings or [])
    typer.echo(
        f"{path} is ready; the root key is in {folder / 'registrar'}: back it up, and move that folder to another "
        "machine if devices are to be certified elsewhere.\n"
        f"next: aggregator registrar serve --folder {folder / 'registrar'} --broker {broker}\n"
        f"      aggregator enroll-token --folder {folder / 'registrar'} --broker {broker} > token.txt\n"
        f"      aggregator serve --config {path}"
    )


@app.command("enroll-token")
def enroll_token(
    folder: RegistrarFolder,
    broker: BrokerUrl,
    device: Annotated[str | None, typer.Option(help="The only device name it is good for.")] = None,
    expires_h: Annotated[float, typer.Option(help="Hours until it expires.")] = 24.0,
) -> None:
    """Print one token, good for enrolling one device once. It is a secret: hand it over like a password.

    Next, on the device: `edge-runtime enroll`, while `aggregator registrar serve` runs.
    """
    from aggregator import registrar

    if not 0 < expires_h <= MAX_EXPIRES_H:
        raise FleetgradError(f"--expires-h {expires_h:g}: more than 0 and at most {MAX_EXPIRES_H} hours")

    authority = registrar.open(folder)
    try:
        token = authority.new_token(broker, int(time.time() + expires_h * 3600), device)
    finally:
        authority.close()
    typer.echo(token.encode())


@app.command()
def serve(
    config: ConfigFile,
    until_finished: Annotated[
        bool, typer.Option("--until-finished", help="Exit when all rounds of the settings are done.")
    ] = False,
    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over",
            help="Fence off an aggregator that is gone for good; if it only hangs, kill it first.",
        ),
    ] = False,
    log_json: Annotated[bool, typer.Option("--log-json", help="One JSON object per line on stdout.")] = False,
) -> None:
    """Open rounds and aggregate them. Killed at any moment and started again, it goes on where it was.

    Meanwhile `aggregator status` shows what happens; `aggregator export-model` takes any version home.
    """
    from aggregator.config import load_aggregator_config
    from aggregator.service import Service

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    report = json_report() if log_json else text_report()
    with Service(config=load_aggregator_config(config), report=report, take_over=take_over) as service:
        service.run(should_stop=stopped_by_signal(), until_finished=until_finished)


@app.command()
def status(
    config: ConfigFile,
    as_json: Annotated[bool, typer.Option("--json", help="All of it as one JSON document.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the whole ledger and check that it is consistent.")
    ] = False,
) -> None:
    """Versions, rounds, devices and refusals, read from the ledger; works while `serve` runs.

    Next: `aggregator export-model` for a version worth having.
    """
    from aggregator.config import load_aggregator_config
    from aggregator.status import collect, render

    document = collect(load_aggregator_config(config), verify=verify)
    if as_json:
        typer.echo(json.dumps(document, indent=1))
    else:
        render(document)


@app.command("export-model")
def export_model(
    config: ConfigFile,
    out: Annotated[Path, typer.Option(help="Where model.onnx and model.npz go.")],
    version: Annotated[int | None, typer.Option(help="Which version; the newest by default.")] = None,
) -> None:
    """Copy a version: model.onnx for stock ONNX Runtime, model.npz for torch by parameter name.

    Next: `onnxruntime.InferenceSession`, or `load_state_dict` of the arrays. Versions: `aggregator status`.
    """
    from aggregator.config import load_aggregator_config
    from aggregator.service import open_ledger, open_versions

    loaded = load_aggregator_config(config)
    ledger = open_ledger(loaded, read_only=True)
    try:
        known = [row.version for row in ledger.versions()]
    finally:
        ledger.close()
    wanted = version if version is not None else max(known, default=0)
    if wanted not in known:
        raise FleetgradError(f"there is no version {wanted}; there are {len(known)}, numbered from 1")
    for path in open_versions(loaded).export(wanted, out):
        typer.echo(str(path))


@app.command()
def broker(
    folder: Annotated[Path, typer.Option(help="Where the broker keeps its state and log.")],
    port: Annotated[int, typer.Option(help="TCP port; 0 picks a free one.")] = 1883,
    bind: Annotated[
        str, typer.Option(help="Address to listen on; others than loopback need a password file.")
    ] = ("127.0.0.1"),
    password_file: Annotated[Path | None, typer.Option(help="Of mosquitto_passwd.")] = None,
    url_file: Annotated[
        Path | None, typer.Option(help="Write the broker's URL here once it listens.")
    ] = None,
) -> None:
    """Run a broker in the foreground: mosquitto if it is installed, else a Python one for trying things out.

    Next, in another terminal: `aggregator init --broker URL` with the URL it prints.
    """
    from aggregator.broker import run_broker_in_foreground

    sys.exit(
        run_broker_in_foreground(
            folder, port=port, bind=bind, password_file=password_file, url_file=url_file, echo=typer.echo
        )
    )


@registrar_app.command("serve")
def registrar_serve(folder: RegistrarFolder, broker: BrokerUrl) -> None:
    """Answer enrolment requests until Ctrl-C. Only needed while devices enrol.

    Next: `aggregator enroll-token` for each device, and `edge-runtime enroll` there.
    """
    from aggregator import registrar
    from edge_runtime.transport.address import parse_broker_url
    from edge_runtime.transport.mqtt import MqttOptions, MqttTransport

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    authority = registrar.open(folder)
    try:
        options = MqttOptions(
            address=parse_broker_url(broker), client_id=f"fleetgrad-{authority.federation}-registrar"
        )
        transport = MqttTransport(options)
        transport.open(10.0)
        try:
            typer.echo(f"the registrar of {authority.federation} answers on {options.address.url}")
            authority.serve(transport, stopped_by_signal())
        finally:
            transport.close()
    finally:
        authority.close()


@registrar_app.command("devices")
def registrar_devices(folder: RegistrarFolder) -> None:
    """List the devices that were certified, with their keys; `aggregator status` tells what they do."""
    from aggregator import registrar

    authority = registrar.open(folder)
    try:
        for row in authority.devices():
            typer.echo(f"{row.device}  {row.signing_key.hex()}")
    finally:
        authority.close()


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
    from aggregator import registrar
    from aggregator.setup import write_certificate

    authority = registrar.open(folder)
    try:
        keys = (_hex_key(signing_key), _hex_key(sealing_key))
        write_certificate(out, authority.certify_aggregator(*keys, generation, first_round, last_round))
    finally:
        authority.close()
    typer.echo(f"{out} certifies generation {generation}, rounds {first_round}..{last_round}")


def _hex_key(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise FleetgradError(f"{text[:80]!r} is no key: 64 hex digits are expected") from None


def main() -> None:
    """The console script."""
    run_program("aggregator", app)


if __name__ == "__main__":
    main()
