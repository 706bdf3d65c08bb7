"""The registrar's folder (0700): two key files (0600), the database, what it published, and the TLS authority.

Whoever reads it is the root.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

from aggregator.files import make_private_folder, write_atomic
from edge_runtime.protocol.errors import Fault, FleetgradError

ROOT_KEY = "root.key"
SEALING_KEY = "enrolment.key"
DATABASE = "registrar.sqlite3"
REVOCATIONS = "revocations"  # the newest signed list, in hex like a certificate file
TLS = "tls"  # a folder with the next five
AUTHORITY_CERTIFICATE = "ca.crt"
AUTHORITY_KEY = "ca.key"
OWN_CERTIFICATE = "registrar.crt"
OWN_KEY = "registrar.key"
CRL = "revoked.crl"
_MAX_BYTES = 64 * 1024
_KEY_LINE = re.compile(rb"([0-9a-f]{64})\n")


class RegistrarError(
    FleetgradError,
    fault=Fault.OPERATOR,
    remedy="check the registrar's folder; restore it from its backup if it is damaged",
):
    """The registrar cannot do what its operator asked; the text says why and what to do."""


def make_folder(folder: Path) -> None:
    """A new folder, 0700, and the path to it. Raises RegistrarError if something is there already."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    except FileExistsError:
        raise RegistrarError(
            f"{folder} exists already: a root key is never overwritten. Choose another folder, or keep this one"
        ) from None
    except OSError as error:
        raise RegistrarError(f"cannot make {folder}: {error.strerror}") from error


def new_file(path: Path, content: bytes) -> None:
    """A new file, 0600, its content on disk when this returns. Raises RegistrarError."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "wb") as file:  # noqa: PTH123 - of a descriptor
            file.write(content)
            file.flush()
            os.fsync(descriptor)
    except OSError as error:
        raise RegistrarError(f"cannot write {path}: {error.strerror}") from error


def write_key(path: Path, key: bytes) -> None:
    """32 bytes as one line of lower-case hex. Raises RegistrarError."""
    new_file(path, key.hex().encode() + b"\n")


def sync_folder(folder: Path) -> None:
    """The folder's entries, and its own in its parent, are on disk when this returns. Raises RegistrarError."""
    for path in (folder, folder.parent):
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise RegistrarError(f"cannot write {path} to disk: {error.strerror}") from error


def read_key(path: Path) -> bytes:
    """32 bytes. Raises RegistrarError: missing, readable by others, or not what ``write_key`` writes."""
    line = _KEY_LINE.fullmatch(read_secret(path))
    if line is None:
        raise RegistrarError(f"{path} does not hold a key: restore the folder from its backup")
    return bytes.fromhex(line[1].decode())


def read_file(path: Path) -> bytes:
    """At most 64 KiB. Raises RegistrarError."""
    try:
        with path.open("rb") as file:
            return file.read(_MAX_BYTES)
    except OSError as error:
        raise RegistrarError(
            f"cannot read {path}: {error.strerror}; restore the folder from its backup"
        ) from error


def read_secret(path: Path) -> bytes:
    """At most 64 KiB. Raises RegistrarError: missing, or readable by others."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with open(descriptor, "rb") as file:  # noqa: PTH123 - of a descriptor
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
            content = file.read(_MAX_BYTES)
    except OSError as error:
        raise RegistrarError(
            f"cannot read the registrar's key {path}: {error.strerror}; restore the folder from its backup, or "
            "make a new one with `aggregator init` (every device must then enrol again)"
        ) from error
    if mode & 0o077:
        raise RegistrarError(
            f"other users can read {path} (mode {mode:04o}): `chmod 600 {path}`, and think about whether the key "
            "is still secret"
        )
    return content


def check_writable(path: Path, *, force: bool, otherwise: str = "") -> bool:
    """Whether the folder holds something. Raises RegistrarError if it does and ``force`` is not set.

    otherwise: what else helps than a new folder.
    """
    try:
        used = path.exists() and any(path.iterdir())
    except OSError as error:
        raise RegistrarError(f"{path} is no folder to write to: {error.strerror}") from error
    if used and not force:
        raise RegistrarError(f"{path} is not empty: choose a new folder{otherwise}")
    return used


def write_folder(path: Path, files: Mapping[str, bytes], *, force: bool = False) -> None:
    """A new folder (0700) with these files, all or none; ``force`` replaces those of an existing one, each whole.

    Keys and tokens are 0600. Raises RegistrarError: it is in use and ``force`` is not set, or the disk.
    """
    path = path.resolve()  # "." has no name to put a suffix to
    used = check_writable(path, force=force)
    target = path if used else path.with_name(f".{path.name}.partial")
    try:
        if not used:
            shutil.rmtree(target, ignore_errors=True)  # left by a crash
            make_private_folder(target)
        for name, content in files.items():
            write_atomic(target / name, content, mode=0o600 if name.endswith((".key", ".txt")) else 0o644)
        if not used:
            target.replace(path)
            sync_folder(path)
    except OSError as error:
        raise RegistrarError(f"cannot write the folder {path}: {error.strerror}") from error
