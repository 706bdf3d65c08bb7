"""``fldemo run``: the whole system on one machine, in about a minute."""

from __future__ import annotations

import signal
import sys
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from edge_runtime.command_line import run_program
from edge_runtime.protocol.errors import FleetgradError
from fldemo.demo import Observer, Options, run_demo
from fldemo.examples import EXAMPLES
from fldemo.federation import Folders
from fldemo.live import LiveView
from fldemo.report import print_checks, print_table, round_line, seed_line, write_json
from fldemo.scenario import LEAST_ROUNDS, Round
from fldemo.workfolder import fresh_folder

FAILED, UNUSABLE, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False
)


class ExampleName(str, Enum):
    """As ``fldemo.examples.EXAMPLES``."""

    DIGITS = "digits"
    BREAST_CANCER = "breast_cancer"


Rounds = Annotated[
    int | None,
    typer.Option(
        min=LEAST_ROUNDS,
        max=1000,
        help="Versions to make; with fewer than the default, 60 or 40, the model may not be good enough.",
        show_default=False,
    ),
]


class BrokerKind(str, Enum):
    """As ``aggregator.broker.KINDS``."""

    MOSQUITTO = "mosquitto"
    AMQTT = "amqtt"


@app.callback()
def _root() -> None:
    """Federated learning on ten real device processes over a real MQTT broker."""


@app.command()
def run(
    folder: Annotated[
        Path,
        typer.Option(help="Where everything of the run goes. What an earlier demo left there is removed."),
    ] = Path(".demo"),
    seed: Annotated[
        int, typer.Option(min=0, help="Decides the split of the data, the cohorts, the batches.")
    ] = 0,
    rounds: Rounds = None,
    example: Annotated[
        ExampleName,
        typer.Option(help="digits: images, accuracy; breast_cancer: measurements of patients, AUC."),
    ] = ExampleName.DIGITS,
    export: Annotated[
        bool,
        typer.Option(
            "--export", help="Export the model from PyTorch first instead of using the committed one."
        ),
    ] = False,
    broker: Annotated[
        BrokerKind | None, typer.Option(help="Default: mosquitto if it is installed, else amqtt (slower).")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file too.")
    ] = None,
) -> None:
    """Train one model on ten device processes, kill two of them, and check the result.

    1,797 images of digits (scikit-learn) are split unevenly: a fifth is held out, the rest goes to ten devices, so
    that most see only some of the digits (Dirichlet, alpha 0.3). With --example breast_cancer: 569 patients in
    ten hospitals, a CSV file each, and the question whether a tumour is malignant. A broker, a registrar, the
    aggregator and ten devices start as processes of their own. In each round 5 of 10 devices are asked, the first
    4 updates make the next version, encrypted on the way. Two devices are killed while they train; one comes back
    some rounds later.

    The table at the end puts the shared model beside one trained with all data in one place and beside what each
    device could have learned alone, and shows seconds a round, traffic and memory. The demo then checks itself
    and ends with code 1 if anything is off. 2: it could not run; 130: interrupted.

    Look at FOLDER/logs for what each program said, at FOLDER/aggregator/aggregator.toml for the settings, and at
    FOLDER/model for the trained model: model.onnx runs in any ONNX Runtime, model.npz loads into PyTorch.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    signal.signal(signal.SIGTERM, _interrupt)
    options = Options(
        example=EXAMPLES[example.value],
        folder=folder,
        seed=seed,
        rounds=rounds or EXAMPLES[example.value].rounds,
        export=export,
        broker=broker.value if broker else None,
    )
    try:
        raise typer.Exit(_run(console, options, json_file))
    except FleetgradError as error:
        console.print(f"[bold red]the demo stopped:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(UNUSABLE) from error
    except KeyboardInterrupt as error:
        console.print(f"interrupted; every process was ended; logs are in {folder / 'logs'}")
        raise typer.Exit(INTERRUPTED) from error


@app.command()
def seeds(
    count: Annotated[int, typer.Option(min=1, max=1000, help="How many: 0, 1, 2 and so on.")] = 20,
    folder: Annotated[
        Path, typer.Option(help="Where everything of a run goes; each run removes the one before.")
    ] = Path(".demo"),
    rounds: Rounds = None,
    example: Annotated[ExampleName, typer.Option(help="What to train.")] = ExampleName.DIGITS,
) -> None:
    """Run the demo with many seeds, one after the other, and print what became of each.

    A line for each seed: whether its checks hold, by how many hundredths it is below central training, seconds a
    round, what failed. Ends with code 1 if any run failed.
    """
    console = Console(highlight=False, soft_wrap=True)
    signal.signal(signal.SIGTERM, _interrupt)
    chosen = EXAMPLES[example.value]
    quiet = Observer(say=lambda _: None, on_round=lambda _: None)
    failed = 0
    try:
        for seed in range(count):
            try:
                with fresh_folder(folder) as placed:
                    options = Options(
                        example=chosen, folder=placed, seed=seed, rounds=rounds or chosen.rounds
                    )
                    result = run_demo(options, quiet)
                line, holds = seed_line(result.figures, result.checks)
            except FleetgradError as error:
                line, holds = f"stopped  seed {seed:3d}  {error}", False
            console.print(line, markup=False)
            failed += not holds
    except KeyboardInterrupt as error:
        raise typer.Exit(INTERRUPTED) from error
    console.print(f"{count - failed} of {count} seeds passed")
    raise typer.Exit(FAILED if failed else 0)


def _run(console: Console, options: Options, json_file: Path | None) -> int:
    with fresh_folder(options.folder) as folder, LiveView(console, Folders(folder).config) as live:

        def on_round(round_: Round) -> None:
            console.print(round_line(round_, options.rounds, options.example.metric.name))
            if round_.version == options.rounds:
                live.end()

        observer = Observer(
            say=lambda text: console.print(text, style="dim", soft_wrap=True), on_round=on_round
        )
        placed = Options(**{**options.__dict__, "folder": folder})
        result = run_demo(placed, observer)
    print_table(console, result.figures)
    print_checks(console, result.checks)
    if json_file is not None:
        write_json(json_file, result.figures, result.checks, result.rounds)
    failed = sum(not check.holds for check in result.checks)
    if failed:
        console.print(
            f"[bold red]{failed} of {len(result.checks)} checks failed[/]; logs: {options.folder / 'logs'}"
        )
    return FAILED if failed else 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """The console script."""
    run_program("fldemo", app)
