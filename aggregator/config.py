"""What ``aggregator.toml`` says. ``aggregator init`` writes the commented file; a test parses it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from aggregator.core.step import RoundRules
from edge_runtime.protocol.chunks import DEFAULT_CHUNK_BYTES, MAX_CHUNK_BYTES, MIN_CHUNK_BYTES
from edge_runtime.protocol.codecs import CODECS
from edge_runtime.protocol.errors import LocalProtocolError, RemoteProtocolError
from edge_runtime.protocol.fixed_point import max_scale_bits
from edge_runtime.protocol.ids import FederationId, federation_id
from edge_runtime.protocol.plan import Plan
from edge_runtime.settings import load, require
from edge_runtime.transport.broker_config import BrokerConfig


@dataclass(frozen=True, kw_only=True)
class RoundConfig:
    """See ``core.step.RoundRules``: counts of devices, times in seconds."""

    rounds: int = 100
    cohort: int = 5
    goal: int = 4
    minimum: int = 3
    deadline_s: float = 300.0
    fleet: int = 0
    patience_s: float = 30.0
    retry_s: float = 1.0

    def __post_init__(self) -> None:
        problem = self.rules().problem()
        require(problem is None, "round", "values that do not fit together", problem or "")

    def rules(self) -> RoundRules:
        return RoundRules(**self.__dict__)


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """See ``protocol.plan.Plan``; the scale of the sum follows from the cohort."""

    epochs: int = 1
    steps: int = 0
    batch_size: int = 32
    learning_rate: float = 0.05
    momentum: float = 0.9
    max_grad_norm: float = 5.0
    beta: float = 0.0
    sample_cap: int = 10_000
    max_abs_delta: float = 64.0
    codecs: tuple[str, ...] = ("int8-block+zstd", "int8-block+zlib")

    def __post_init__(self) -> None:
        problem = self._plan(0).problem()
        require(problem is None, "plan", "values that do not fit together", problem or "")
        unknown = [name for name in self.codecs if name not in CODECS]
        require(not unknown, "codecs", unknown, f"choose from {', '.join(CODECS)}")

    def plan(self, cohort: int) -> Plan:
        """The plan for rounds of this many devices. Raises LocalProtocolError if their sum cannot be held."""
        return self._plan(max_scale_bits(cohort, self.max_abs_delta))

    def _plan(self, scale_bits: int) -> Plan:
        return Plan(**self.__dict__, scale_bits=scale_bits)


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
    round: RoundConfig = field(default_factory=RoundConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
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
        try:
            self.plan.plan(self.round.cohort)
        except LocalProtocolError as error:
            require(False, "plan.max_abs_delta", self.plan.max_abs_delta, str(error))

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
