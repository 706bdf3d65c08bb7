"""What a device must not forget, in one folder: identity, enrolment, counters, outbox, blobs, checkpoint."""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from edge_runtime.folder_lock import LOCK_NAME, FolderLock
from edge_runtime.protocol.crypto.keys import SigningKey, VerifyKey
from edge_runtime.protocol.errors import LocalProtocolError, RemoteProtocolError
from edge_runtime.protocol.ids import DeviceId, FederationId, RoundId, device_id, federation_id
from edge_runtime.store import records
from edge_runtime.store.blobs import BlobCache
from edge_runtime.store.checkpoints import Checkpoints
from edge_runtime.store.files import FOLDER_MODE, TEMPORARY_SUFFIX, FileLayer
from edge_runtime.store.outbox import Outbox
from edge_runtime.store.records import DamagedFileError, StateError

SEED_BYTES = 32
SEQUENCE_BLOCK = 256
DEFAULT_BLOB_BYTES = 256 << 20
_RESTORE = "move the folder away and enrol again with a new token, under a new device name"


@dataclass(frozen=True, kw_only=True)
class Enrolment:
    """What enrolling brought. ``certificate``: encoded SignedBytes of a DeviceCertificate."""

    federation: FederationId
    device: DeviceId
    broker_url: str
    root_key: VerifyKey
    certificate: bytes


