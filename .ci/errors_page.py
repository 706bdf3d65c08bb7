"""Writes docs/errors.md from the tables of refusals and errors; ``--check`` fails if the page is not theirs."""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

from edge_runtime.protocol.errors import FleetgradError
from edge_runtime.protocol.rejects import Reject

PAGE = Path(__file__).resolve().parents[1] / "docs" / "errors.md"
PROGRAMS = {
    "edge_runtime": "The device, and what all programs share",
    "aggregator": "The aggregator and the registrar",
    "model_export": "The export",
    "fldemo": "The demo",
    "flperftest": "The load tool",
}
HEAD = """# Errors and refusals

Generated from the code by `make errors-page`; `make check` fails when it is out of date.

A program that cannot go on says on stderr, a line for each problem, what is wrong, where, and what to do; it
ends with

| exit code | meaning | what to do |
|---|---|---|
| 1 | an error of the tables below, or a check that failed (`doctor`, `check`, `--verify`) | as its row says |
| 1 | an option has a value that does not fit the others or the files (`OptionError`) | as the line says |
| 2 | the command line is not understood: an option is missing, unknown or out of range | `--help` of that command |

The tables say for each kind of error whose it is to mend. What a stranger sends is never an error of the program
that receives it: it is refused, counted by its code and answered where the protocol has an answer.

## Refusals

Of messages: on the wire as the code, in logs, metrics and `aggregator status` as the name.

| code | name | meaning | whose fault | what to do |
|---|---|---|---|---|
"""


def errors(package: str) -> Iterator[type[FleetgradError]]:
    """Every error class of a package, by module and name."""
    root = importlib.import_module(package)
    for info in sorted(pkgutil.walk_packages(root.__path__, f"{package}."), key=lambda info: info.name):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        for _, found in inspect.getmembers(module, inspect.isclass):
            if issubclass(found, FleetgradError) and found.__module__ == info.name:
                yield found


def page() -> str:
    """The whole page. Raises ValueError for an error class without a docstring or a remedy."""
    text = HEAD
    for reject in Reject:
        text += _row(str(reject.code), f"`{reject.name}`", reject.meaning, reject.fault.value, reject.remedy)
    for package, title in PROGRAMS.items():
        rows = ""
        for error in errors(package):
            if error is FleetgradError:
                continue
            meaning = _meaning(error)
            if not error.remedy:
                raise ValueError(
                    f"{error.__module__}.{error.__name__} names no remedy in its class statement"
                )
            rows += _row(f"`{error.__name__}`", meaning, error.fault.value, error.remedy)
        if rows:
            text += (
                f"\n## {title}\n\n| error | meaning | whose fault | what to do |\n|---|---|---|---|\n{rows}"
            )
    return text


def _meaning(error: type[FleetgradError]) -> str:
    """The first paragraph of its own docstring, as one line."""
    doc = error.__dict__.get("__doc__")
    if not doc:
        raise ValueError(f"{error.__module__}.{error.__name__} has no docstring of its own")
    return " ".join(inspect.cleandoc(doc).partition("\n\n")[0].replace("``", "`").split())


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page differs")
    wanted = page()
    if parser.parse_args().check:
        if not PAGE.is_file() or PAGE.read_text("utf-8") != wanted:
            sys.stderr.write("docs/errors.md is out of date: make errors-page\n")
            return 1
        sys.stdout.write("docs/errors.md is up to date\n")
        return 0
    PAGE.write_text(wanted, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
