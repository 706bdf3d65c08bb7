"""``aggregator``: set up, enrol devices, serve rounds, look, and take the model home."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from aggregator.commands.broker import broker_config_app
from aggregator.commands.orders import register as register_orders
from aggregator.commands.registrar import BrokerUrl, RegistrarFolder, checked_expiry_h, registrar_app
from edge_runtime.command_line import OptionError, run_program, stopped_by_signal, tee

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Run a federation: devices train, this sums their encrypted updates exactly once, whatever dies.

    First `aggregator init`, then `aggregator registrar serve` while devices enrol with tokens of
    `aggregator enroll-token`, then `aggregator serve`. It needs a broker: `aggregator broker` starts one.""",
)
app.add_typer(registrar_app, name="registrar")
app.add_typer(broker_config_app, name="broker-config")

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The file that `aggregator init` wrote.")]


@app.command()
def init(
    folder: Annotated[Path, typer.Option(help="A new folder for settings, keys and state.")],
    federation: Annotated[str, typer.Option(help="The federation's name: 1-48 of a-z 0-9 _ -.")],
    artifact: Annotated[Path, typer.Option(help="The folder that `model-export build` wrote.")],
    broker: BrokerUrl = "mqtt://127.0.0.1:1883",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting, as section.key=value; may be repeated. A plan for a kind of fleet: "
            "plan.preset=default, medical, finance or iot.",
        ),
    ] = None,
) -> None:
    """Make keys, a registrar and a commented aggregator.toml, all in one new folder.

    Next: `aggregator registrar serve` and `aggregator enroll-token` for each device, then `aggregator serve`.
    """
    from aggregator.setup import initialise

    path = initialise(folder, federation, artifact, broker, settings or [])
    tls = ""
    if broker.startswith("mqtts:"):
        tls = (
            f"first, for a broker that asks for certificates: aggregator registrar tls --folder "
            f"{folder / 'registrar'} --host NAME --out {folder / 'tls'}\n"
        )
    typer.echo(
        f"{path} is ready; the root key is in {folder / 'registrar'}: back it up, and move that folder to another "
        "machine if devices are to be certified elsewhere.\n"
        f"{tls}next: aggregator registrar serve --folder {folder / 'registrar'} --broker {broker}\n"
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

    lifetime_s = checked_expiry_h(expires_h) * 3600
    authority = registrar.open(folder)
    try:
        token = authority.new_token(broker, int(time.time() + lifetime_s), device)
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
    from aggregator.monitoring.endpoint import Endpoint
    from aggregator.monitoring.listen import parse_listen
    from aggregator.monitoring.logs import structured_logs
    from aggregator.monitoring.monitor import Monitor
    from aggregator.service import Service

    settings = load_aggregator_config(config)
    monitoring = settings.monitoring
    monitor = Monitor(
        folder=settings.folder, release=metadata.version("fleetgrad"), stalled_s=monitoring.stalled_s
    )
    with ExitStack() as stack:
        log = stack.enter_context(structured_logs(as_json=log_json, federation=settings.federation))
        report = tee(log, monitor.event)
        service = stack.enter_context(
            Service(config=settings, report=report, take_over=take_over, monitor=monitor)
        )
        if monitoring.listen:
            endpoint = stack.enter_context(Endpoint(monitor, parse_listen(monitoring.listen)))
            log("monitoring", url=endpoint.url)
        service.run(should_stop=stopped_by_signal(), until_finished=until_finished)


@app.command()
def status(
    config: ConfigFile,
    as_json: Annotated[bool, typer.Option("--json", help="All of it as one JSON document.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the whole ledger and check that it is consistent.")
    ] = False,
    live: Annotated[
        bool, typer.Option("--watch", "-w", help="Go on until Ctrl-C; in a pipe, a line for every change.")
    ] = False,
    interval_s: Annotated[
        float, typer.Option("--interval-s", min=0.1, max=3600, help="Seconds between two looks of --watch.")
    ] = 1.0,
) -> None:
    """Versions, rounds, devices, evaluations, orders and refusals, read from the ledger; works while `serve` runs.

    Next: `aggregator export-model` for a version worth having.
    """
    from aggregator.config import load_aggregator_config
    from aggregator.status import collect, render, watch_ledger

    settings = load_aggregator_config(config)
    if live and (as_json or verify):
        raise OptionError("--watch shows what happens: take --json and --verify without it")
    if live:
        watch_ledger(settings, interval_s=interval_s, should_stop=stopped_by_signal())
        return
    document = collect(settings, verify=verify)
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
    if not known:
        raise OptionError("no version is published yet: `aggregator status` shows how far the round is")
    if wanted not in known:
        raise OptionError(f"there is no version {wanted}; the newest is {max(known)}")
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


register_orders(app)


def main() -> None:
    """The console script."""
    run_program("aggregator", app)


if __name__ == "__main__":
    main()
