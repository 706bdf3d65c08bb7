"""Manifest, bundle and folder: one spelling, verified digests, and garbage is only ever the peer's fault."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.backends.artifact_folder import (
    ArtifactFolderError,
    folder_bundle,
    initial_parameters,
    read_artifact_folder,
)
from edge_runtime.protocol.artifact import ArtifactManifest, device_bundle, from_bundle
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.tensors import (
    TensorError,
    flatten,
    layout,
    unflatten,
    vector_from_bytes,
    vector_to_bytes,
)
from edge_runtime.protocol.wire_pb2 import Bundle

FOLDER = Path(__file__).parents[3] / "examples" / "digits" / "artifact"
FILES = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
MANIFEST = FILES["manifest.json"]
BUNDLE = device_bundle(FILES)


def changed(path: str, value: Any) -> bytes:
    document = json.loads(MANIFEST)
    *parents, last = path.split("/")
    node = document
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[int(last) if isinstance(node, list) else last] = value
    return (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()


def test_a_manifest_survives_a_round_trip() -> None:
    manifest = ArtifactManifest.from_bytes(MANIFEST)
    assert manifest.to_bytes() == MANIFEST
    assert manifest.parameter_count == 38_282
    assert (manifest.trainable_count, manifest.buffer_count, manifest.dropout) == (38_282, 0, False)
    assert manifest.optimizers == {"sgd": ("momentum",), "adam": ("exp_avg", "exp_avg_sq")}
    assert manifest.target.classes == 10


def test_buffers_are_the_end_of_the_vector() -> None:
    manifest = ArtifactManifest.from_bytes(changed("buffers", 2))
    assert [spec.name for spec in manifest.parameters[-2:]] == ["out.weight", "out.bias"]
    assert (manifest.trainable_count, manifest.buffer_count) == (38_282 - 650, 650)


@pytest.mark.parametrize(("version", "remedy"), [(1, "build it again"), (3, "update this software")])
def test_another_format_is_refused_with_what_to_do(version: int, remedy: str) -> None:
    with pytest.raises(RemoteProtocolError, match=remedy):
        ArtifactManifest.from_bytes(changed("format", version))


def test_a_bundle_holds_what_a_device_needs_and_no_parameters() -> None:
    artifact = from_bundle(BUNDLE)
    assert sorted(artifact.files) == [
        "apply_adam.onnx",
        "apply_sgd.onnx",
        "eval.onnx",
        "grad.onnx",
        "infer.onnx",
        "step_adam.onnx",
        "step_sgd.onnx",
    ]
    assert artifact.digest == read_artifact_folder(FOLDER).digest
    assert folder_bundle(read_artifact_folder(FOLDER)) == BUNDLE
    with pytest.raises(ArtifactFolderError, match=r"has no params\.bin"):
        initial_parameters(artifact)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format", 1),
        ("buffers", 8),
        ("buffers", -1),
        ("dropout", 0),
        ("optimizers", {"sgd": ["momentum"]}),
        ("optimizers/adam", ["exp_avg"]),
        ("optimizers/lion", ["momentum"]),
        ("opset", "18"),
        ("opset", True),
        ("extra", 1),
        ("loss", "hinge"),
        ("parameters/0/shape", [16, 0, 3, 3]),
        ("parameters/0/shape", [1 << 40]),
        ("parameters/1/name", "conv1.weight"),
        ("parameters/0/name", "../etc/passwd"),
        ("parameter_count", 7),
        ("target/classes", -1),
        ("inputs", []),
        ("inputs/0/dtype", "float64"),
        ("files/infer.onnx/sha256", "00"),
        ("files/infer.onnx/size", 1 << 50),
        ("files/params.bin/size", 4),
        ("files/evil.so", {"sha256": "00" * 32, "size": 1}),
    ],
)
def test_a_manifest_with_another_value_is_refused(path: str, value: Any) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        ArtifactManifest.from_bytes(changed(path, value))
    assert caught.value.reject is Reject.MALFORMED


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b"{" + b'"a":' * 10,
        b"\xff",
        MANIFEST + b" ",
        MANIFEST.replace(b'"loss"', b'"loss": "mse", "loss"'),
        MANIFEST.replace(b'"opset": 18', b'"opset": 1e999'),
        MANIFEST.replace(b'"opset": 18', b'"opset": ' + b"9" * 5000),
    ],
)
def test_a_second_spelling_of_a_manifest_is_refused(raw: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        ArtifactManifest.from_bytes(raw)


def test_an_oversize_manifest_or_bundle_is_refused_before_parsing() -> None:
    for parse, size in ((ArtifactManifest.from_bytes, (1 << 20) + 1), (from_bundle, (32 << 20) + 1)):
        with pytest.raises(RemoteProtocolError) as caught:
            parse(bytes(size))
        assert caught.value.reject is Reject.TOO_LARGE


def test_a_bundle_with_a_changed_graph_is_refused() -> None:
    bundle = Bundle.FromString(BUNDLE)
    bundle.files[0].content += b"\0"
    with pytest.raises(RemoteProtocolError) as caught:
        from_bundle(bundle.SerializeToString())
    assert caught.value.reject is Reject.BAD_DIGEST


@pytest.mark.parametrize("change", ["missing", "twice", "renamed", "unsorted"])
def test_a_bundle_with_other_files_is_refused(change: str) -> None:
    bundle = Bundle.FromString(BUNDLE)
    if change == "missing":
        del bundle.files[0]
    elif change == "twice":
        bundle.files.add().CopyFrom(bundle.files[0])
    elif change == "renamed":
        bundle.files[0].name = "../../.bashrc"
    else:
        bundle.files.sort(key=lambda file: file.name, reverse=True)
    with pytest.raises(RemoteProtocolError, match="does not hold the files of an artifact"):
        from_bundle(bundle.SerializeToString())


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([MANIFEST, BUNDLE]), st.data())
def test_garbage_gives_a_value_or_a_remote_error(raw: bytes, data: st.DataObject) -> None:
    mutated = bytearray(raw[: data.draw(st.integers(0, len(raw)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if mutated:
            mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    for parse in (ArtifactManifest.from_bytes, from_bundle):
        try:
            parse(bytes(mutated))
        except RemoteProtocolError as error:
            assert error.reject in (Reject.MALFORMED, Reject.BAD_DIGEST, Reject.TOO_LARGE)  # noqa: PT017


@pytest.mark.parametrize("name", ["manifest.json", "infer.onnx", "params.bin"])
def test_a_damaged_folder_is_refused_with_its_path(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "artifact")
    (folder / name).write_bytes(FILES[name][:-1])
    with pytest.raises(ArtifactFolderError, match=str(folder)):
        read_artifact_folder(folder)
    (folder / name).unlink()
    with pytest.raises(ArtifactFolderError, match="No such file"):
        read_artifact_folder(folder)


# ---- tensors ----------------------------------------------------------------------------------------

shapes = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=5)


@given(shapes)
def test_a_vector_is_its_named_parts_and_back(drawn: list[tuple[int, ...]]) -> None:
    specs = layout([(f"p{i}", shape) for i, shape in enumerate(drawn)])
    theta = np.arange(sum(spec.size for spec in specs), dtype=np.float32)
    arrays = unflatten(specs, theta)
    assert [array.shape for array in arrays.values()] == drawn
    np.testing.assert_array_equal(flatten(specs, arrays), theta)
    np.testing.assert_array_equal(vector_from_bytes(theta.size, vector_to_bytes(theta)), theta)


def test_arrays_that_do_not_fit_are_refused() -> None:
    specs = layout([("a", (2, 3)), ("b", ())])
    good = {"a": np.zeros((2, 3), np.float32), "b": np.zeros((), np.float32)}
    for bad in (
        {"a": good["a"]},
        {**good, "c": good["b"]},
        {**good, "a": np.zeros(6, np.float32)},
        {**good, "b": np.zeros(())},
    ):
        with pytest.raises(TensorError):
            flatten(specs, bad)  # type: ignore[arg-type]
    for vector in (np.zeros(8, np.float32), np.zeros(7), np.zeros((7, 1), np.float32)):
        with pytest.raises(TensorError):
            unflatten(specs, vector)  # type: ignore[arg-type]
    for pairs in ([("a", (1,)), ("a", (1,))], [("a", (0,))]):
        with pytest.raises(TensorError):
            layout(pairs)
    with pytest.raises(TensorError):
        vector_from_bytes(2, b"1234567")
