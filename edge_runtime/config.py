"""What ``device.toml`` says. ``deploy/device.toml`` is the commented sample; a test parses it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from edge_runtime.data import CsvFile, DataSource, NpzFile, NpzFolder, PythonFunction, SqliteQuery
from edge_runtime.device.policy import PolicyConfig
from edge_runtime.protocol.errors import LocalProtocolError
from edge_runtime.protocol.messages import MAX_TTL_S, Telemetry
from edge_runtime.settings import BadSetting, load, read_hex_file, require
from edge_runtime.transport.broker_config import BrokerConfig

PYTHON_PREFIX = "python:"
NamedSource: TypeAlias = NpzFile | NpzFolder | PythonFunction  # what one text in ``source`` can name
_SOURCES = ("source", "csv", "sqlite")
_INPUTS, _TARGET = ("x",), "y"
_FORMS = '"data.npz", "folder/" of .npz files, or "python:module:function"'
_SECTIONS = {".csv": "csv", ".tsv": "csv", ".db": "sqlite", ".sqlite": "sqlite", ".sqlite3": "sqlite"}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Exactly one of ``source``, ``csv`` and ``sqlite`` is there; ``origin`` is what it describes.

    ``inputs``, ``target``: names of the arrays in ``.npz`` files, the inputs in the order of the model's.
    """

    source: NamedSource | None = None
    inputs: tuple[str, ...] | None = None
    target: str | None = None
    csv: CsvFile | None = None
    sqlite: SqliteQuery | None = None
    max_size_mb: int = 1024

    def __post_init__(self) -> None:
        given = [key for key in _SOURCES if getattr(self, key) is not None]
        require(len(given) > 0, "source", None, f"name one of {', '.join(_SOURCES)}")
        require(len(given) == 1, given[-1], getattr(self, given[-1]), f"choose one of {' and '.join(given)}")
        has_arrays = isinstance(self.source, NpzFile | NpzFolder)
        for key in ("inputs", "target"):
            value = getattr(self, key)
            require(
                value is None or has_arrays,
                key,
                list(value) if isinstance(value, tuple) else value,
                "this names arrays of .npz files; columns are named in the section of their source",
            )
        inputs, target = self.inputs or (), self.target or _TARGET
        require(self.inputs is None or len(inputs) > 0, "inputs", None, "name at least one array")
        names = (*(inputs or _INPUTS), target)
        require(
            len(set(names)) == len(names), "inputs", list(names), "inputs and target must be different arrays"
        )
        require(1 <= self.max_size_mb <= 1 << 20, "max_size_mb", self.max_size_mb, "1 to 1048576")

    @property
    def origin(self) -> DataSource:
        """The one source, with all that is needed to read it."""
        source = self.csv or self.sqlite or self.source
        if isinstance(source, NpzFile | NpzFolder):
            return dataclasses.replace(source, inputs=self.inputs or _INPUTS, target=self.target or _TARGET)
        if source is None:
            raise LocalProtocolError("a DataConfig without a source")
        return source

    @property
    def max_bytes(self) -> int:
        """Of all arrays together."""
        return self.max_size_mb << 20


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """``threads``: of the backend while it trains."""

    threads: int = 1

    def __post_init__(self) -> None:
        require(1 <= self.threads <= 256, "threads", self.threads, "1 to 256")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """``seed_file``: 64 hex digits for the batch order; None: made once, kept in the state.

    ``checkpoint_s``: seconds of training between two checkpoints; a device killed loses at most that.
    """

    seed_file: Path | None = None
    checkpoint_s: float = 60.0

    def __post_init__(self) -> None:
        require(0.1 <= self.checkpoint_s <= 86_400, "checkpoint_s", self.checkpoint_s, "0.1 to 86400")


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
    policy: PolicyConfig = field(default_factory=PolicyConfig)


def load_device_config(path: Path) -> DeviceConfig:
    """``device.toml`` as a DeviceConfig. Raises ConfigError (``settings.load``)."""
    return load(path, DeviceConfig, {NamedSource | None: _read_source})


def read_seed_file(path: Path) -> bytes:
    """The 32 bytes of ``training.seed_file``, 64 hex digits. Raises ConfigError."""
    return read_hex_file(path, 32)


def _read_source(value: object, folder: Path) -> NamedSource:
    if not isinstance(value, str):
        raise BadSetting("", str(value)[:80], f"expected text: {_FORMS}")
    if value.startswith(PYTHON_PREFIX):
        module, _, function = value.removeprefix(PYTHON_PREFIX).partition(":")
        if not all(part.isidentifier() for part in module.split(".")) or not function.isidentifier():
            raise BadSetting(
                "", f'"{value[:80]}"', "expected python:module:function, such as python:sensors:load"
            )
        return PythonFunction(module, function, folder)
    path = folder / Path(value).expanduser()
    if value.endswith(".npz") and "\0" not in value:
        return NpzFile(path)
    if value.endswith("/") and "\0" not in value:
        return NpzFolder(path)
    section = _SECTIONS.get(path.suffix.lower())
    raise BadSetting(
        "",
        f'"{value[:80]}"',
        f"this is described in its own section, [data.{section}]" if section else f"expected {_FORMS}",
    )
