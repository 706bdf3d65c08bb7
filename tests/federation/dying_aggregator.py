"""``aggregator serve`` in a process that kills itself at its n-th operation on disk, ledger or network.

python dying_aggregator.py N serve --config ...     Operations count from the start of the service; N = 1 is the
first. Faults as operations: whatever the code between two of them does, it is cut there by SIGKILL.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aggregator import cli
from aggregator.ledger.ledger import Ledger
from edge_runtime.transport.mqtt import MqttTransport

OPERATIONS: tuple[tuple[Any, str], ...] = (
    (os, "fsync"),
    (os, "fdatasync"),
    (Path, "replace"),
    (Path, "unlink"),
    (Path, "rmdir"),
    (Ledger, "claim"),
    (Ledger, "commit"),
    (MqttTransport, "publish"),
    (MqttTransport, "ack"),
)


def die_at(fatal: int) -> None:
    """Wrap every operation: the process ends after it has been done, before its caller knows."""
    done = 0

    def wrapped(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            result = operation(*args, **kwargs)
            done += 1
            if done == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return run

    for owner, name in OPERATIONS:
        setattr(owner, name, wrapped(getattr(owner, name)))


if __name__ == "__main__":
    die_at(int(sys.argv.pop(1)))
    cli.main()
