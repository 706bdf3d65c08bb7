"""An artifact as a folder on disk."""

from __future__ import annotations

from pathlib import Path

from edge_runtime.protocol.artifact import (
    FILES,
    MANIFEST_FILE,
    MAX_BUNDLE_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_PARAMETER_COUNT,
    PARAMETERS_FILE,
    Artifact,
    ArtifactManifest,
    device_bundle,
)
from edge_runtime.protocol.errors import Fault, FleetgradError, RemoteProtocolError
from edge_runtime.protocol.tensors import Vector, vector_from_bytes


class ArtifactFolderError(
    FleetgradError, fault=Fault.MODELLER, remedy="build the artifact again with `model-export build`"
):
    """A folder that holds no artifact, or one that was changed after it was built."""


def read_artifact_folder(path: Path) -> Artifact:
    """The artifact in a folder that ``model-export build`` wrote, every digest verified; other files are ignored.

    Raises ArtifactFolderError, naming the file.
    """
    try:
        manifest = ArtifactManifest.from_bytes(_read(path / MANIFEST_FILE, MAX_MANIFEST_BYTES))
        return Artifact(manifest, {name: _read(path / name, _limit(name)) for name in FILES})
    except RemoteProtocolError as error:
        raise ArtifactFolderError(
            f"{path}: {error.detail}. Build the artifact again with model-export build."
        ) from error


def folder_bundle(artifact: Artifact) -> bytes:
    """The blob a device fetches (protocol.artifact.device_bundle) of an artifact that was read from a folder."""
    return device_bundle({**artifact.files, MANIFEST_FILE: artifact.manifest.to_bytes()})


def initial_parameters(artifact: Artifact) -> Vector:
    """The theta of shape (d,) that the artifact starts from. Raises ArtifactFolderError for a device's bundle."""
    if PARAMETERS_FILE not in artifact.files:
        raise ArtifactFolderError(f"this artifact has no {PARAMETERS_FILE}: it came as a device's bundle")
    return vector_from_bytes(artifact.manifest.parameter_count, artifact.files[PARAMETERS_FILE])


def _limit(name: str) -> int:
    return 4 * MAX_PARAMETER_COUNT if name == PARAMETERS_FILE else MAX_BUNDLE_BYTES


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise ArtifactFolderError(
            f"{path}: {error.strerror or error}. An artifact folder is what model-export build --out writes."
        ) from error
    if len(content) > limit:
        raise ArtifactFolderError(f"{path} is larger than {limit} bytes")
    return content
