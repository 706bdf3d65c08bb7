"""Model versions on disk: parameters first (durable before the ledger commits), then the files users take home."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from aggregator.files import make_private_folder, write_atomic
from aggregator.versions.model_files import parameters_npz, publish_model
from edge_runtime.protocol.artifact import PARAMETERS_FILE, Artifact
from edge_runtime.protocol.errors import Fault, FleetgradError
from edge_runtime.protocol.ids import Digest, sha256
from edge_runtime.protocol.tensors import Vector, vector_from_bytes, vector_to_bytes

PARAMETERS = "params.bin"
MODEL = "model.onnx"
ARRAYS = "model.npz"
DESCRIPTION = "version.json"
PUBLIC_MODE = 0o644
_REMOVED = ".removed-"


class VersionError(
    FleetgradError,
    fault=Fault.OPERATOR,
    remedy="choose a version that is on disk, or restore its folder from a backup",
):
    """A version's files are missing or not what the ledger says."""


class VersionStore:
    """``folder/000012/``: params.bin (float32 little-endian, shape (d,)), model.onnx, model.npz, version.json.

    ``keep``: how many of the newest versions stay on disk; 0: all.
    """

    def __init__(self, folder: Path, artifact: Artifact, *, keep: int = 0) -> None:
        self._folder = folder
        self._artifact = artifact
        self._keep = keep
        make_private_folder(folder)

    @property
    def parameter_count(self) -> int:
        return self._artifact.manifest.parameter_count

    def path(self, version: int) -> Path:
        return self._folder / f"{version:06d}"

    def initial_digest(self) -> Digest:
        """Of version 0: the artifact's own parameters."""
        return sha256(self._artifact.files[PARAMETERS_FILE])

    def write_parameters(self, version: int, theta: Vector) -> Digest:
        """Durable when this returns; the same version again is overwritten with the same bytes."""
        raw = vector_to_bytes(theta)
        make_private_folder(self.path(version))
        write_atomic(self.path(version) / PARAMETERS, raw)
        return sha256(raw)

    def read_parameters(self, version: int, digest: Digest) -> Vector:
        """Shape (d,), float32. Raises VersionError unless the bytes have this digest."""
        path = self.path(version) / PARAMETERS
        if version == 0:
            raw = self._artifact.files[PARAMETERS_FILE]
        else:
            try:
                raw = path.read_bytes()
            except OSError as error:
                self._check_kept(version)
                raise VersionError(f"{path}: {error.strerror}; restore it from a backup") from error
        if sha256(raw) != digest:
            raise VersionError(
                f"version {version} in {path} is not what the ledger committed; restore a backup"
            )
        return vector_from_bytes(self.parameter_count, raw)

    def publish(self, version: int, theta: Vector, description: Mapping[str, object]) -> Path:
        """Write the files users take home; doing it again is fine. Returns the folder."""
        manifest = self._artifact.manifest
        folder = self.path(version)
        make_private_folder(folder)
        model = publish_model(self._artifact.files["infer.onnx"], manifest.parameters, theta)
        write_atomic(folder / MODEL, model, mode=PUBLIC_MODE)
        write_atomic(folder / ARRAYS, parameters_npz(manifest.parameters, theta), mode=PUBLIC_MODE)
        text = json.dumps({"version": version, **description}, indent=1, sort_keys=True) + "\n"
        write_atomic(folder / DESCRIPTION, text.encode(), mode=PUBLIC_MODE)
        return folder

    def export(self, version: int, target: Path) -> tuple[Path, ...]:
        """Copy model.onnx and model.npz of a published version. Raises VersionError."""
        copies = []
        target.mkdir(parents=True, exist_ok=True)
        for name in (MODEL, ARRAYS):
            source = self.path(version) / name
            if not source.exists():
                self._check_kept(version)
                raise VersionError(f"version {version} has not been published: {source} is missing")
            copies.append(Path(shutil.copyfile(source, target / name)))
        return tuple(copies)

    def prune(self, newest: int) -> tuple[int, ...]:
        """Remove the versions before the last ``keep``; the ledger goes on knowing them. Gives their numbers.

        Killed half-way, the next call finishes it: a version's folder goes out of the way whole. What the system
        does not let us remove stays until then too: room is no reason to stop rounds.
        """
        if self._keep == 0:
            return ()
        for left in self._folder.glob(f"{_REMOVED}*"):
            shutil.rmtree(left, ignore_errors=True)
        old = self.kept(newest - self._keep)
        for version in old:
            path = self.path(version)
            with contextlib.suppress(OSError):
                shutil.rmtree(path.rename(path.with_name(f"{_REMOVED}{path.name}")))
        return old

    def kept(self, newest: int) -> tuple[int, ...]:
        """The versions up to this one that are on disk."""
        found = ((int(path.name), path) for path in self._folder.iterdir() if path.name.isdecimal())
        return tuple(
            sorted(version for version, path in found if version <= newest and path == self.path(version))
        )

    def _check_kept(self, version: int) -> None:
        if version > 0 and not self.path(version).exists():
            raise VersionError(
                f"version {version} is no longer on disk: [versions] keep = {self._keep} keeps the newest only; "
                f"put {self.path(version)} back from a backup, or choose a newer version"
            )