class DeviceStore:
    """The state folder, locked for this process. Every method that changes something is durable when it returns.

    Losing or copying the folder is safe for others: a lost one enrols again under a new name, a copy is refused
    by its sequence numbers. OSError (disk full, read-only) passes through.
    """

    def __init__(
        self, folder: Path, *, files: FileLayer | None = None, max_blob_bytes: int = DEFAULT_BLOB_BYTES
    ) -> None:
        """Opens or makes the folder, 0700. Temporary files of a cut-off write are removed.

        Raises FolderInUseError; StateError: not a state folder, open to other users, damaged.
        """
        self.folder = folder
        self._files = files or FileLayer()
        self._prepare()
        self._lock = FolderLock(folder)
        try:
            for name in ("outbox", "blobs", "checkpoints"):
                self._files.make_folder(folder / name)
            self._files.sync(folder)
            for path in (*folder.glob(f"*{TEMPORARY_SUFFIX}"), *folder.glob(f"*/*{TEMPORARY_SUFFIX}")):
                self._files.discard(path)
            self.outbox = Outbox(folder / "outbox", self._files)
            self.blobs = BlobCache(folder / "blobs", self._files, max_blob_bytes)
            self.checkpoints = Checkpoints(folder / "checkpoints", self._files)
            self._enrolment = read_enrolment(folder)
            self._highest_round = read_round(folder)
            self._sequence = self._reserved = self._read_sequence()
        except DamagedFileError as error:
            self.close()
            raise StateError(f"{error}; {_RESTORE}") from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> DeviceStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets the next process in."""
        self._lock.release()

    # ---- identity -----------------------------------------------------------------------------------

    def signing_key(self, generate: Callable[[], SigningKey]) -> SigningKey:
        """The device's identity; ``generate`` is called once in the folder's life. Raises StateError."""
        return SigningKey(self._secret("identity", "identity key", lambda: generate().to_bytes()))

    def seed(self, random_bytes: Callable[[int], bytes]) -> bytes:
        """32 secret bytes for the batch order; ``random_bytes`` is called once in the folder's life.

        Raises StateError.
        """
        return self._secret("seed", "device seed", lambda: random_bytes(SEED_BYTES))

    # ---- enrolment ----------------------------------------------------------------------------------

    @property
    def enrolment(self) -> Enrolment | None:
        """None until ``enrol``."""
        return self._enrolment

    def enrol(self, enrolment: Enrolment) -> None:
        """Keeps it; again for the same device of the same root, it renews certificate and broker.

        Raises StateError when the folder belongs to another federation, root key or device name.
        """
        old = self._enrolment
        if old is not None and (old.federation, old.root_key, old.device) != (
            enrolment.federation,
            enrolment.root_key,
            enrolment.device,
        ):
            same_name = old.federation == enrolment.federation and old.device == enrolment.device
            raise StateError(
                f"{self.folder} belongs to device {old.device!r} of federation {old.federation!r}"
                f"{' under another root key' if same_name else ''}: use another state_folder"
            )
        header = {
            "federation": enrolment.federation,
            "device": enrolment.device,
            "broker_url": enrolment.broker_url,
            "root_key": enrolment.root_key.raw.hex(),
        }
        self._write("enrolment", "enrolment", header, enrolment.certificate)
        self._enrolment = enrolment

    # ---- counters -----------------------------------------------------------------------------------

    @property
    def highest_round(self) -> RoundId | None:
        """The highest round seen in a verified manifest."""
        return self._highest_round

    def advance_round(self, round_id: RoundId) -> None:
        """The round that is open now. Raises LocalProtocolError below the highest seen: check that first."""
        if self._highest_round is not None and round_id < self._highest_round:
            raise LocalProtocolError(f"round {tuple(round_id)} after {tuple(self._highest_round)}")
        if round_id != self._highest_round:
            self._write(
                "round", "highest round", {"generation": round_id.generation, "round": round_id.number}
            )
            self._highest_round = round_id

    def next_sequence(self) -> int:
        """A number above every number given before, in this process and earlier ones; the first is 1.

        Numbers are reserved in blocks of 256: a crash skips the rest of a block, and repeats none.
        """
        if self._sequence == self._reserved:
            self._write("sequence", "sequence", {"reserved": self._reserved + SEQUENCE_BLOCK})
            self._reserved += SEQUENCE_BLOCK
        self._sequence += 1
        return self._sequence

    # ---- files --------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        folder = self.folder
        try:
            mode = folder.lstat().st_mode
        except FileNotFoundError:
            self._files.make_folder(folder)
            self._files.sync(folder.parent)
            return
        if not stat.S_ISDIR(mode):
            raise StateError(f"{folder} is not a folder: name another state_folder")
        if any(folder.iterdir()) and not (folder / LOCK_NAME).exists():
            raise StateError(f"{folder} holds other files: name an empty or new folder as state_folder")
        if stat.S_IMODE(mode) & ~FOLDER_MODE:
            raise StateError(f"{folder} is open to other users and holds keys: chmod 700 it")

    def _write(self, name: str, kind: str, header: Mapping[str, object], content: bytes = b"") -> None:
        self._files.replace(self.folder / name, records.encode(kind, header, [content]))

    def _secret(self, name: str, kind: str, generate: Callable[[], bytes]) -> bytes:
        try:
            record = records.read(kind, self.folder / name)
        except DamagedFileError as error:
            raise StateError(f"{error}; {_RESTORE}") from error
        if record is None:
            secret = generate()
            self._write(name, kind, {}, secret)
            return secret
        return bytes(record.content)

    def _read_sequence(self) -> int:
        record = records.read("sequence", self.folder / "sequence")
        return record.integer("reserved") if record else 0


def read_enrolment(folder: Path) -> Enrolment | None:
    """What ``DeviceStore.enrol`` kept in ``folder``, read without its lock. Raises DamagedFileError."""
    record = records.read("enrolment", folder / "enrolment")
    if record is None:
        return None
    try:
        return Enrolment(
            federation=federation_id(record.text("federation")),
            device=device_id(record.text("device")),
            broker_url=record.text("broker_url"),
            root_key=VerifyKey(record.digest("root_key")),
            certificate=bytes(record.content),
        )
    except RemoteProtocolError as error:
        raise DamagedFileError(f"{folder / 'enrolment'}: {error.detail}") from error


def read_round(folder: Path) -> RoundId | None:
    """The highest round that ``DeviceStore`` kept in ``folder``, read without its lock. Raises DamagedFileError."""
    record = records.read("highest round", folder / "round")
    return RoundId(record.integer("generation"), record.integer("round")) if record else None


def read_identity(folder: Path) -> SigningKey | None:
    """The key of ``DeviceStore.signing_key``, read without the folder's lock. Raises DamagedFileError."""
    record = records.read("identity key", folder / "identity")
    return SigningKey(bytes(record.content)) if record else None
