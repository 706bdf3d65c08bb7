"""The artifact: what ``model-export build`` makes and a device trains with. Manifest, files, digests, bundle.

A manifest has one spelling: sorted keys, one-space indent, no timestamps. Any other bytes are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.ids import Digest, sha256
from edge_runtime.protocol.parsing import parse
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.tensors import TensorError, TensorSpec, layout, parameter_count
from edge_runtime.protocol.wire_pb2 import Bundle

FORMAT = 2
MANIFEST_FILE = "manifest.json"
PARAMETERS_FILE = "params.bin"
# What a step of each family of optimisers carries on: the vectors of shape (p,) beside the parameters.
OPTIMIZERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum",)}
)
GRAPH_FILES = (
    *(f"apply_{optimizer}.onnx" for optimizer in OPTIMIZERS),
    *("eval.onnx", "grad.onnx", "infer.onnx"),
    *(f"step_{optimizer}.onnx" for optimizer in OPTIMIZERS),
)
FILES = tuple(sorted((*GRAPH_FILES, PARAMETERS_FILE)))
DTYPES = ("bool", "float32", "int32", "int64", "uint8")
LOSSES = ("bce_with_logits", "cross_entropy", "custom", "mse")

MAX_MANIFEST_BYTES = 1 << 20
MAX_BUNDLE_BYTES = 32 << 20
MAX_PARAMETER_COUNT = 1 << 28  # 1 GiB of float32: far above what these devices train
MAX_TENSORS = 4096
MAX_RANK = 8

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ValueSpec:
    """An input or output of the graphs: one of DTYPES; ``shape`` is that of one sample, without the batch."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TargetSpec(ValueSpec):
    """What the loss compares with. ``classes``: labels are in [0, classes) (cross entropy); None: not labels."""

    classes: int | None = None


class FileEntry(NamedTuple):
    """SHA-256 and bytes of one file."""

    sha256: Digest
    size: int


@dataclass(frozen=True, kw_only=True)
class ArtifactManifest:
    """What the graphs expect.

    ``parameters`` covers theta: the trainable tensors, then ``buffers`` tensors that training changes without a
    gradient (running statistics of BatchNorm). ``dropout``: the training graphs take an int64 ``dropout_seed``.
    ``optimizers``: the vectors of shape (p,) that a step of each family carries on.
    """

    name: str
    opset: int
    parameters: tuple[TensorSpec, ...]
    inputs: tuple[ValueSpec, ...]
    target: TargetSpec
    outputs: tuple[ValueSpec, ...]
    loss: str
    buffers: int = 0
    dropout: bool = False
    optimizers: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: OPTIMIZERS)
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    @property
    def parameter_count(self) -> int:
        """d = p + b, the length of theta."""
        return parameter_count(self.parameters)

    @property
    def trainable_count(self) -> int:
        """p: how many elements of theta, from its beginning, have a gradient."""
        return parameter_count(self.parameters[: len(self.parameters) - self.buffers])

    @property
    def buffer_count(self) -> int:
        """b: how many elements at the end of theta are buffers."""
        return self.parameter_count - self.trainable_count

    def to_bytes(self) -> bytes:
        """The one spelling of this manifest, ASCII JSON."""
        document = {
            "buffers": self.buffers,
            "dropout": self.dropout,
            "files": {
                name: {"sha256": entry.sha256.hex(), "size": entry.size} for name, entry in self.files.items()
            },
            "format": FORMAT,
            "inputs": [_value_document(value) for value in self.inputs],
            "loss": self.loss,
            "name": self.name,
            "opset": self.opset,
            "optimizers": {name: list(vectors) for name, vectors in self.optimizers.items()},
            "outputs": [_value_document(value) for value in self.outputs],
            "parameter_count": self.parameter_count,
            "parameters": [{"name": spec.name, "shape": list(spec.shape)} for spec in self.parameters],
            "target": {**_value_document(self.target), "classes": self.target.classes},
        }
        return (json.dumps(document, sort_keys=True, indent=1) + "\n").encode("ascii")

    @classmethod
    def from_bytes(cls, raw: bytes) -> ArtifactManifest:
        """Parses ``to_bytes``.

        Raises RemoteProtocolError: TOO_LARGE, or MALFORMED for anything ``to_bytes`` would not have written.
        """
        if len(raw) > MAX_MANIFEST_BYTES:
            raise RemoteProtocolError(
                Reject.TOO_LARGE, f"artifact manifest of {len(raw)} bytes, limit {MAX_MANIFEST_BYTES}"
            )
        try:
            document = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise _malformed("it is not JSON") from error
        manifest = _parse(document)
        if manifest.to_bytes() != raw:
            raise _malformed("it is not in canonical form (sorted keys, no duplicates, no unknown keys)")
        return manifest


