"""``edge-runtime``: enrol this machine as a device, and take part in training."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from edge_runtime.command_line import json_report, run_program, stopped_by_signal, text_report
from edge_runtime.config import DeviceConfig, load_device_config, read_seed_file
from edge_runtime.protocol import topics
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.enrol_token import EnrolToken
from edge_runtime.protocol.errors import FleetgradError, RemoteProtocolError
from edge_runtime.protocol.ids import DeviceId, device_id
from edge_runtime.store import DeviceStore, Enrolment
from edge_runtime.transport.base import Will
from edge_runtime.transport.mqtt import MqttOptions, MqttTransport

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="""Train shared models on this machine's own data; only compressed, encrypted updates leave it.

    First `edge-runtime enroll` once, with a token from the operator, then `edge-runtime run`.
    A commented device.toml is in deploy/device.toml.""",
)
ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="This device's settings, a TOML file.")]


@app.command()
def enroll(
    config: ConfigFile,
    device: Annotated[str, typer.Option(help="The name of this device: 1-48 of a-z 0-9 _ -.")],
    token_file: Annotated[
        Path,
        typer.Option(help="File with the token of `aggregator enroll-token`; - reads it from the terminal."),
    ],
    timeout_s: Annotated[float, typer.Option(help="How long to wait for the registrar's answer.")] = 60.0,
) -> None:
    """Make this machine's key, and have the registrar certify it. A token is good for one device.

    Next: `edge-runtime run --config device.toml`.
    """
    from edge_runtime.enrolment import enrol

    settings = load_device_config(config)
    text = sys.stdin.readline() if str(token_file) == "-" else _read_text(token_file)
    token = EnrolToken.parse(text)
    name = _device(device)
    with DeviceStore(settings.state_folder) as store:
        key = store.signing_key(lambda: CRYPTO.generate_signing_key(os.urandom(32)))
        options = MqttOptions(
            address=settings.broker.address(token.broker_url), client_id=f"fleetgrad-enrol-{token.token_id}"
        )
        transport = MqttTransport(options)
        transport.open(min(timeout_s, 30.0))
        try:
            enrolled = enrol(transport, token, name, key, CRYPTO, os.urandom, time.monotonic, timeout_s)
        finally:
            transport.close()
        store.enrol(
            Enrolment(
                federation=enrolled.federation,
                device=name,
                broker_url=enrolled.broker_url,
                root_key=enrolled.root,
                certificate=enrolled.certificate,
            )
        )
    typer.echo(
        f"{name} is enrolled in {enrolled.federation}; start it with: edge-runtime run --config {config}"
    )


@app.command()
def run(
    config: ConfigFile,
    until_finished: Annotated[
        bool, typer.Option("--until-finished", help="Exit when the federation has made its last version.")
    ] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="One JSON object per line on stdout, for machines.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every step of training.")] = False,
) -> None:
    """Take part: check in, train when selected, send the update until its receipt is here. Ctrl-C stops cleanly.

    Needs `edge-runtime enroll` once before. Killed and started again, it goes on with what it had promised.
    """
    # Imported here: `--help` and `enroll` need no training runtime.
    from edge_runtime.backends.ort import OrtBackend
    from edge_runtime.data import check_source
    from edge_runtime.runtime import OFFLINE, NotEnrolled, Runtime

    logging.basicConfig(level=logging.DEBUG if verbose else logging.WARNING, stream=sys.stderr)
    settings = load_device_config(config)
    check_source(settings.data.source)
    with DeviceStore(settings.state_folder) as store:
        enrolment = store.enrolment
        if enrolment is None:
            raise NotEnrolled(settings.state_folder)
        will = Will(topic=topics.presence(enrolment.federation, enrolment.device), payload=OFFLINE)
        options = MqttOptions(
            address=settings.broker.address(enrolment.broker_url),
            client_id=f"fleetgrad-{enrolment.federation}-{enrolment.device}",
            will=will,
        )
        backend = OrtBackend()
        runtime = Runtime(
            config=settings,
            store=store,
            transport=MqttTransport(options),
            backend=backend,
            runtime_name=backend.runtime(),
            provider=CRYPTO,
            clock=time.monotonic,
            entropy=os.urandom,
            seed=_seed(settings, store),
            report=json_report(device=enrolment.device) if log_json else text_report(),
        )
        runtime.run(should_stop=stopped_by_signal(), until_finished=until_finished)


def _seed(settings: DeviceConfig, store: DeviceStore) -> bytes:
    file = settings.training.seed_file
    return read_seed_file(file) if file is not None else store.seed(os.urandom)


def _device(name: str) -> DeviceId:
    try:
        return device_id(name)
    except RemoteProtocolError as error:
        raise FleetgradError(error.detail) from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError as error:
        raise FleetgradError(f"{path} cannot be read: {error.strerror}") from error


def main() -> None:
    """The console script."""
    run_program("edge-runtime", app)


if __name__ == "__main__":
    main()
