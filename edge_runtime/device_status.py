"""What ``edge-runtime status`` tells: read from the state folder without its lock, while ``run`` goes on or not.

Each file of the folder is replaced as a whole, so each is read whole; where two belong together they are read in
the order in which one moment between two changes is shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from edge_runtime.config import DeviceConfig
from edge_runtime.device import snapshot as device_snapshot
from edge_runtime.device.policy import Violation, violations
from edge_runtime.device.snapshot import Snapshot
from edge_runtime.folder_lock import holder_of
from edge_runtime.protocol.certificates import check_device
from edge_runtime.protocol.crypto.provider import CryptoProvider
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.identities import DeviceCertificate
from edge_runtime.protocol.ids import RoundId, sha256
from edge_runtime.store import DamagedFileError, Enrolment
from edge_runtime.store.checkpoints import read_trained_s
from edge_runtime.store.device import read_enrolment, read_round
from edge_runtime.store.outbox import SET_ASIDE_SUFFIX, entry_files, read_entry, read_settled

T = TypeVar("T")


@dataclass(frozen=True)
class PendingUpdate:
    """An update that waits for its receipt. ``size``: bytes of its messages; ``since``: Unix seconds."""

    round_id: RoundId
    size: int
    since: float


@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """What a state folder holds. None, empty: nothing of that kind, or it is among ``damaged``.

    ``running``: id of the process that holds the folder, "unknown" if it does not say. ``lost_updates``: damaged
    ones that were set aside. ``checkpoint_s``: seconds of training that a restart need not do again.
    """

    folder: Path
    running: str | None = None
    enrolment: Enrolment | None = None
    certificate: DeviceCertificate | None = None
    last_round: RoundId | None = None
    settled: RoundId | None = None
    pending: tuple[PendingUpdate, ...] = ()
    lost_updates: int = 0
    checkpoint_s: float | None = None
    cached_models: int = 0
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DeviceStatus:
    """``violations``: why it may not train now; empty: it may."""

    state: DeviceState
    snapshot: Snapshot
    violations: tuple[Violation, ...]


def collect(
    config: DeviceConfig,
    provider: CryptoProvider,
    now_local: datetime,
    take: Callable[[Path, bool | None], Snapshot] = device_snapshot.take,
) -> DeviceStatus:
    """Everything, now. Changes nothing. OSError passes through."""
    snapshot = take(config.state_folder, config.policy.metered)
    return DeviceStatus(
        state=read_state(config.state_folder, provider),
        snapshot=snapshot,
        violations=violations(snapshot, config.policy, now_local),
    )


def read_state(folder: Path, provider: CryptoProvider) -> DeviceState:
    """What lies in ``folder``; damage is told, not raised. OSError passes through."""
    if not folder.is_dir():
        return DeviceState(folder=folder)
    reading = _Reading()
    outbox = folder / "outbox"
    # An update is settled first and removed then: read the other way round, one that is over may still be there.
    pending = [reading.attempt(_pending, path) for path in entry_files(outbox)]
    settled = reading.attempt(read_settled, outbox)
    enrolment = reading.attempt(read_enrolment, folder)
    certificate = None
    if enrolment is not None:
        try:
            certificate = check_device(
                provider, enrolment.root_key, enrolment.certificate, enrolment.federation, enrolment.device
            )
        except RemoteProtocolError as error:
            reading.damaged.append(f"{folder / 'enrolment'}: the certificate: {error.detail}")
    return DeviceState(
        folder=folder,
        running=holder_of(folder),
        enrolment=enrolment,
        certificate=certificate,
        last_round=reading.attempt(read_round, folder),
        settled=settled,
        pending=tuple(
            entry for entry in pending if entry is not None and (settled is None or entry.round_id > settled)
        ),
        lost_updates=len(list(outbox.glob(f"*{SET_ASIDE_SUFFIX}"))),
        checkpoint_s=reading.attempt(read_trained_s, folder / "checkpoints"),
        cached_models=len(list((folder / "blobs").glob("*.blob"))),
        damaged=tuple(reading.damaged),
    )


def to_document(status: DeviceStatus) -> dict[str, object]:
    """For ``--json``. Rounds are [generation, round]; sizes in bytes; fractions 0 to 1; None: unknown or none."""
    state = status.state
    enrolment, certificate = state.enrolment, state.certificate
    return {
        "state_folder": str(state.folder),
        "running": state.running is not None,
        "pid": int(state.running) if state.running and state.running.isdigit() else None,
        "enrolled": enrolment is not None,
        "federation": enrolment.federation if enrolment else None,
        "device": enrolment.device if enrolment else None,
        "root_sha256": sha256(enrolment.root_key.raw).hex() if enrolment else None,
        "certificate_epoch": certificate.epoch if certificate else None,
        "last_round": state.last_round,
        "last_settled_round": state.settled,
        "pending_updates": [
            {"round": entry.round_id, "bytes": entry.size, "since": entry.since} for entry in state.pending
        ],
        "lost_updates": state.lost_updates,
        "checkpoint_s": state.checkpoint_s,
        "cached_models": state.cached_models,
        "damaged": list(state.damaged),
        "may_train": not status.violations,
        "violations": [{"name": found.name, "sentence": found.sentence} for found in status.violations],
        "readings": dict(vars(status.snapshot)),
    }


def to_lines(status: DeviceStatus) -> list[tuple[str, str]]:
    """(name, text) for people."""
    state, reading = status.state, status.snapshot
    enrolment = state.enrolment
    lines = [("state", f"{state.folder}{'' if state.folder.is_dir() else ' (not there yet)'}")]
    if enrolment is None:
        lines.append(("device", "not enrolled: `edge-runtime enroll` with a token of the operator"))
    else:
        epoch = f", certificate epoch {state.certificate.epoch}" if state.certificate else ""
        lines.append(("device", f"{enrolment.device} of {enrolment.federation}{epoch}"))
        lines.append(("root key", f"SHA-256 {sha256(enrolment.root_key.raw).hex()[:32]}..."))
    lines.append(("program", f"runs as process {state.running}" if state.running else "is not running"))
    lines.append(("rounds", f"last seen {_spell(state.last_round)}, last settled {_spell(state.settled)}"))
    lines += [("update", _waiting(entry)) for entry in state.pending] or [
        ("update", "none waits for its receipt")
    ]
    if state.checkpoint_s is not None:
        lines.append(("checkpoint", f"{state.checkpoint_s:.0f} s of training kept"))
    lines += [("damaged", text) for text in state.damaged]
    if state.lost_updates:
        lines.append(("damaged", f"{state.lost_updates} updates were set aside in {state.folder / 'outbox'}"))
    lines += [("training", f"not now: {found.sentence}") for found in status.violations] or [
        ("training", "permitted now")
    ]
    known = {
        "charging": reading.charging,
        "battery": None if reading.battery is None else f"{reading.battery:.0%}",
        "temperature": None if reading.temperature_c is None else f"{reading.temperature_c:.0f} °C",
        "load of others": None if reading.load is None else f"{reading.load:.0%}",
        "free memory": _mib(reading.free_memory_bytes),
        "free disk": _mib(reading.free_disk_bytes),
        "metered network": reading.metered,
    }
    words = {True: "yes", False: "no", None: "unknown"}
    lines.append(
        (
            "machine",
            ", ".join(
                f"{name} {words[value] if value is None or isinstance(value, bool) else value}"
                for name, value in known.items()
            ),
        )
    )
    return lines


def _waiting(entry: PendingUpdate) -> str:
    since = f"{datetime.fromtimestamp(entry.since):%Y-%m-%d %H:%M}"
    return f"of round {_spell(entry.round_id)}, {entry.size} bytes, waits for its receipt since {since}"


def _spell(round_id: RoundId | None) -> str:
    return "none" if round_id is None else f"{round_id.number} (generation {round_id.generation})"


def _mib(count: int | None) -> str | None:
    return None if count is None else f"{count >> 20} MiB"


@dataclass
class _Reading:
    """Notes damage instead of raising it."""

    damaged: list[str] = field(default_factory=list)

    def attempt(self, read: Callable[[Path], T | None], path: Path) -> T | None:
        try:
            return read(path)
        except DamagedFileError as error:
            self.damaged.append(str(error))
            return None


def _pending(path: Path) -> PendingUpdate | None:
    entry = read_entry(path)
    if entry is None:
        return None
    try:
        since = path.stat().st_mtime
    except FileNotFoundError:  # settled meanwhile
        return None
    return PendingUpdate(entry.round_id, sum(len(message.payload) for message in entry.messages), since)
