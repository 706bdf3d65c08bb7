"""What a comparison found, and the table of it that ``build`` leaves beside the artifact: ``parity.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edge_runtime.protocol.ids import Digest

REPORT_FILE = "parity.json"
MAX_REPORT_BYTES = 4 << 20


@dataclass(frozen=True)
class Check:
    """One comparison. ``error``: largest difference over the largest absolute value of the reference there.

    ``reference``: what it was compared with, such as "float64" of torch. ``batch`` 0: no batch was needed.
    """

    what: str
    batch: int
    error: float
    tolerance: float
    reference: str = "float64"

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Report:
    """The comparison of one artifact, by its digest, and the versions that made it ({"torch": "2.13.0", ...})."""

    artifact: Digest
    versions: Mapping[str, str]
    checks: Sequence[Check]

    def to_bytes(self) -> bytes:
        """JSON, errors to two digits."""
        document = {
            "artifact": self.artifact.hex(),
            "versions": dict(self.versions),
            "checks": [
                {
                    "what": check.what,
                    "batch": check.batch,
                    "error": float(f"{check.error:.1e}"),
                    "tolerance": float(f"{check.tolerance:.1e}"),
                    "reference": check.reference,
                }
                for check in self.checks
            ],
        }
        return (json.dumps(document, indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, raw: bytes) -> Report | None:
        """None for anything ``to_bytes`` would not have written: it proves nothing, so nothing is lost."""
        try:
            document = json.loads(raw)
            report = cls(
                Digest(bytes.fromhex(document["artifact"])),
                {str(name): str(version) for name, version in document["versions"].items()},
                [
                    Check(
                        str(entry["what"]),
                        int(entry["batch"]),
                        float(entry["error"]),
                        float(entry["tolerance"]),
                        str(entry["reference"]),
                    )
                    for entry in document["checks"]
                ],
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return report if all(math.isfinite(check.error) for check in report.checks) else None
