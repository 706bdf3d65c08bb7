"""The ``model-export`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edge_runtime.command_line import run_program
from edge_runtime.protocol.errors import FleetgradError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_out = Console()
_err = Console(stderr=True)


@app.callback()
def _commands() -> None:
    """Turn a PyTorch model into ONNX graphs that any small device trains with stock ONNX Runtime: an artifact."""


@app.command()
def build(
    source: Annotated[
        str, typer.Argument(metavar="MODULE:FUNCTION", help="Your function, found from the current folder.")
    ],
    out: Annotated[Path, typer.Option(help="The artifact folder; one that is there is replaced.")] = Path(
        "artifact"
    ),
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of torch's random numbers before your function runs.")
    ] = 0,
    name: Annotated[str, typer.Option(help="The model's name; default: the module's last word.")] = "",
) -> None:
    """Export a model and prove that the export computes what torch computes.

    The function takes nothing and returns **(module, inputs, target, loss)**:

    - *module*: a torch.nn.Module with float32 parameters

    - *inputs*: a tuple of example tensors, batch first (any batch size; 2 to 8 samples are enough)

    - *target*: an example target of the same batch

    - *loss*: "cross_entropy", "bce_with_logits", "mse", or a function (outputs, target) -> scalar mean

    Loss, outputs and every gradient are compared with torch in float64, at batch sizes 1, n (yours) and 61; two
    steps of SGD with momentum and clipping as well. If anything differs, or an operator has no gradient rule, the
    command says what and where, exits with 1, and writes nothing.

    Example: **model-export build my_module:build --out artifact/**. Next: `aggregator init --artifact artifact/`.
    """
    from model_export.build import (
        build_artifact,
        import_build,
    )  # torch takes seconds to import; help must not
    from model_export.manifest import check_destination, check_name, write_artifact

    try:
        check_destination(out)
        chosen = name or source.partition(":")[0].rpartition(".")[2]
        check_name(chosen)
        with _err.status("importing torch") as status:
            function = import_build(source, Path.cwd(), seed=seed)
            result = build_artifact(function, name=chosen, seed=seed, progress=status.update)
            status.update(f"writing {out}")
            write_artifact(result.artifact, out)
    except FleetgradError as error:
        _err.print(f"[red]not exported:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error

    worst: dict[str, dict[int, float]] = {}
    for check in result.checks:
        worst.setdefault(check.what, {})[check.batch] = check.error
    sizes = sorted({check.batch for check in result.checks})
    table = Table(title=f"largest relative difference from torch ({result.checks[0].reference})")
    table.add_column("value")
    for size in sizes:
        table.add_column(f"batch {size}", justify="right")
    for what, errors in worst.items():
        table.add_row(what, *(f"{errors[size]:.1e}" if size in errors else "" for size in sizes))
    _out.print(table)
    if result.checks[0].reference != "float64":
        _out.print(
            "The model does not compute in float64; the tolerance was 1e-3 instead of 1e-4.", highlight=False
        )
    manifest = result.artifact.manifest
    graphs = sum(entry.size for file, entry in manifest.files.items() if file.endswith(".onnx"))
    _out.print(
        f"{manifest.name}: {manifest.parameter_count:,} parameters in {len(manifest.parameters)} tensors, "
        f"graphs of {graphs:,} bytes, digest {result.artifact.digest.hex()[:16]}, in {out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def main() -> None:
    """The console script."""
    run_program("model-export", app)
