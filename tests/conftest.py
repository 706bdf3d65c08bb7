"""For all tests: hypothesis profiles, and the time of each directory at the end."""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import PurePosixPath

import pytest
from hypothesis import settings

# `ci`: the same examples on every run, nothing written to disk. `local`: new examples on every run.
# Both without a deadline: on a shared machine a slow example is no fault.
settings.register_profile(
    "ci", derandomize=True, max_examples=50, deadline=None, database=None, print_blob=True
)
settings.register_profile("local", deadline=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

_TESTS = "tests"
_COLLECTION = "imports and collection"
_seconds: defaultdict[str, float] = defaultdict(float)
_count: Counter[str] = Counter()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    started = time.perf_counter()
    try:
        return (yield)
    finally:
        _seconds[_COLLECTION] += time.perf_counter() - started


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    directory = _directory(report.nodeid)
    _seconds[directory] += report.duration
    if report.when == "call" or report.skipped:
        _count[directory] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("seconds by directory")
    for directory, seconds in sorted(_seconds.items(), key=lambda item: -item[1]):
        tests = f"{_count[directory]:6d} tests" if directory in _count else ""
        terminalreporter.line(f"{seconds:8.1f}  {directory:24}{tests}".rstrip())


def _directory(nodeid: str) -> str:
    """``tests/unit`` for a test anywhere below it."""
    parts = PurePosixPath(nodeid.partition("::")[0]).parts
    below = parts[: parts.index(_TESTS) + 2] if _TESTS in parts else parts[:1]
    return "/".join(below)