@dataclass(frozen=True)
class Artifact:
    """A manifest and the bytes it names, held in memory; every digest has been verified.

    ``files`` holds GRAPH_FILES, and PARAMETERS_FILE unless the artifact came as a device's bundle.
    Raises RemoteProtocolError: BAD_DIGEST for other bytes, MALFORMED for a missing or unknown file.
    """

    manifest: ArtifactManifest
    files: Mapping[str, bytes]

    def __post_init__(self) -> None:
        for name in GRAPH_FILES:
            if name not in self.files:
                raise _malformed(f"file {name} is missing")
        for name, content in self.files.items():
            entry = self.manifest.files.get(name)
            if entry is None:
                raise _malformed(f"the manifest does not list the file {name[:60]!r}")
            if len(content) != entry.size or sha256(content) != entry.sha256:
                raise RemoteProtocolError(
                    Reject.BAD_DIGEST, f"artifact file {name} is not what the manifest names"
                )
        object.__setattr__(self, "files", MappingProxyType(dict(self.files)))

    @cached_property
    def digest(self) -> Digest:
        """SHA-256 of the manifest, hence of every file."""
        return sha256(self.manifest.to_bytes())


def device_bundle(files: Mapping[str, bytes]) -> bytes:
    """The files of an artifact folder, manifest included, as the blob a device fetches: all but params.bin.

    Deterministic: files sorted by name. Raises as Artifact does, or TOO_LARGE above MAX_BUNDLE_BYTES.
    """
    if MANIFEST_FILE not in files:
        raise _malformed(f"file {MANIFEST_FILE} is missing")
    Artifact(
        ArtifactManifest.from_bytes(files[MANIFEST_FILE]),
        {name: content for name, content in files.items() if name != MANIFEST_FILE},
    )
    bundle = Bundle()
    for name in sorted((*GRAPH_FILES, MANIFEST_FILE)):
        bundle.files.add(name=name, content=files[name])
    raw = bundle.SerializeToString(deterministic=True)
    if len(raw) > MAX_BUNDLE_BYTES:
        raise RemoteProtocolError(
            Reject.TOO_LARGE, f"the artifact's graphs have {len(raw)} bytes, limit {MAX_BUNDLE_BYTES}"
        )
    return raw


def from_bundle(raw: bytes) -> Artifact:
    """The artifact out of a bundle; the names are exactly those of the table, in order.

    Raises RemoteProtocolError: TOO_LARGE, MALFORMED, BAD_DIGEST.
    """
    if len(raw) > MAX_BUNDLE_BYTES:
        raise RemoteProtocolError(
            Reject.TOO_LARGE, f"artifact bundle of {len(raw)} bytes, limit {MAX_BUNDLE_BYTES}"
        )
    bundle = parse(Bundle, raw)
    if [file.name for file in bundle.files] != sorted((*GRAPH_FILES, MANIFEST_FILE)):
        raise _malformed("the bundle does not hold the files of an artifact, each once, sorted by name")
    files = {file.name: file.content for file in bundle.files}
    return Artifact(ArtifactManifest.from_bytes(files.pop(MANIFEST_FILE)), files)


# ---- parsing ----------------------------------------------------------------------------------------


def _malformed(detail: str) -> RemoteProtocolError:
    return RemoteProtocolError(Reject.MALFORMED, f"artifact: {detail}")


def _value_document(value: ValueSpec) -> dict[str, Any]:
    return {"name": value.name, "dtype": value.dtype, "shape": list(value.shape)}


