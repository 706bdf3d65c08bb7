"""``aggregator broker-config``: files for a broker of your own, generated from the table of kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_runtime.command_line import OptionError, parsed
from edge_runtime.protocol.ids import federation_id

broker_config_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")

_TLS_PORT = 8883


@broker_config_app.callback()
def _group() -> None:
    """Write the configuration of a broker of your own: mutual TLS, and who may write and read which topic.

    The certificates come from `aggregator registrar tls`.
    """


@broker_config_app.command("mosquitto")
def broker_config_mosquitto(
    out: Annotated[
        Path, typer.Option(help="The folder with the broker's TLS files; the configuration joins.")
    ],
    federation: Annotated[
        str | None, typer.Option(help="The federation's name; --config says it too.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="aggregator.toml: federation, chunk size, port.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="TCP port for TLS; by default that of --config's URL if mqtts, else 8883."),
    ] = None,
    bind: Annotated[str | None, typer.Option(help="IP address to listen on; all by default.")] = None,
    path: Annotated[
        Path | None,
        typer.Option(help="Where the folder will lie on the broker's machine; where it is by default."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
) -> None:
    """Write mosquitto.conf and acl: TLS on both sides, nobody writes or reads for somebody else.

    First `aggregator registrar tls` for the certificates. Next: `mosquitto -c` with the file that is written.
    """
    from aggregator.broker import write_config
    from aggregator.config import load_aggregator_config
    from edge_runtime.protocol.chunks import DEFAULT_CHUNK_BYTES
    from edge_runtime.transport.address import parse_broker_url

    name, chunk_bytes = federation, DEFAULT_CHUNK_BYTES
    if config is not None:
        loaded = load_aggregator_config(config)
        name, chunk_bytes = federation or loaded.federation, loaded.delivery.chunk_bytes
        url = loaded.broker.url
        if port is None and url is not None and url.startswith("mqtts:"):
            port = parse_broker_url(url).port
        if name != loaded.federation:
            raise OptionError(f"--federation {name}, but {config} is of {loaded.federation}: leave one out")
    if name is None:
        raise OptionError("name the federation with --federation, or the aggregator's settings with --config")
    written, missing = write_config(
        out,
        parsed(federation_id, name),
        path=path,
        port=_TLS_PORT if port is None else port,
        bind=bind,
        chunk_bytes=chunk_bytes,
        force=force,
    )
    if missing:
        typer.echo(
            f"still missing in {out}: {', '.join(missing)} "
            "(`aggregator registrar tls` makes them; with --force where some are there)"
        )
    typer.echo(f"next: mosquitto -c {written if path is None else path / written.name}")
