"""What ``device.toml`` says. ``deploy/device.toml`` is the commented sample; a test parses it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from edge_runtime.data import DataSource, NpzFile, PythonFunction
from edge_runtime.protocol.messages import MAX_TTL_S, Telemetry
from edge_runtime.settings import BadSetting, load, read_hex_file, require
from edge_runtime.transport.broker_config import BrokerConfig

PYTHON_PREFIX = "python:"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """``inputs``, ``target``: names of the arrays in an ``.npz``, the inputs in the order of the model's."""

    source: DataSource
    inputs: tuple[str, ...] = ("x",)
    target: str = "y"
    max_size_mb: int = 1024

    def __post_init__(self) -> None:
        require(len(self.inputs) > 0, "inputs", None, "name at least one array")
        names = (*self.inputs, self.target)
        require(
            len(set(names)) == len(names), "inputs", list(names), "inputs and target must be different arrays"
        )
        require(1 <= self.max_size_mb <= 1 << 20, "max_size_mb", self.max_size_mb, "1 to 1048576")


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """``threads``: of the backend while it trains."""

    threads: int = 1

    def __post_init__(self) -> None:
        require(1 <= self.threads <= 256, "threads", self.threads, "1 to 256")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """``seed_file``: 64 hex digits for the batch order; None: made once, kept in the state."""

    seed_file: Path | None = None


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """One switch for each field of ``protocol.messages.Telemetry``."""

    train_s: bool = True
    steps: bool = True
    samples: bool = True
    peak_memory_bytes: bool = True
    bytes_up: bool = True
    bytes_down: bool = True
    temperature_c: bool = True
    resends: bool = True

    def permitted(self, telemetry: Telemetry) -> Telemetry:
        """The same with every field that is switched off at 0."""
        off = {f.name: 0 for f in dataclasses.fields(self) if not getattr(self, f.name)}
        return dataclasses.replace(telemetry, **off)


@dataclass(frozen=True, kw_only=True)
class CheckinConfig:
    """``ttl_s``: seconds for which this device expects to stay available after a check-in."""

    ttl_s: int = 3600

    def __post_init__(self) -> None:
        require(1 <= self.ttl_s <= MAX_TTL_S, "ttl_s", self.ttl_s, f"1 to {MAX_TTL_S}")


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """``state_folder``: keys, journal and outbox; of one device of one federation, never copied."""

    state_folder: Path
    data: DataConfig
    broker: BrokerConfig = field(default_factory=BrokerConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    checkin: CheckinConfig = field(default_factory=CheckinConfig)


def load_device_config(path: Path) -> DeviceConfig:
    """``device.toml`` as a DeviceConfig. Raises ConfigError (``settings.load``)."""
    return load(path, DeviceConfig, {DataSource: _read_source})


def read_seed_file(path: Path) -> bytes:
    """The 32 bytes of ``training.seed_file``, 64 hex digits. Raises ConfigError."""
    return read_hex_file(path, 32)


def _read_source(value: object, folder: Path) -> DataSource:
    if not isinstance(value, str):
        raise BadSetting("", str(value)[:80], 'expected text: "data.npz" or "python:module:function"')
    if value.startswith(PYTHON_PREFIX):
        module, _, function = value.removeprefix(PYTHON_PREFIX).partition(":")
        if not all(part.isidentifier() for part in module.split(".")) or not function.isidentifier():
            raise BadSetting(
                "", f'"{value[:80]}"', "expected python:module:function, such as python:sensors:load"
            )
        return PythonFunction(module, function, folder)
    if not value.endswith(".npz") or "\0" in value:
        raise BadSetting("", f'"{value[:80]}"', "expected a file.npz or python:module:function")
    return NpzFile(folder / Path(value).expanduser())
