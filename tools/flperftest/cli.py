"""``flperftest``: what the real programs do under the load of a fleet."""

from __future__ import annotations

import itertools
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from aggregator.config import DeliveryConfig
from edge_runtime.command_line import OptionError, run_program
from edge_runtime.protocol.chunks import MAX_CHUNK_BYTES, MIN_CHUNK_BYTES
from flperftest import blob_case
from flperftest.blobs import BlobResult, measure
from flperftest.report import line, print_table, write_json

FAILED, INTERRUPTED = 1, 130
_SHIPPED = DeliveryConfig()
_MB = 1_000_000

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False
)


class PathChoice(str, Enum):
    """As ``blob_case.Path``, and all of them."""

    WAVE = "wave"
    PULL = "pull"
    BOTH = "both"


class BrokerKind(str, Enum):
    """As ``aggregator.broker.KINDS``."""

    MOSQUITTO = "mosquitto"
    AMQTT = "amqtt"


@app.callback()
def _root() -> None:
    """Load tests: many real MQTT clients, a real broker, the shipped code, measured from /proc (Linux)."""


@app.command()
def blobs(
    clients: Annotated[int, typer.Option(min=1, max=18_000, help="How many fetch at once.")] = 1000,
    size_mb: Annotated[
        list[float] | None,
        typer.Option(min=0.0, max=1000.0, help="Size of the blob; may be repeated. Default: 1."),
    ] = None,
    path: Annotated[
        PathChoice,
        typer.Option(
            help="wave: published once for all who listen. pull: every client asks for its own copy."
        ),
    ] = PathChoice.BOTH,
    repeat: Annotated[
        int,
        typer.Option(
            min=1, max=100, help="Runs of each case; cases take turns, so that a busy minute hits all."
        ),
    ] = 1,
    chunk_kib: Annotated[
        list[int] | None,
        typer.Option(
            min=MIN_CHUNK_BYTES // 1024,
            max=MAX_CHUNK_BYTES // 1024,
            help="\\[delivery] chunk_bytes in KiB; may be repeated. Default: as shipped.",
        ),
    ] = None,
    bytes_per_s: Annotated[
        float, typer.Option(min=1000, help="\\[delivery] bytes_per_s.")
    ] = _SHIPPED.bytes_per_s,
    gather_s: Annotated[
        float, typer.Option(min=0, max=60, help="\\[delivery] gather_s.")
    ] = _SHIPPED.gather_s,
    processes: Annotated[
        int, typer.Option(min=1, max=64, help="Client processes; a core's worth of one takes about 200 MB/s.")
    ] = 2,
    timeout_s: Annotated[float, typer.Option(min=1, help="Who has not all by then counts as lost.")] = 300.0,
    broker: Annotated[BrokerKind, typer.Option(help="Started for each run.")] = BrokerKind.MOSQUITTO,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Keep the logs of all programs in a new folder below. Default: removed at the end."
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures of all runs to this file too.")
    ] = None,
) -> None:
    """How long until a model has reached everybody, and what it costs broker, aggregator and clients.

    Each run starts a broker, one process that serves a blob with the aggregator's own code, and CLIENTS MQTT
    clients that fetch it with the device's own code: they check every piece against the index and compare it with
    the content. The clock runs from the message that tells all clients to begin to the last piece of the last one.

    Read the table so: **last client** is what a round waits for; **broker MB** is the kernel's mark of
    its largest resident set, **sockets MB** what TCP held in buffers at its highest; CPU is of the delivery
    alone. **of loopback** sets the rate beside a bare TCP connection measured just before: a machine that was
    busy shows there. Broker, server and clients share this machine's cores: the figures are of all together.
    **asked again** counts requests after silence, **pieces twice** what arrived in vain.

    Ends with code 1 if a client lost its blob; 130: interrupted. Next: `aggregator init --set delivery.KEY=VALUE`
    sets what suits your broker; docs/decisions/0010-blob-delivery.md discusses the figures.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    signal.signal(signal.SIGTERM, _interrupt)
    paths = list(blob_case.Path) if path is PathChoice.BOTH else [blob_case.Path(path.value)]
    chunks = [kib * 1024 for kib in chunk_kib or ()] or [_SHIPPED.chunk_bytes]
    cases = [
        blob_case.BlobCase(
            path=one,
            clients=clients,
            size_bytes=round(size * _MB),
            chunk_bytes=chunk_bytes,
            gather_s=gather_s,
            bytes_per_s=bytes_per_s,
            processes=min(processes, clients),
            timeout_s=timeout_s,
            broker=broker.value,
        )
        for size, chunk_bytes, one in itertools.product(size_mb or [1.0], chunks, paths)
    ]
    results: list[BlobResult] = []
    try:
        with _scratch(folder) as scratch:
            for number, case in enumerate(cases * repeat):
                results.append(_one(console, case, scratch / f"run-{number:03d}"))
    except KeyboardInterrupt as error:
        console.print("interrupted; every process was ended")
        raise typer.Exit(INTERRUPTED) from error
    finally:
        if results:
            print_table(console, results)
            if json_file is not None:
                write_json(json_file, shlex.join(["flperftest", *sys.argv[1:]]), results)
    raise typer.Exit(FAILED if any(result.lost or result.clients["wrong"] for result in results) else 0)


@contextmanager
def _scratch(folder: Path | None) -> Iterator[Path]:
    """A new folder for this call: below ``folder`` and kept, or a temporary one."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="flperftest-") as temporary:
            yield Path(temporary)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=folder))
    except OSError as error:
        raise OptionError(f"cannot use {folder}: {error.strerror}; name another with --folder") from error


def _one(console: Console, case: blob_case.BlobCase, folder: Path) -> BlobResult:
    columns = (
        TextColumn(f"{case.path.value} {case.size_bytes / _MB:g} MB"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[received]}"),
        TimeElapsedColumn(),
    )
    # Without a terminal the bar is off and the lines alone remain.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("clients", total=case.clients, received="")
        result = measure(
            case,
            folder,
            lambda done, received: bar.update(task, completed=done, received=f"{received / _MB:,.0f} MB"),
        )
    console.print(line(result))
    return result


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """The console script."""
    run_program("flperftest", app)
