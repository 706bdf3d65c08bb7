"""The ``model-export`` command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from edge_runtime.backends.artifact_folder import read_artifact_folder
from edge_runtime.command_line import run_program
from edge_runtime.protocol.artifact import Artifact
from edge_runtime.protocol.errors import FleetgradError
from model_export.report import MAX_REPORT_BYTES, REPORT_FILE, Check, Report

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


_Source = Annotated[
    str, typer.Argument(metavar="MODULE:FUNCTION", help="Your function, found from the current folder.")
]
_Artifact = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="The folder that `build --out` wrote.")]


@app.command()
def build(
    source: _Source,
    out: Annotated[Path, typer.Option(help="The artifact folder; one that is there is replaced.")] = Path(
        "artifact"
    ),
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of torch's random numbers before your function runs.")
    ] = 0,
    name: Annotated[str, typer.Option(help="The model's name; default: the module's last word.")] = "",
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Start from these: an .npz or .safetensors of the state_dict()."),
    ] = None,
) -> None:
    """Export a model and prove that the export computes what torch computes.

    The function takes nothing and returns **(module, inputs, target, loss)**:

    - *module*: a torch.nn.Module with float32 parameters

    - *inputs*: a tuple of example tensors, batch first (any batch size; 2 to 8 samples are enough)

    - *target*: an example target of the same batch

    - *loss*: "cross_entropy", "bce_with_logits", "mse", or a function (outputs, target) -> scalar mean

    Loss, every gradient, the running statistics of BatchNorm and the outputs in eval() are compared with torch
    in float64 at three batch sizes, dropout with the same masks; two steps of SGD, Adam and AdamW with clipping
    as well. If anything differs, or an operator has no gradient rule, the command says what and where, exits
    with 1, and writes nothing. The table is kept beside the artifact as parity.json.

    Example: **model-export build my_module:build --out artifact/**. Next: `aggregator init --artifact artifact/`.
    """
    from model_export.build import (
        build_artifact,
        import_build,
    )  # torch takes seconds to import; help must not
    from model_export.manifest import check_destination, check_name, write_artifact
    from model_export.tables import checks_table, print_wide

    with _refusals("not exported:"):
        check_destination(out)
        chosen = name or source.partition(":")[0].rpartition(".")[2]
        check_name(chosen)
        with _err.status("importing torch") as status:
            function = import_build(source, Path.cwd(), seed=seed)
            result = build_artifact(function, name=chosen, seed=seed, weights=weights, progress=status.update)
            status.update(f"writing {out}")
            write_artifact(result.artifact, out, result.report())

    reference = result.checks[0].reference
    print_wide(_out, checks_table(result.checks, f"largest relative difference from torch ({reference})"))
    if reference != "float64":
        _say("The model does not compute in float64; the tolerance was 1e-3 instead of 1e-4.")
    manifest = result.artifact.manifest
    graphs = sum(entry.size for file, entry in manifest.files.items() if file.endswith(".onnx"))
    _say(
        f"{manifest.name}: {manifest.trainable_count:,} parameters"
        + (f" and {manifest.buffer_count:,} running statistics" if manifest.buffers else "")
        + f" in {len(manifest.parameters)} tensors, graphs of {graphs:,} bytes, digest "
        f"{result.artifact.digest.hex()[:16]}, in {out}"
    )


@app.command()
def check(
    artifact: _Artifact,
    source: Annotated[
        str,
        typer.Argument(
            metavar="[MODULE:FUNCTION]",
            help="The function it was built from: compares with torch anew.",
            show_default=False,
        ),
    ] = "",
) -> None:
    """Print how far an artifact is from torch, and check again what can be checked here.

    **Without the function** torch is not needed. The digest of every file is verified and every graph is run by
    the runtime on random data: a fused step has to equal accumulating and applying, for SGD, Adam and AdamW;
    each gradient has to be the slope of the loss (central differences: one to two digits); dropout has to
    repeat with its seed. Then the table that `build` kept is printed, if it is of these very files.

    **With the function** the artifact is compared with torch as `build` does, at the parameters it holds: do
    this where you do not trust the table, or after updating onnxruntime.

    The command exits with 1 if anything fails. Examples: **model-export check artifact/**, and
    **model-export check artifact/ my_module:build**.
    """
    from model_export.tables import checks_table, print_wide

    with _refusals("not checked:"):
        found = read_artifact_folder(artifact)
        with _err.status("running the graphs") as status:
            if source:
                from model_export.build import compare_with, import_build

                function = import_build(source, Path.cwd())
                checks = compare_with(found, function, progress=status.update)
                title = f"largest relative difference from torch ({checks[0].reference}), now"
                about = ""
            else:
                checks, about = _verified(found)
                title = "the graphs against one another, on random data"
    print_wide(_out, checks_table(checks, title))
    if about:
        _say(about)
    if not source:
        _kept_report(artifact / REPORT_FILE, found)
    failed = [entry for entry in checks if not entry.passed]
    _say(
        f"{found.manifest.name}, digest {found.digest.hex()[:16]}: every file is what the manifest names, "
        + (f"but {len(failed)} of {len(checks)} checks fail" if failed else f"{len(checks)} checks passed")
    )
    if failed:
        raise typer.Exit(1)


def _verified(artifact: Artifact) -> tuple[list[Check], str]:
    """The checks, and why there are not more."""
    from model_export.verify import Unchecked, verify

    checks: list[Check] = []
    try:
        checks.extend(verify(artifact))
    except Unchecked as reason:
        return checks, f"Only the digests could be checked: {reason}. Give the function as well."
    return checks, ""


def _kept_report(path: Path, artifact: Artifact) -> None:
    from model_export.tables import checks_table, print_wide

    try:
        with path.open("rb") as file:
            report = Report.from_bytes(file.read(MAX_REPORT_BYTES))
    except OSError:
        report = None
    if report is None or report.artifact != artifact.digest:
        _say(
            f"There is no {REPORT_FILE} of these files; to compare with torch give the function it was built from."
        )
        return
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    print_wide(
        _out, checks_table(report.checks, f"from torch when it was built ({versions}), by {REPORT_FILE}")
    )


@app.command()
def inspect(
    artifact: _Artifact,
    json: Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")] = False,
) -> None:
    """Show what is in an artifact: tensors, data, operators of each graph, and the memory that a step needs.

    Memory is an estimate by batch size: the sizes of all values that are alive at once in the graph of a step,
    and the vectors of the session. Choose the plan's batch size by it; the process itself takes some 60 MB
    more.

    Example: **model-export inspect artifact/**, or **model-export inspect artifact/ --json | jq .memory**.
    """
    from model_export.inspection import describe
    from model_export.tables import inspection, print_wide

    with _refusals("not inspected:"):
        document = describe(read_artifact_folder(artifact))
    if json:
        _out.file.write(dumps(document, indent=1) + "\n")
    else:
        print_wide(_out, inspection(document))


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Prints an error of ours on stderr and exits with 1."""
    try:
        yield
    except FleetgradError as error:
        _err.print(f"[red]{what}[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def _say(text: str) -> None:
    _out.print(text, highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """The console script."""
    run_program("model-export", app)
