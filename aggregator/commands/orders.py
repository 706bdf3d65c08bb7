"""``aggregator pause|resume|drain|evict|readmit|rollback``: orders to a running one, by its ledger; ``keys``."""

from __future__ import annotations

import getpass
import os
import socket
from pathlib import Path
from typing import Annotated

import typer

from aggregator.ledger.values import OrderKind
from edge_runtime.command_line import parsed
from edge_runtime.protocol.ids import device_id

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The file that `aggregator init` wrote.")]
Device = Annotated[
    str, typer.Argument(metavar="DEVICE", help="The device's name, as `aggregator status` shows it.")
]
WaitSeconds = Annotated[
    float,
    typer.Option(
        "--wait-s",
        min=0.0,
        max=3600.0,
        help="Wait so many seconds for the answer; without one the order is obeyed when the aggregator runs.",
    ),
]
PATIENCE_S = 5.0


def register(app: typer.Typer) -> None:
    """Put these commands into the program."""
    for command in (pause, resume, drain, evict, readmit, rollback, keys):
        app.command()(command)


def pause(config: ConfigFile, wait_s: WaitSeconds = PATIENCE_S) -> None:
    """Open no new round. The open one ends normally; check-ins and receipts go on; it outlasts a restart.

    Next: `aggregator resume`. To stop the program once nothing is open: `aggregator drain`.
    """
    _order(config, OrderKind.PAUSE, "", wait_s)


def resume(config: ConfigFile, wait_s: WaitSeconds = PATIENCE_S) -> None:
    """Open rounds again after `aggregator pause`, or call an `aggregator drain` off that is not done."""
    _order(config, OrderKind.RESUME, "", wait_s)


def drain(config: ConfigFile, wait_s: WaitSeconds = PATIENCE_S) -> None:
    """Let the open round end, then exit with code 0; for maintenance. Killed meanwhile, a restart goes on with it.

    The next `aggregator serve` opens rounds again. To stop at once use SIGTERM or Ctrl-C: nothing is lost by it.
    """
    _order(config, OrderKind.DRAIN, "", wait_s)


def evict(device: Device, config: ConfigFile, wait_s: WaitSeconds = PATIENCE_S) -> None:
    """Let a device take part in nothing, at once. Its update of the open round is excluded from the model.

    Versions that its updates are in stay: see `aggregator rollback`. Next: `aggregator readmit` undoes it;
    `aggregator registrar revoke` takes its certificate back for good.
    """
    _order(config, OrderKind.EVICT, parsed(device_id, device), wait_s)


def readmit(device: Device, config: ConfigFile, wait_s: WaitSeconds = PATIENCE_S) -> None:
    """Undo `aggregator evict`: the device may check in again. Its update of a round still open counts again."""
    _order(config, OrderKind.READMIT, parsed(device_id, device), wait_s)


def rollback(
    config: ConfigFile,
    to: Annotated[
        int, typer.Option(min=0, help="The version whose parameters are wanted again; 0: the artifact's.")
    ],
    wait_s: WaitSeconds = PATIENCE_S,
) -> None:
    """Make a new version with the parameters of an earlier one; training goes on from there. No version is deleted.

    An open round is aborted: its updates are steps from the model that was rolled back. Only versions that are
    still on disk can be had (`versions.keep`). Next: `aggregator status`.
    """
    _order(config, OrderKind.ROLLBACK, str(to), wait_s)


def keys(config: ConfigFile) -> None:
    """Print the aggregator's public keys and the root's, none of them secret.

    Next: `aggregator registrar certify` takes the first two; compare the third with what devices have pinned.
    """
    from aggregator.config import load_aggregator_config
    from edge_runtime.protocol.crypto.keys import SealingPrivateKey, SigningKey
    from edge_runtime.protocol.crypto.provider import CRYPTO
    from edge_runtime.settings import read_key_file

    loaded = load_aggregator_config(config)
    signing = CRYPTO.verify_key(SigningKey(read_key_file(loaded.signing_key_file)))
    sealing = CRYPTO.sealing_public_key(SealingPrivateKey(read_key_file(loaded.sealing_key_file)))
    typer.echo(f"signing-key {signing.raw.hex()}")
    typer.echo(f"sealing-key {sealing.raw.hex()}")
    typer.echo(f"root-key    {loaded.root_key}")


def _order(config: Path, kind: OrderKind, argument: str, wait_s: float) -> None:
    from aggregator.config import load_aggregator_config
    from aggregator.orders import OrderRefused, await_answer
    from aggregator.service import open_ledger

    loaded = load_aggregator_config(config)
    open_ledger(loaded, read_only=True).close()  # an order does not make a ledger
    ledger = open_ledger(loaded)
    try:
        if kind is OrderKind.DRAIN and not ledger.is_claimed():
            raise OrderRefused("no aggregator serves this ledger: there is nothing to drain")
        number = ledger.give_order(kind, argument, _who())
        answer = await_answer(ledger, number, wait_s)
    finally:
        ledger.close()
    typer.echo(
        answer
        or f"order {number} is given and takes effect when the aggregator runs (no answer within {wait_s:g} s)"
    )


def _who() -> str:
    """For the record: user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"
