"""``edge-runtime``: enrol this machine as a device, and take part in training."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from edge_runtime.command_line import (
    FAILED,
    OptionError,
    json_report,
    parsed,
    run_program,
    stopped_by_signal,
    text_report,
)
from edge_runtime.config import DeviceConfig, load_device_config, read_seed_file
from edge_runtime.protocol import topics
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.enrol_token import EnrolToken
from edge_runtime.protocol.ids import device_id
from edge_runtime.store import DeviceStore, Enrolment
from edge_runtime.transport.base import Will
from edge_runtime.transport.mqtt import MqttOptions, MqttTransport

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Train shared models on this machine's own data; only compressed, encrypted updates leave it.

    First `edge-runtime enroll` once, with a token from the operator, then `edge-runtime run`. `edge-runtime status`
    tells what it is doing, `edge-runtime doctor` what keeps it from doing so, and what helps.
    A commented device.toml is in deploy/device.toml.""",
)
_COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red", "unknown": "dim"}
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

    The key never leaves the state folder. Without an answer the token stays good: see `edge-runtime doctor`.
    Next: `edge-runtime run --config device.toml`.
    """
    from edge_runtime.enrolment import enrol

    settings = load_device_config(config)
    token = EnrolToken.parse(_read_token(token_file))
    name = parsed(device_id, device)
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
    It trains when the [policy] of device.toml permits: `edge-runtime status` tells whether it does now.
    """
    # Imported here: `--help` and `enroll` need no training runtime.
    from edge_runtime.backends.ort import OrtBackend
    from edge_runtime.data import check_source
    from edge_runtime.runtime import OFFLINE, NotEnrolled, Runtime

    logging.basicConfig(level=logging.DEBUG if verbose else logging.WARNING, stream=sys.stderr)
    settings = load_device_config(config)
    check_source(settings.data.origin)
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


@app.command()
def status(
    config: ConfigFile,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout, for machines.")
    ] = False,
) -> None:
    """Who this device is, what it waits for, and whether it may train now. Disturbs no running `edge-runtime run`.

    Reads the state folder and the machine only, not the network: for that see `edge-runtime doctor`.
    """
    from edge_runtime import device_status

    found = device_status.collect(load_device_config(config), CRYPTO, datetime.now())
    if as_json:
        typer.echo(json.dumps(device_status.to_document(found)))
        return
    for name, text in device_status.to_lines(found):
        _print_line((f"{name:11}", "bold"), (text, ""))


@app.command()
def doctor(
    config: ConfigFile,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="Before enrolling: the token, which names the broker; - reads it from the terminal."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout, for machines.")
    ] = False,
) -> None:
    """Look for what could keep this device from taking part, and say what helps. Changes nothing.

    Installation, settings, data, clock, disk, memory, heat, identity, and the way to the broker step by step.
    Exit code 1 if there is a problem; warnings and unknowns are none. Next: `edge-runtime enroll`, or
    `edge-runtime run` once it is enrolled.
    """
    from edge_runtime.backends.ort import OrtBackend
    from edge_runtime.doctor import Examination, Outcome

    logging.basicConfig(level=logging.CRITICAL)  # what went wrong is in the findings
    examination = Examination(
        config_file=config,
        token=None if token_file is None else _read_token(token_file),
        provider=CRYPTO,
        import_runtime=OrtBackend().runtime,
        entropy=os.urandom,
    )
    found = []
    for check in examination.checks():
        found.append(check)
        if not as_json:
            outcome = check.outcome.value
            _print_line(
                (f"{outcome:8}", _COLOURS[outcome]), (f"{check.name:19}", "bold"), (check.finding, "")
            )
            if check.remedy:
                _print_line((" " * 28, ""), (f"-> {check.remedy}", ""))
    problems = sum(check.outcome is Outcome.PROBLEM for check in found)
    if as_json:
        typer.echo(json.dumps({"problems": problems, "checks": [check.to_document() for check in found]}))
    if problems:
        raise typer.Exit(FAILED)


def _print_line(*parts: tuple[str, str]) -> None:
    """(text, style) side by side; long lines are not broken, so that a command in them can be copied."""
    from rich.console import Console
    from rich.text import Text

    clean = ["".join(c if c.isprintable() else "?" for c in text) for text, _ in parts]
    line = Text(" ").join(Text(text, style) for text, (_, style) in zip(clean, parts, strict=True))
    Console(highlight=False).print(line, soft_wrap=True)


def _read_token(file: Path) -> str:
    return sys.stdin.readline() if str(file) == "-" else _read_text(file)


def _seed(settings: DeviceConfig, store: DeviceStore) -> bytes:
    file = settings.training.seed_file
    return read_seed_file(file) if file is not None else store.seed(os.urandom)


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError as error:
        raise OptionError(
            f"{path} cannot be read: {error.strerror}; name the file that holds the token, or - for the terminal"
        ) from error


def main() -> None:
    """The console script."""
    run_program("edge-runtime", app)


if __name__ == "__main__":
    main()
