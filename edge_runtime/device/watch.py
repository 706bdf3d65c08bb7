"""The policy over time: looks at the machine at most once a second, and remembers what it found."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from edge_runtime.device.policy import PolicyConfig, Violation, violations
from edge_runtime.device.snapshot import Snapshot

LOOK_EVERY_S = 1.0


def _local_time() -> datetime:
    return datetime.now().astimezone()


class PolicyWatch:
    """``read``: a fresh snapshot (``Sensors.read``). ``local_time``: now, as the owner's clock shows it."""

    def __init__(
        self,
        config: PolicyConfig,
        read: Callable[[], Snapshot],
        local_time: Callable[[], datetime] = _local_time,
    ) -> None:
        self._config = config
        self._read = read
        self._local_time = local_time
        self._look_at = float("-inf")
        self._standing: tuple[Violation, ...] = ()

    def look(self, now: float) -> tuple[Violation, ...] | None:
        """What forbids training, when that is not what it was; None: looked a moment ago, or nothing changed.

        now: seconds of any clock that never goes back. What was: at first, nothing forbids it.
        """
        if now < self._look_at or not self._config.enabled:
            return None
        self._look_at = now + LOOK_EVERY_S
        before = {violation.name for violation in self._standing}
        self._standing = violations(self._read(), self._config, self._local_time(), before)
        return self._standing if {violation.name for violation in self._standing} != before else None
