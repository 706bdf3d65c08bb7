"""What ``aggregator.toml`` says. ``aggregator init`` writes the commented file; a test parses it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aggregator.core.round_rules import RoundRules
from aggregator.monitoring.listen import parse_listen
from aggregator.plan_presets import with_preset
from edge_runtime.protocol.chunks import DEFAULT_CHUNK_BYTES, MAX_CHUNK_BYTES, MIN_CHUNK_BYTES
from edge_runtime.protocol.codecs import CODECS, available
from edge_runtime.protocol.errors import LocalProtocolError, RemoteProtocolError
from edge_runtime.protocol.fixed_point import max_scale_bits
from edge_runtime.protocol.ids import FederationId, federation_id
from edge_runtime.protocol.manifest import MAX_COHORT
from edge_runtime.protocol.parsing import MAX_CODECS
from edge_runtime.protocol.plan import OPTIMIZERS, Plan
from edge_runtime.protocol.schedules import SHAPES
from edge_runtime.settings import BadSetting, ConfigError, Problem, read_document, require, structure
from edge_runtime.transport.broker_config import BrokerConfig

MAX_DEADLINE_S = 30 * 24 * 3600
_TOGETHER = "values that do not fit together"


@dataclass(frozen=True, kw_only=True)
class DeliveryConfig:
    """How blobs travel: ``aggregator.blob_server.BlobServer`` says what the values do."""

    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    gather_s: float = 0.03
    bytes_per_s: float = 100e6

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
class MonitoringConfig:
    """``listen``: host:port of /metrics, /healthz and /readyz; empty: they are not offered.

    ``stalled_s``: /healthz fails when the serving loop has not turned for so long.
    """

    listen: str = ""
    stalled_s: float = 300.0

    def __post_init__(self) -> None:
        if self.listen:
            try:
                parse_listen(self.listen)
            except ValueError as error:
                require(False, "listen", self.listen, f'{error}, as in "127.0.0.1:9464"')
        require(self.stalled_s >= 5, "stalled_s", self.stalled_s, "at least 5 seconds")


@dataclass(frozen=True, kw_only=True)
class VersionsConfig:
    """``keep``: how many of the newest versions stay on disk; 0: all."""

    keep: int = 0

    def __post_init__(self) -> None:
        require(self.keep >= 0, "keep", self.keep, "0 (all) or more")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out data for the versions. ``data``: an .npz; None: no evaluation.

    inputs, target: names of its arrays, inputs in the order of the model's. every: of so many versions one.
    """

    data: Path | None = None
    inputs: tuple[str, ...] = ("x",)
    target: str = "y"
    every: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        require(len(self.inputs) > 0, "inputs", list(self.inputs), "at least one name")
        require(self.every >= 1, "every", self.every, "at least 1")
        require(1 <= self.threads <= 256, "threads", self.threads, "1 to 256")


@dataclass(frozen=True, kw_only=True)
class AggregatorConfig:
    """``folder``: all state of the aggregator; ``root_key``: hex of the registrar's public key.

    round, plan: as ``core.round_rules.RoundRules`` and ``protocol.plan.Plan`` say; ``plan.scale_bits`` is not to be
        set, and of ``plan.codecs`` those are offered that can be used here. ``plan.preset`` is a key of the file
        only (``plan_presets``).
    run_seed_file: 32 bytes as 64 hex digits for the selection; None: made once, kept secret in the folder.
    revocations_file: the root's list of revoked devices, read when a manifest is made; None: nobody is revoked.
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
    revocations_file: Path | None = None
    keep_updates: bool = False
    round: RoundRules = field(default_factory=RoundRules)
    plan: Plan = field(default_factory=Plan)
    delivery: DeliveryConfig = field(default_factory=DeliveryConfig)
    versions: VersionsConfig = field(default_factory=VersionsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)

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
        if problem is not None:
            raise BadSetting("round", _TOGETHER, problem)
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
        require(
            self.plan.optimizer in OPTIMIZERS,
            "plan.optimizer",
            self.plan.optimizer,
            f"choose from {', '.join(OPTIMIZERS)}",
        )
        require(
            self.plan.schedule.shape in SHAPES,
            "plan.schedule.shape",
            self.plan.schedule.shape,
            f"choose from {', '.join(SHAPES)}",
        )
        problem = self.plan.problem()
        if problem is not None:
            raise BadSetting("plan", _TOGETHER, problem)
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
    """``aggregator.toml``, the preset of its plan filled in. Raises ConfigError (``settings.load``)."""
    return aggregator_config(read_document(path), path)


def aggregator_config(document: Mapping[str, Any], path: Path) -> AggregatorConfig:
    """The parsed TOML of ``load_aggregator_config``; ``path`` names the file in errors. Raises ConfigError."""
    section = document.get("plan")
    if isinstance(section, Mapping):
        try:
            document = {**document, "plan": with_preset(section)}
        except BadSetting as error:
            raise ConfigError(path, Problem(error.key, error.found, error.allowed)) from error
    return structure(document, AggregatorConfig, path)


def _is_hex(text: str) -> bool:
    return len(text) % 2 == 0 and all(c in "0123456789abcdef" for c in text)
