"""What the commands print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from model_export.report import Check


def checks_table(checks: Sequence[Check], title: str) -> Table:
    """A row for each comparison, a column for each batch size; what exceeds its tolerance is red."""
    rows: dict[str, dict[int, Check]] = {}
    for check in checks:
        rows.setdefault(check.what, {})[check.batch] = check
    sizes = sorted({check.batch for check in checks})
    table = Table(title=title)
    table.add_column("value")
    for size in sizes:
        table.add_column(f"batch {size}", justify="right")
    for what, found in rows.items():
        cells = (_cell(found[size]) if size in found else Text() for size in sizes)
        table.add_row(Text(what), *cells)
    return table


def _cell(check: Check) -> Text:
    return Text(f"{check.error:.1e}", style="" if check.passed else "bold red")


def inspection(document: Mapping[str, Any]) -> RenderableType:
    """``inspection.describe`` for the eye."""
    return Group(
        _tensors(document),
        _data(document),
        _graphs(document),
        _memory(document),
    )


def _tensors(document: Mapping[str, Any]) -> Table:
    buffers = document["parameters"] - document["trainable"]
    table = Table(
        title=f"{document['name']}: {document['trainable']:,} trainable parameters"
        + (f", {buffers:,} in buffers" if buffers else "")
        + f", artifact {document['digest'][:16]}"
    )
    for column in ("tensor", "shape", "count", "kind"):
        table.add_column(column, justify="right" if column == "count" else "left")
    for tensor in document["tensors"]:
        table.add_row(tensor["name"], _shape(tensor["shape"]), f"{tensor['count']:,}", tensor["kind"])
    return table


def _data(document: Mapping[str, Any]) -> Table:
    table = Table(title=f"data, loss {document['loss']}" + (", dropout" if document["dropout"] else ""))
    for column in ("", "name", "dtype", "shape"):
        table.add_column(column)
    for kind, values in (
        ("input", document["inputs"]),
        ("target", [document["target"]]),
        ("output", document["outputs"]),
    ):
        for value in values:
            classes = f", labels 0 to {value['classes'] - 1}" if value.get("classes") else ""
            table.add_row(kind, value["name"], value["dtype"], _shape(["batch", *value["shape"]]) + classes)
    return table


def _graphs(document: Mapping[str, Any]) -> Table:
    graphs = document["graphs"]
    used = sorted({operator for graph in graphs.values() for operator in graph["operators"]})
    table = Table(title=f"operators of ai.onnx, opset {document['opset']}, how often in each graph")
    table.add_column("operator")
    for name in graphs:
        table.add_column(name.removesuffix(".onnx"), justify="right")
    for operator in used:
        table.add_row(operator, *(str(graph["operators"].get(operator, "")) for graph in graphs.values()))
    table.add_section()
    table.add_row("all", *(str(sum(graph["operators"].values())) for graph in graphs.values()))
    table.add_row("bytes", *(f"{graph['bytes']:,}" for graph in graphs.values()))
    return table


def _memory(document: Mapping[str, Any]) -> RenderableType:
    unknown = max(row["unknown_values"] for row in document["memory"])
    table = Table(title="memory of a training step, estimated")
    for column in ("batch", "activations", "sgd", "adam"):
        table.add_column(column, justify="right")
    for row in document["memory"]:
        sizes = (row["activations"], row["total_sgd"], row["total_adam"])
        table.add_row(str(row["batch"]), *(_bytes(size) for size in sizes))
    note = "activations: the most that is alive at once; sgd, adam: with parameters and the optimiser's vectors. "
    note += "The process, the runtime and the data set come on top."
    if unknown:
        note += f" {unknown} values of unknown size are not counted."
    return Group(table, Text(note))


def _shape(shape: Sequence[object]) -> str:
    return f"({', '.join(map(str, shape))})"


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def print_wide(console: Console, *tables: RenderableType) -> None:
    """Tables whole, also where the output is no terminal and has no width."""
    if not console.is_terminal:
        console.width = 200
    for table in tables:
        console.print(table)