def _parse(document: object) -> ArtifactManifest:
    top = _Table(document, "manifest")
    if (found := top.integer("format")) != FORMAT:
        remedy = "build it again with model-export" if found < FORMAT else "update this software"
        raise _malformed(f"format {found} is not known here (known: {FORMAT}); {remedy}")
    parameters = [_Table(entry, "parameters") for entry in top.array("parameters")]
    try:
        specs = layout([(entry.name("name"), entry.shape("shape")) for entry in parameters])
    except TensorError as error:
        raise _malformed(str(error)) from error
    if not 1 <= parameter_count(specs) <= MAX_PARAMETER_COUNT:
        raise _malformed(
            f"{parameter_count(specs)} parameters; between 1 and {MAX_PARAMETER_COUNT} are allowed"
        )
    if not 0 <= (buffers := top.integer("buffers")) < len(specs):
        raise _malformed(f"{buffers} of {len(specs)} tensors are buffers; at least one must be trained")
    if type(dropout := top.get("dropout")) is not bool:
        raise _malformed("manifest.dropout must be true or false")
    if top.get("optimizers") != {name: list(vectors) for name, vectors in OPTIMIZERS.items()}:
        raise _malformed(f"optimizers must be {', '.join(OPTIMIZERS)}, with the vectors they carry on")
    target = _Table(top.get("target"), "target")
    classes = None if target.get("classes") is None else target.integer("classes")
    files = _Table(top.get("files"), "files")
    if sorted(files.document) != list(FILES):
        raise _malformed(f"files must be {', '.join(FILES)}")
    entries = {name: _file(files.get(name), name) for name in FILES}
    if entries[PARAMETERS_FILE].size != 4 * parameter_count(specs):
        raise _malformed(
            f"{PARAMETERS_FILE} must have 4 bytes for each of {parameter_count(specs)} parameters"
        )
    return ArtifactManifest(
        name=top.name("name"),
        opset=top.integer("opset"),
        parameters=specs,
        inputs=tuple(_value(entry, "inputs") for entry in top.array("inputs")),
        target=TargetSpec(*_value_fields(target), classes),
        outputs=tuple(_value(entry, "outputs") for entry in top.array("outputs")),
        loss=top.word("loss", LOSSES),
        buffers=buffers,
        dropout=dropout,
        files=entries,
    )


def _value(document: object, where: str) -> ValueSpec:
    return ValueSpec(*_value_fields(_Table(document, where)))


def _value_fields(table: _Table) -> tuple[str, str, tuple[int, ...]]:
    return table.name("name"), table.word("dtype", DTYPES), table.shape("shape")


def _file(document: object, name: str) -> FileEntry:
    table = _Table(document, name)
    digest = table.get("sha256")
    if not isinstance(digest, str) or not _HEX_DIGEST.fullmatch(digest):
        raise _malformed(f"{name}.sha256 must be 64 hex digits")
    return FileEntry(Digest(bytes.fromhex(digest)), table.integer("size"))


def _name(value: object, where: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise _malformed(f"{where} must be 1-200 of A-Z a-z 0-9 _ . -")
    return value


class _Table:
    """A JSON object whose fields are read with their type, or refused with their path."""

    def __init__(self, document: object, where: str) -> None:
        if not isinstance(document, dict):
            raise _malformed(f"{where} must be an object")
        self.document: dict[str, Any] = document
        self.where = where

    def get(self, key: str) -> object:
        if key not in self.document:
            raise _malformed(f"{self.where}.{key} is missing")
        return self.document[key]

    def integer(self, key: str) -> int:
        value = self.get(key)
        if type(value) is not int or not 0 <= value < 1 << 40:  # a bool is no number here
            raise _malformed(f"{self.where}.{key} must be a whole number from 0 to 2^40")
        return value

    def name(self, key: str) -> str:
        return _name(self.get(key), f"{self.where}.{key}")

    def word(self, key: str, choices: tuple[str, ...]) -> str:
        value = self.get(key)
        if not isinstance(value, str) or value not in choices:
            raise _malformed(f"{self.where}.{key} must be one of {', '.join(choices)}")
        return value

    def array(self, key: str) -> list[object]:
        value = self.get(key)
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_TENSORS:
            raise _malformed(f"{self.where}.{key} must be an array of 1 to {MAX_TENSORS}")
        return value

    def shape(self, key: str) -> tuple[int, ...]:
        value = self.get(key)
        if (
            not isinstance(value, list)
            or len(value) > MAX_RANK
            or any(type(size) is not int or not 1 <= size <= MAX_PARAMETER_COUNT for size in value)
        ):
            raise _malformed(f"{self.where}.{key} must be at most {MAX_RANK} whole numbers, each at least 1")
        return tuple(value)
