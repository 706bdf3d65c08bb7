"""What a measurement prints and writes."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from edge_runtime.command_line import OptionError
from flperftest.blobs import BlobResult
from flperftest.sampling import Usage

_MB = 1e6
_COLUMNS = (
    "path", "clients", "MB", "chunk KiB", "runs", "last client s", "p50 s", "p95 s", "MB/s", "of loopback",
    "broker MB", "sockets MB", "broker CPU s", "server MB", "server CPU s", "clients CPU s", "pieces sent",
    "pieces twice", "asked again", "lost",
)  # fmt: skip


def line(result: BlobResult) -> str:
    """One run, in one line."""
    case = result.case
    lost = f"  LOST {result.lost}" if result.lost else ""
    return (
        f"{case.path.value:5} {case.clients} x {case.size_bytes / _MB:g} MB  "
        f"chunks {case.chunk_bytes // 1024:4d} KiB  {result.wall_s:6.2f} s  "
        f"broker {_in_short(result.usage.get('broker'))}  server {_in_short(result.usage.get('server'))}{lost}"
    )


def print_table(console: Console, results: Sequence[BlobResult]) -> None:
    """A row for each case: medians over its runs, the largest of what is a peak."""
    table = Table(title="Blob delivery", title_justify="left")
    for heading in _COLUMNS:
        table.add_column(heading, justify="right", overflow="fold")
    for row in summary(results):
        table.add_row(*(str(row[heading]) for heading in _COLUMNS))
    console.print(table)


def summary(results: Sequence[BlobResult]) -> list[dict[str, Any]]:
    """The rows of the table, in the order in which the cases first ran."""
    cases = list(dict.fromkeys(result.case for result in results))
    return [_row([result for result in results if result.case == case]) for case in cases]


def write_json(path: Path, command: str, results: Sequence[BlobResult]) -> None:
    """All runs with all figures, the machine, and the command that made them. Raises FleetgradError (the disk)."""
    document = {
        "command": command,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "python": platform.python_version(),
        },
        "summary": summary(results),
        "runs": [_run(result) for result in results],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    except OSError as error:
        raise OptionError(f"cannot write {path}: {error.strerror}") from error


def _row(runs: list[BlobResult]) -> dict[str, Any]:
    case = runs[0].case

    def mid(values: list[float], digits: int = 2) -> float:
        return round(statistics.median(values), digits)

    def of(name: str) -> list[Usage]:
        return [run.usage[name] for run in runs if name in run.usage]

    def peak_mb(values: list[int]) -> int:
        return round(max(values, default=0) / _MB)

    broker, server = of("broker"), of("server")
    return {
        "path": case.path.value,
        "clients": case.clients,
        "MB": case.size_bytes / _MB,
        "chunk KiB": case.chunk_bytes // 1024,
        "runs": len(runs),
        "last client s": mid([run.wall_s for run in runs]),
        "p50 s": mid([run.quantile_s(0.5) for run in runs]),
        "p95 s": mid([run.quantile_s(0.95) for run in runs]),
        "MB/s": mid([run.delivered_bytes_per_s / _MB for run in runs], 0),
        "of loopback": f"{mid([run.of_loopback for run in runs], 4):.1%}",
        "broker MB": peak_mb([usage.rss_peak for usage in broker]),
        "sockets MB": peak_mb([run.socket_bytes for run in runs]),
        "broker CPU s": mid([usage.cpu_s for usage in broker]) if broker else 0,
        "server MB": peak_mb([usage.rss_peak for usage in server]),
        "server CPU s": mid([usage.cpu_s for usage in server]) if server else 0,
        "clients CPU s": mid([run.clients_usage().cpu_s for run in runs]),
        "pieces sent": mid(
            [run.server.get("sent_to_all", 0) + run.server.get("sent_alone", 0) for run in runs], 0
        ),
        "pieces twice": mid([run.clients.get("pieces_twice", 0) for run in runs], 0),
        "asked again": mid([run.clients.get("asked_again", 0) for run in runs], 0),
        "lost": sum(run.lost for run in runs),
    }


def _run(result: BlobResult) -> dict[str, Any]:
    return {
        "case": asdict(result.case),
        "wall_s": round(result.wall_s, 3),
        "p50_s": round(result.quantile_s(0.5), 3),
        "p95_s": round(result.quantile_s(0.95), 3),
        "lost": result.lost,
        "delivered_bytes_per_s": round(result.delivered_bytes_per_s),
        "loopback_bytes_per_s": round(result.loopback_bytes_per_s),
        "socket_bytes": result.socket_bytes,
        "usage": {name: asdict(usage) for name, usage in result.usage.items()},
        "clients": dict(result.clients),
        "server": dict(result.server),
    }


def _in_short(usage: Usage | None) -> str:
    return f"{usage.rss_peak / _MB:5.0f} MB {usage.cpu_s:5.1f} s" if usage else "not measured"
