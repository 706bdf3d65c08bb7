"""Command lines in the test's own process: a new interpreter for each would cost half a second."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from collections.abc import Callable
from typing import NamedTuple


class Done(NamedTuple):
    """How a command line ended. ``code``: its exit status."""

    code: int
    out: str
    err: str


def run(main: Callable[[], None], *words: str, stdin: str = "") -> Done:
    """Call a console script's function with these arguments; nothing of the process stays changed.

    An exception that would have been a traceback passes through.
    """
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, sys.stdin
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv, sys.stdin = [main.__module__.partition(".")[0].replace("_", "-"), *words], io.StringIO(stdin)
    code: object = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv, sys.stdin = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Done(code if isinstance(code, int) else 1, out.getvalue(), err.getvalue())


def refusal(main: Callable[[], None], *words: str, stdin: str = "") -> str:
    """The one message of a command that must fail: on stderr, in one line, with exit code 1, nothing on stdout."""
    done = run(main, *words, stdin=stdin)
    lines = [line for line in done.err.splitlines() if "cannot connect to" not in line]  # its log
    assert (done.code, done.out, len(lines)) == (1, "", 1), done
    return lines[0]
