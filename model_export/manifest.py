"""The artifact folder: made in memory, written beside its place and renamed, so it is never half there."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from edge_runtime.protocol.artifact import (
    FILES,
    MANIFEST_FILE,
    PARAMETERS_FILE,
    Artifact,
    ArtifactManifest,
    FileEntry,
    device_bundle,
)
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.ids import sha256
from edge_runtime.protocol.tensors import vector_to_bytes
from model_export.errors import ExportError
from model_export.graph import OPSET
from model_export.model import Model
from model_export.report import REPORT_FILE, Report


def make_artifact(model: Model, graphs: Mapping[str, bytes], *, dropout: bool) -> Artifact:
    """The graphs and the parameters as they are now, with their manifest. Raises ExportError if too large.

    ``dropout``: the training graphs take a ``dropout_seed``.
    """
    files = {**graphs, PARAMETERS_FILE: vector_to_bytes(model.theta())}
    manifest = ArtifactManifest(
        name=model.name,
        opset=OPSET,
        parameters=model.specs,
        inputs=model.input_specs,
        target=model.target_spec,
        outputs=model.output_specs,
        loss=model.loss.kind,
        buffers=len(model.buffers),
        dropout=dropout,
        files={name: FileEntry(sha256(files[name]), len(files[name])) for name in FILES},
    )
    raw = manifest.to_bytes()
    try:
        device_bundle({**files, MANIFEST_FILE: raw})
    except RemoteProtocolError as error:
        raise ExportError(f"devices would refuse this artifact: {error.detail}") from error
    return Artifact(manifest, files)


def check_name(name: str) -> None:
    """Raises ExportError unless a manifest can hold the model's ``name``."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", name):
        raise ExportError(
            f"the name {name!r} must be 1-200 of A-Z a-z 0-9 _ . - and begin with none of . -; see --name"
        )


def check_destination(out: Path) -> None:
    """Raises ExportError unless ``out`` is absent, an empty folder, or an artifact that may be replaced."""
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir() or out.is_symlink():
        raise ExportError(f"{out} exists and is no folder; choose another --out")
    foreign = sorted({entry.name for entry in out.iterdir()} - {*FILES, MANIFEST_FILE, REPORT_FILE})
    if foreign:
        raise ExportError(
            f"{out} holds other things than an artifact ({', '.join(foreign[:3])}); choose another --out"
        )


def write_artifact(artifact: Artifact, out: Path, report: Report | None = None) -> None:
    """Writes the folder, in place of an artifact that is there. Raises ExportError; ``out`` is then as it was.

    ``report``: left beside it for the reader; no part of the artifact.
    """
    check_destination(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
            new, old = Path(work, "new"), Path(work, "old")
            new.mkdir()
            for name, content in artifact.files.items():
                (new / name).write_bytes(content)
            (new / MANIFEST_FILE).write_bytes(artifact.manifest.to_bytes())
            if report:
                (new / REPORT_FILE).write_bytes(report.to_bytes())
            if out.exists():
                out.rename(old)
            try:
                new.rename(out)
            except OSError:
                if old.exists():
                    shutil.move(old, out)
                raise
    except OSError as error:
        raise ExportError(f"cannot write {out}: {error.strerror or error}") from error
