"""What ``aggregator.toml`` says. ``aggregator init`` writes the commented file; a test parses it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from aggregator.core.step import RoundRules
from edge_runtime.protocol.chunks import DEFAULT_CHUNK_BYTES, MAX_CHUNK_BYTES, MIN_CHUNK_BYTES
from edge_runtime.protocol.codecs import CODECS, available
from edge_runtime.protocol.errors import LocalProtocolError, RemoteProtocolError
from edge_runtime.protocol.fixed_point import max_scale_bits
from edge_runtime.protocol.ids import FederationId, federation_id
from edge_runtime.protocol.manifest import MAX_COHORT
from edge_runtime.protocol.parsing import MAX_CODECS
from edge_runtime.protocol.plan import Plan
from edge_runtime.settings import load, require
from edge_runtime.transport.broker_config import BrokerConfig

MAX_DEADLINE_S = 30 * 24 * 3600


@dataclass(frozen=True, kw_only=True)
class DeliveryConfig:
    """How blobs travel. ``gather_s``: a wave waits so long for others; ``bytes_per_s``: pace of all of it."""

    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    gather_s: float = 0.03
    bytes_per_s: float = 50e6

    def __post_init__(self) -> None:
        require(
            MIN_CHUNK_BYTES <= self.chunk_bytes <= MAX_CHUNK_BYTES,
            "chunk_bytes",
            self.chunk_bytes,
            f"{MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES} bytes",
        )
        require(0 <= self.gather_s <= 60, "gather_s", self.gather_s, "0 to 60 seconds")
        require(self.bytes_per_s >= 1000, "bytes_per_s", self.bytes_per_s, "at least 1000")


@dataclass(frozen=True, kw_only=True)
class AggregatorConfig:
    """``folder``: all state of the aggregator; ``root_key``: hex of the registrar's public key.

    round, plan: as ``core.step.RoundRules`` and ``protocol.plan.Plan`` say; ``plan.scale_bits`` is not to be set,
        and of ``plan.codecs`` those are offered that can be used here.
    run_seed_file: 32 bytes as 64 hex digits for the selection; None: made once, kept secret in the folder.
    keep_updates: keep the sealed updates of closed rounds (they can no longer be opened: the key is gone).
    """

    federation: str
    folder: Path
    artifact: Path
    root_key: str
    certificate_file: Path
    signing_key_file: Path
    sealing_key_file: Path
    broker: BrokerConfig
    generation: int = 1
    run_seed_file: Path | None = None
    keep_updates: bool = False
    round: RoundRules = field(default_factory=RoundRules)
    plan: Plan = field(default_factory=Plan)
    delivery: DeliveryConfig = field(default_factory=DeliveryConfig)

    def __post_init__(self) -> None:
        try:
            federation_id(self.federation)
        except RemoteProtocolError as error:
            require(False, "federation", self.federation, error.detail)
        raw = bytes.fromhex(self.root_key) if _is_hex(self.root_key) else b""
        require(len(raw) == 32, "root_key", self.root_key, "64 hex digits, as `aggregator init` wrote them")
        require(self.generation >= 1, "generation", self.generation, "at least 1")
        require(self.broker.url is not None, "broker.url", None, "name the broker: mqtt://host:port")
        problem = self.round.problem()
        require(problem is None, "round", "values that do not fit together", problem or "")
        require(
            self.round.deadline_s <= MAX_DEADLINE_S,
            "round.deadline_s",
            self.round.deadline_s,
            f"at most {MAX_DEADLINE_S} seconds (30 days)",
        )
        require(
            self.round.cohort <= MAX_COHORT,
            "round.cohort",
            self.round.cohort,
            f"at most {MAX_COHORT} devices",
        )
        problem = self.plan.problem()
        require(problem is None, "plan", "values that do not fit together", problem or "")
        unknown = [name for name in self.plan.codecs if name not in CODECS]
        require(not unknown, "plan.codecs", unknown, f"choose from {', '.join(CODECS)}")
        count = len(self.plan.codecs)
        require(count <= MAX_CODECS, "plan.codecs", list(self.plan.codecs), f"at most {MAX_CODECS} names")
        require(
            any(name in available() for name in self.plan.codecs),
            "plan.codecs",
            list(self.plan.codecs),
            f"none of them can be used here: install zstandard, or choose from {', '.join(available())}",
        )
        require(
            self.plan.scale_bits == 0, "plan.scale_bits", self.plan.scale_bits, "it follows from the cohort"
        )
        try:
            self.round_plan()
        except LocalProtocolError as error:
            require(False, "plan.max_abs_delta", self.plan.max_abs_delta, str(error))

    def round_plan(self) -> Plan:
        """The plan with the scale of the sum and the codecs that this machine can decode, best first.

        Raises LocalProtocolError if the sum of a cohort cannot be held.
        """
        bits = max_scale_bits(self.round.cohort, self.plan.max_abs_delta)
        usable = tuple(name for name in self.plan.codecs if name in available())
        return dataclasses.replace(self.plan, scale_bits=bits, codecs=usable)

    @property
    def federation_id(self) -> FederationId:
        return FederationId(self.federation)

    @property
    def root_key_bytes(self) -> bytes:
        return bytes.fromhex(self.root_key)


def load_aggregator_config(path: Path) -> AggregatorConfig:
    """``aggregator.toml``. Raises ConfigError (``settings.load``)."""
    return load(path, AggregatorConfig)


def _is_hex(text: str) -> bool:
    return len(text) % 2 == 0 and all(c in "0123456789abcdef" for c in text)
