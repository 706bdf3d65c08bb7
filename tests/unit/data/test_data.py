"""Local data: what fits is converted without changing a value, what does not is named with its row."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_runtime.data import DataError, NpzFile, PythonFunction, fit_dataset, load_dataset
from edge_runtime.protocol.artifact import ArtifactManifest, TargetSpec, ValueSpec
from edge_runtime.protocol.tensors import layout

CLASSIFIER = ArtifactManifest(
    name="m",
    opset=18,
    parameters=layout([("w", (2, 3))]),
    inputs=(ValueSpec("x", "float32", (2,)),),
    target=TargetSpec("y", "int64", (), 3),
    outputs=(ValueSpec("logits", "float32", (3,)),),
    loss="cross_entropy",
)
REGRESSION = ArtifactManifest(
    name="m",
    opset=18,
    parameters=layout([("w", (2, 3))]),
    inputs=(ValueSpec("x", "float32", (2,)), ValueSpec("token", "int32", (4,))),
    target=TargetSpec("y", "float32", (1,)),
    outputs=(ValueSpec("out", "float32", (1,)),),
    loss="mse",
)
X = np.arange(10, dtype=np.float64).reshape(5, 2)
Y = np.array([0, 1, 2, 1, 0], dtype=np.int32)


def with_value(array, row, value):
    changed = array.copy()
    changed[row] = value
    return changed


def test_data_that_fits_gets_the_types_of_the_model_in_c_order():
    dataset = fit_dataset([np.asfortranarray(X)], Y, CLASSIFIER)
    assert dataset.samples == 5
    assert (dataset.inputs[0].dtype, dataset.target.dtype) == (np.float32, np.int64)
    assert dataset.inputs[0].flags.c_contiguous
    np.testing.assert_array_equal(dataset.inputs[0], X)
    np.testing.assert_array_equal(dataset.target, Y)


def test_an_array_that_fits_already_is_not_copied():
    x, y = X.astype(np.float32), Y.astype(np.int64)
    dataset = fit_dataset([x], y, CLASSIFIER)
    assert np.shares_memory(dataset.inputs[0], x)
    assert np.shares_memory(dataset.target, y)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "int64", "uint64", ">f8", "float16"])
def test_numbers_become_float32_when_no_value_changes(dtype):
    x = (X % 2).astype(dtype)
    np.testing.assert_array_equal(fit_dataset([x], Y, CLASSIFIER).inputs[0], X % 2)


def test_several_inputs_are_taken_in_the_order_of_the_model():
    tokens = np.ones((5, 4), np.uint64)
    dataset = fit_dataset([X, tokens], X[:, :1], REGRESSION)
    assert [array.dtype for array in dataset.inputs] == [np.float32, np.int32]


@pytest.mark.parametrize(
    ("x", "y", "complaint"),
    [
        (X[:, :1], Y, "'x' has shape (5, 1); the model's 'x' needs (rows, 2)"),
        (np.float32(1), Y, "'x' has shape (); the model's 'x' needs (rows, 2)"),
        (X, Y[:, None], "'y' has shape (5, 1); the model's 'y' needs (rows,)"),
        (X[:4], Y, "'x' has 4, 'y' has 5"),
        (X[:0], Y[:0], "no rows"),
        (with_value(X, 3, np.nan), Y, "'x', row 3: NaN"),
        (with_value(X, 2, -np.inf), Y, "'x', row 2: infinity"),
        (with_value(X, 4, 1e300), Y, "'x', row 4: a value too large for float32"),
        (with_value(X.astype(np.int64), 1, 2**24 + 1), Y, "'x', row 1: a value outside -16777216..16777216"),
        (X.astype(np.complex64), Y, "'x' is complex64"),
        (X.astype(object), Y, "'x' is object"),
        (X.astype(str), Y, "'x' is <U"),
        (X, Y.astype(np.float32), "'y' is float32; the model's 'y' needs int64 (if they are labels"),
        (X, with_value(Y, 2, 3), "'y', row 2: label 3; the model has 3 classes, 0 to 2"),
        (X, with_value(Y, 0, -1), "'y', row 0: label -1"),
        (X, with_value(Y.astype(np.uint64), 1, 2**63), "'y', row 1: a value outside"),
    ],
)
def test_data_that_does_not_fit_is_refused_by_array_and_row(x, y, complaint):
    with pytest.raises(DataError, match=re.escape(complaint)):
        fit_dataset([x], y, CLASSIFIER)


def test_a_wrong_number_of_inputs_is_refused():
    with pytest.raises(DataError, match="takes 2 inputs, the data has 1"):
        fit_dataset([X], Y, REGRESSION)


# ---- .npz -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_is_read_and_arrays_that_nobody_asked_for_are_ignored(tmp_path, save):
    path = tmp_path / "t.npz"
    save(path, x=X, y=Y, junk=np.array([{}], dtype=object))
    dataset = load_dataset(NpzFile(path), CLASSIFIER)
    np.testing.assert_array_equal(dataset.inputs[0], X)
    with pytest.raises(DataError, match=r"no array 'labels'; it holds junk, x, y"):
        load_dataset(NpzFile(path, target="labels"), CLASSIFIER)
    with pytest.raises(DataError, match=r"type object.*objects are never loaded"):
        load_dataset(NpzFile(path, inputs=("junk",)), CLASSIFIER)
    with pytest.raises(DataError, match=r"takes 2 inputs \(x, token\), data.inputs names 1 \(x\)"):
        load_dataset(NpzFile(path), REGRESSION)


def test_a_small_file_cannot_ask_for_much_memory(tmp_path):
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, x=np.zeros((1 << 20, 2)), y=np.zeros(1 << 20, np.int64))
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match=r"above 1000000; raise data\.max_size_mb"):
        load_dataset(NpzFile(path), CLASSIFIER, max_bytes=1_000_000)


def test_a_header_that_announces_more_than_the_file_holds_is_refused_before_memory_is_taken(tmp_path):
    raw = io.BytesIO()
    np.save(raw, X)
    lying = re.sub(rb"\(5, 2\), \}( {12})", b"(5000000000000, 2), }", raw.getvalue())
    path = tmp_path / "t.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", lying)
        archive.writestr("y.npy", raw.getvalue())
    with pytest.raises(DataError, match="announces"):
        load_dataset(NpzFile(path), CLASSIFIER)


def test_garbage_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "t.npz"
    with pytest.raises(DataError, match="No such file"):
        load_dataset(NpzFile(path), CLASSIFIER)
    path.write_bytes(b"PK\x03\x04 garbage")
    with pytest.raises(DataError, match=r"not an \.npz"):
        load_dataset(NpzFile(path), CLASSIFIER)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"hello")
        archive.writestr("y.npy", b"")
    with pytest.raises(DataError, match="not an array"):
        load_dataset(NpzFile(path), CLASSIFIER)


def test_any_flipped_byte_of_an_npz_is_an_error_of_ours_or_harmless(tmp_path):
    path = tmp_path / "t.npz"
    np.savez_compressed(path, x=X, y=Y)
    good = path.read_bytes()
    for position in range(0, len(good), 3):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x55]) + good[position + 1 :])
        try:
            dataset = load_dataset(NpzFile(path), CLASSIFIER)
        except DataError:
            continue
        np.testing.assert_array_equal(dataset.inputs[0], X)
        np.testing.assert_array_equal(dataset.target, Y)


GOOD_HEADER = "{'descr': '<f8', 'fortran_order': False, 'shape': (5, 2), }"


def header_pieces(header):
    """Pieces of a header: what they make is nearly one."""
    words = [
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        ",",
        ":",
        "'",
        "\\",
        "L",
        "-",
        "1e999",
        "9" * 30,
        "None",
        "True",
        "\n  ",
    ]
    return st.lists(st.sampled_from([*words, *re.findall(r"'\w*'|'<f8'|\w+|\S", header)]), max_size=30)


@st.composite
def cut_and_spliced(draw):
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(GOOD_HEADER))] * 2)))
    middle = "".join(draw(header_pieces(GOOD_HEADER)))
    return GOOD_HEADER[:start] + middle + GOOD_HEADER[end:]


@given(header=st.one_of(st.binary(max_size=80), cut_and_spliced()), version=st.sampled_from([1, 2]))
@example(header="{'descr': '<f8'", version=1)  # tokenize.TokenError
@example(header="{'a': 1}\n  }\n }", version=1)  # IndentationError
@example(header="(" * 3000, version=2)
@example(header="{'descr': (), 'fortran_order': False, 'shape': (5, 2)}", version=1)
@example(header="{'descr': '<f8', 'fortran_order': False, 'shape': (0, 99999999999999999999)}", version=1)
@example(header="{'descr': '<f8', 'fortran_order': False, 'shape': (5L, 2L)}", version=1)  # Python 2's
@example(header="{'descr': '<f8', 'fortran_order': False, 'shape': (-5, -2)}", version=1)
@settings(deadline=None, max_examples=150)
def test_any_header_of_an_array_is_read_or_refused_and_numpy_warns_of_nothing(
    tmp_path_factory, header, version
):
    raw = header if isinstance(header, bytes) else header.encode("latin1")
    magic = b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(raw))
    path = tmp_path_factory.getbasetemp() / "header.npz"
    labels = io.BytesIO()
    np.save(labels, Y)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", magic + raw + X.tobytes())
        archive.writestr("y.npy", labels.getvalue())
    complaint, rows = "", 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            rows = load_dataset(NpzFile(path), CLASSIFIER).samples
        except DataError as error:
            complaint = str(error)
    assert rows == 5
    assert not complaint or "'x'" in complaint


# ---- python:module:function -------------------------------------------------------------------------


def test_a_function_beside_the_config_is_called(tmp_path):
    (tmp_path / "sensors_a.py").write_text(
        "import numpy as np\ndef load():\n    return np.zeros((4, 2)), np.zeros(4, int)\n"
    )
    assert load_dataset(PythonFunction("sensors_a", "load", tmp_path), CLASSIFIER).samples == 4


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("raise OSError('sensor unplugged')", "python:MODULE:load: OSError: sensor unplugged"),
        ("return 3", "returned int; it must return (inputs, target)"),
        ("return [1.0], [1]", "returned a float where a numpy array is needed"),
        ("return (np.zeros((4, 2)),) * 2, np.zeros(4, int)", "takes 1 inputs, the data has 2"),
        ("return np.full((4, 2), np.nan), np.zeros(4, int)", "python:MODULE:load: input 0, row 0: NaN"),
        ("return np.zeros((90000, 2)), np.zeros(90000, int)", "raise data.max_size_mb"),
    ],
)
def test_what_a_function_does_wrong_is_told(tmp_path, request, body, complaint):
    module = f"sensors_{abs(hash(request.node.name))}"
    (tmp_path / f"{module}.py").write_text(f"import numpy as np\ndef load():\n    {body}\n")
    with pytest.raises(DataError, match=re.escape(complaint.replace("MODULE", module))):
        load_dataset(PythonFunction(module, "load", tmp_path), CLASSIFIER, max_bytes=1_000_000)


def test_a_missing_module_or_function_is_told(tmp_path):
    with pytest.raises(DataError, match="No module named"):
        load_dataset(PythonFunction("no_such_module_here", "load", tmp_path), CLASSIFIER)
    with pytest.raises(DataError, match="no attribute 'nothing'"):
        load_dataset(PythonFunction("json", "nothing", tmp_path), CLASSIFIER)
