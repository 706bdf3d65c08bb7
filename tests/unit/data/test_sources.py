"""CSV, SQLite and folders of ``.npz``: what is declared is read, and an error names the place."""

from __future__ import annotations

import dataclasses
import re
import sqlite3
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.data import (
    CsvFile,
    DataError,
    NpzFile,
    NpzFolder,
    PythonFunction,
    SqliteQuery,
    check_source,
    load_dataset,
)
from edge_runtime.protocol.artifact import ArtifactManifest, TargetSpec, ValueSpec
from edge_runtime.protocol.tensors import layout
from edge_runtime.settings import BadSetting


def model(*inputs, target=None):
    return ArtifactManifest(
        name="m",
        opset=18,
        parameters=layout([("w", (2, 3))]),
        inputs=inputs or (ValueSpec("x", "float32", (2,)),),
        target=target or TargetSpec("y", "int64", (), 3),
        outputs=(ValueSpec("out", "float32", (3,)),),
        loss="cross_entropy",
    )


MODEL = model()
REGRESSION = model(target=TargetSpec("y", "float32", (1,)))
X = np.array([[1.5, -2.0], [0.25, 3e7], [0.0, 1e-3]], np.float32)
Y = np.array([0, 2, 1])
TEXT = "a,b,kind\n1.5,-2,0\n0.25,3e7,2\n0,1e-3,1\n"


def csv_file(tmp_path, text=TEXT, **more):
    path = tmp_path / "train.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return CsvFile(**{"file": path, "inputs": (("a", "b"),), "target": "kind", **more})


def database(tmp_path, rows, declared="a REAL, b REAL, kind INTEGER"):
    path = tmp_path / "readings #1?.db"  # a name that a URI must quote
    with sqlite3.connect(path) as connection:
        connection.execute(f"CREATE TABLE t ({declared})")
        places = ",".join("?" * len(rows[0]))
        connection.executemany(f"INSERT INTO t VALUES ({places})", rows)  # noqa: S608
    connection.close()
    return path


def query(path, **more):
    return SqliteQuery(
        **{
            "file": path,
            "query": "SELECT a, b, kind FROM t",
            "inputs": (("a", "b"),),
            "target": "kind",
            **more,
        }
    )


def refused(source, complaint, manifest=MODEL, **options):
    with pytest.raises(DataError, match=re.escape(complaint)):
        load_dataset(source, manifest, **options)


# ---- all of them ------------------------------------------------------------------------------------


@pytest.fixture(params=["npz", "folder", "csv", "sqlite", "python"])
def source(request, tmp_path):
    """The same three samples, from each source."""
    np.savez(tmp_path / "t.npz", x=X, y=Y)
    if request.param == "npz":
        return NpzFile(tmp_path / "t.npz")
    if request.param == "folder":
        (tmp_path / "d").mkdir()
        np.savez(tmp_path / "d" / "2.npz", x=X[2:].astype(np.float64), y=Y[2:])
        np.savez(tmp_path / "d" / "1.npz", x=X[:2], y=Y[:2].astype(np.uint8))
        return NpzFolder(tmp_path / "d")
    if request.param == "csv":
        return csv_file(tmp_path)
    if request.param == "sqlite":
        return query(database(tmp_path, [(*map(float, x), int(y)) for x, y in zip(X, Y, strict=True)]))
    (tmp_path / "sensors_all.py").write_text(
        f"import numpy as np\nt = np.load({str(tmp_path / 't.npz')!r})\ndef load():\n    return t['x'], t['y']\n"
    )
    return PythonFunction("sensors_all", "load", tmp_path)


def test_every_source_gives_the_same_samples_with_the_types_of_the_model(source):
    check_source(source)
    dataset = load_dataset(source, MODEL, max_bytes=1000)
    assert (dataset.inputs[0].dtype, dataset.target.dtype) == (np.float32, np.int64)
    assert dataset.inputs[0].flags.c_contiguous
    np.testing.assert_array_equal(dataset.inputs[0], X)
    np.testing.assert_array_equal(dataset.target, Y)


def test_every_source_refuses_more_bytes_than_allowed_and_another_number_of_inputs(source):
    refused(source, "raise data.max_size_mb", max_bytes=20)
    two = model(ValueSpec("x", "float32", (2,)), ValueSpec("z", "float32", (1,)))
    refused(source, "takes 2 inputs", two)


def test_the_stamp_of_a_source_changes_with_its_content_and_only_then(source, tmp_path):
    if isinstance(source, PythonFunction):
        assert source.stamp() is None  # called once
        return
    before = source.stamp()
    assert source.stamp() == before
    if isinstance(source, NpzFolder):
        np.savez(source.path / "3.npz", x=X, y=Y)
        (source.path / "4.npz.tmp").write_bytes(b"half")
        assert load_dataset(source, MODEL).samples == 6
    elif isinstance(source, SqliteQuery):
        with sqlite3.connect(source.file) as connection:
            connection.execute("INSERT INTO t VALUES (1, 1, 1)")
        connection.close()
    else:
        file = source.path if isinstance(source, NpzFile) else source.file
        file.write_bytes(file.read_bytes() + b"1,1,1\n")
    assert source.stamp() != before


# ---- CSV --------------------------------------------------------------------------------------------


def test_columns_become_the_shape_of_the_input_in_the_order_they_are_named(tmp_path):
    image = model(ValueSpec("image", "uint8", (1, 2, 2)), ValueSpec("age", "float32", ()))
    text = "age;p1;p2;p3;p4;ignored;kind\r\n30,;1;2;3;4;text;0\r\n".replace(",", ".5")
    source = csv_file(tmp_path, text, inputs=(("p1..p4",), ("age",)), delimiter=";")
    dataset = load_dataset(source, image)
    np.testing.assert_array_equal(dataset.inputs[0], np.array([[[[1, 2], [3, 4]]]], np.uint8))
    np.testing.assert_array_equal(dataset.inputs[1], np.float32([30.5]))


def test_words_in_the_target_column_are_labels_in_the_declared_order(tmp_path):
    text = 'a,b,kind\n1,2,"hot, dry"\n3,4,cold\n'
    source = csv_file(tmp_path, text, labels=("cold", "mild", "hot, dry"))
    np.testing.assert_array_equal(load_dataset(source, MODEL).target, [2, 0])
    refused(
        csv_file(tmp_path, text, labels=("cold", "mild", "x")),
        "line 2, column 'kind': 'hot, dry' is none of the labels 'cold', 'mild', 'x'",
    )
    refused(csv_file(tmp_path, text, labels=("cold", "hot, dry")), "2 labels are declared, the model has 3")
    refused(csv_file(tmp_path, text, labels=("a",)), "the model is not trained on labels", REGRESSION)


def test_two_words_are_zero_and_one_for_a_yes_or_no_model(tmp_path):
    text = "a,b,kind\n1,2,malignant\n3,4,benign\n"
    source = csv_file(tmp_path, text, labels=("benign", "malignant"))
    yes_or_no = dataclasses.replace(REGRESSION, loss="bce_with_logits")
    np.testing.assert_array_equal(load_dataset(source, yes_or_no).target, [[1.0], [0.0]])
    refused(csv_file(tmp_path, text, labels=("a", "b", "c")), "the model has 2 classes", yes_or_no)


def test_without_a_header_columns_are_named_by_number_and_a_byte_order_mark_is_no_data(tmp_path):
    source = csv_file(tmp_path, "\ufeff1,2,0\n\n3,4,1\n", header=False, inputs=(("1..2",),), target="3")
    np.testing.assert_array_equal(load_dataset(source, MODEL).inputs[0], [[1, 2], [3, 4]])


def test_a_missing_cell_is_filled_only_where_a_fill_is_declared(tmp_path):
    text = "a,b,kind\n1,,0\nnan,-999,1\n"
    refused(csv_file(tmp_path, text), "line 2, column 'b': '' is missing; declare a fill")
    source = csv_file(tmp_path, text, fill=0.5, missing=("nan", "-999"))
    np.testing.assert_array_equal(load_dataset(source, MODEL).inputs[0], [[1, 0.5], [0.5, 0.5]])
    refused(
        csv_file(tmp_path, "a,b,kind\n1,2,NA\n", fill=0.0), "line 2, column 'kind': 'NA' is missing; declare"
    )


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("x1,2,0", "line 3, column 'a': 'x1' is no number"),
        ("1,inf,0", "column 'b': 'inf' is infinite or too large for float32"),
        ("1,1e39,0", "column 'b': '1e39' is infinite or too large for float32"),
        ("1,1_000,0", "column 'b': '1_000' is no number"),
        ("1,\u0663,0", "column 'b': '\\u0663' is no number"),
        ("1,2,3", "line 3, column 'kind': '3' is outside 0 to 2"),
        ("1,2,-1", "column 'kind': '-1' is outside 0 to 2"),
        ("1,2,0.5", "column 'kind': '0.5' is no whole number, which int64 needs"),
        ("1,2," + "9" * 6000, "is no whole number"),
        ("1,2", "line 3: 2 cells, expected 3; is the delimiter ','?"),
        ("1,2,0,0", "line 3: 4 cells, expected 3"),
        ('1,2,"0', "line 3: unexpected end of data"),
        ("1,\x1b[31m" + "z" * 200 + ",0", "column 'b': '\\x1b[31mzzz"),
    ],
)
def test_a_bad_cell_is_named_by_line_column_and_value_short_and_printable(tmp_path, line, complaint):
    source = csv_file(tmp_path, f"a,b,kind\n1,2,0\n{line}\n")
    with pytest.raises(DataError, match=re.escape(complaint)) as caught:
        load_dataset(source, MODEL)
    assert str(caught.value).startswith(str(source.file))
    assert len(str(caught.value)) < len(str(source.file)) + 200
    assert str(caught.value).isprintable()


def test_bytes_that_are_no_utf_8_are_told_with_their_cell(tmp_path):
    refused(csv_file(tmp_path, b"a,b,kind\n1,\xff\xfe,0\n"), "line 2, column 'b'")


@pytest.mark.parametrize(
    ("text", "more", "complaint"),
    [
        ("", {}, "it is empty"),
        ("a,b,kind\n", {}, "no rows; at least one sample"),
        ("a,c,kind\n1,2,0\n", {}, "no column 'b'; it has 'a', 'c', 'kind'"),
        ("a,b,b,kind\n1,2,2,0\n", {}, "two columns are named 'b'"),
        (",,a,b,kind\n", {}, "no rows"),  # only the columns that are taken need names of their own
        (TEXT, {"inputs": (("a..b", "b"),)}, "column 'b' is taken twice"),
        (TEXT, {"inputs": (("b..a", "b"),)}, "no column 'b..a'"),
        (TEXT, {"inputs": (("a",),)}, "1 columns for 'x'; the model needs (rows, 2), so 2"),
        (TEXT, {"dtypes": ("int32",)}, "line 2, column 'a': '1.5' is no whole number, which int32 needs"),
    ],
)
def test_a_schema_that_does_not_fit_the_file_or_the_model_is_refused(tmp_path, text, more, complaint):
    refused(csv_file(tmp_path, text, **more), complaint)


def test_columns_that_are_not_there_and_missing_files_are_told_before_the_first_round(tmp_path):
    with pytest.raises(DataError, match="no column 'b'"):
        check_source(csv_file(tmp_path, "a,kind\n"))
    for source in (
        csv_file(tmp_path, file=tmp_path / "no.csv"),
        NpzFolder(tmp_path / "no"),
        NpzFolder(tmp_path),
        query(tmp_path / "no.db"),
        NpzFile(tmp_path / "no.npz"),
    ):
        with pytest.raises(DataError):
            check_source(source)


def test_memory_holds_the_numbers_and_not_the_file(tmp_path):
    row = "0.123456789012345,1.123456789012345678901234567890,1\n"
    source = csv_file(tmp_path, "a,b,kind\n" + row * 15_000)
    tracemalloc.start()
    try:
        dataset = load_dataset(source, MODEL)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    held = dataset.inputs[0].nbytes + dataset.target.nbytes
    assert peak < 1.6 * held + 300_000
    assert source.file.stat().st_size > 3 * held


def test_a_line_without_an_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("edge_runtime.data.csv_file.MAX_LINE_CHARACTERS", 100)
    refused(csv_file(tmp_path, "a,b,kind\n" + "1" * 101), "line 2: longer than 100 characters")


@given(st.binary(max_size=200))
def test_any_bytes_are_samples_or_an_error_of_ours(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(b"a,b,kind\n" + content)
    source = CsvFile(file=path, inputs=(("a", "b"),), target="kind")
    try:
        dataset = load_dataset(source, MODEL)
    except DataError:
        return
    assert np.isfinite(dataset.inputs[0]).all()
    assert set(dataset.target) <= {0, 1, 2}


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"inputs": ()}, "inputs"),
        ({"inputs": ((),)}, "inputs"),
        ({"inputs": (("a", "a"),)}, "inputs"),
        ({"target": "a"}, "target"),
        ({"labels": ("x", "x")}, "labels"),
        ({"dtypes": ("int32", "int32")}, "dtypes"),
        ({"dtypes": ("int32",), "fill": 0.5}, "fill"),
        ({"delimiter": "::"}, "delimiter"),
        ({"delimiter": '"'}, "delimiter"),
        ({"delimiter": "5"}, "delimiter"),
    ],
)
def test_a_schema_that_contradicts_itself_is_refused_by_key(tmp_path, more, key):
    with pytest.raises(BadSetting) as caught:
        csv_file(tmp_path, **more)
    assert caught.value.key == key


# ---- SQLite -----------------------------------------------------------------------------------------


def test_blobs_are_arrays_of_the_declared_shape(tmp_path):
    images = np.arange(8, dtype="<f4").reshape(2, 1, 2, 2)
    path = database(tmp_path, [(image.tobytes(), 1) for image in images], "image BLOB, kind INTEGER")
    manifest = model(ValueSpec("x", "float32", (1, 2, 2)))
    source = query(path, query="SELECT * FROM t", inputs=(("image",),), blob_shapes=((2, 2),))
    np.testing.assert_array_equal(load_dataset(source, manifest).inputs[0], images)
    wrong = query(
        path, query="SELECT * FROM t", inputs=(("image",),), blob_shapes=((2, 2),), dtypes=("uint8",)
    )
    refused(wrong, "row 1, column 'image': a BLOB of 16 bytes is not a BLOB of 4 bytes (uint8)", manifest)
    refused(query(path, query="SELECT * FROM t", inputs=(("image",),)), "1 columns for 'x'", manifest)


def test_rows_of_a_query_may_hold_null_text_and_words(tmp_path):
    path = database(tmp_path, [(1, None, "cold"), ("2.5", 3, "hot")], "a, b, kind")
    labels = ("cold", "mild", "hot")
    refused(query(path, labels=labels), "row 1, column 'b': None is missing")
    dataset = load_dataset(query(path, labels=labels, fill=-1), MODEL)
    np.testing.assert_array_equal(dataset.inputs[0], [[1, -1], [2.5, 3]])
    np.testing.assert_array_equal(dataset.target, [0, 2])
    refused(query(path, labels=("a", "b", "hot")), "row 1, column 'b'")


@pytest.mark.parametrize(
    ("sql", "complaint"),
    [
        ("DELETE FROM t", "data.sqlite.query is one SELECT"),
        ("SELECT a, b, kind FROM t; DELETE FROM t", "one statement"),
        ("ATTACH 'other.db' AS o", "one SELECT"),
        ("PRAGMA journal_mode=DELETE", "one SELECT"),
        ("SELECT a, kind FROM t", "the query: no column 'b'; it has 'a', 'kind'"),
        ("SELECT a FROM elsewhere", "no such table: elsewhere"),
        ("SELEC", "syntax error"),
        ("SELECT x'00' AS a, b, kind FROM t", "a BLOB of 1 bytes is a BLOB where a number is needed"),
        ("SELECT a, b, kind FROM t WHERE 0", "no rows"),
        ("-- nothing", "gives no columns"),
    ],
)
def test_a_query_that_is_no_single_select_of_these_columns_is_refused_and_changes_nothing(
    tmp_path, sql, complaint
):
    path = database(tmp_path, [(1.0, 2.0, 1)])
    before = path.read_bytes()
    refused(query(path, query=sql), complaint)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_query_has_limits_of_rows_and_time(tmp_path):
    path = database(tmp_path, [(1.0, 2.0, 1)] * 3)
    refused(query(path, max_rows=2), "more than 2 rows; raise data.sqlite.max_rows")
    endless = (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i a, i b, max(i) kind FROM n"
    )
    refused(query(path, query=endless, timeout_s=0.1), "took longer than 0.1 s; add an index")


def test_a_database_is_read_while_another_program_writes_it(tmp_path):
    path = database(tmp_path, [(1.0, 2.0, 1)])
    writer = sqlite3.connect(path, isolation_level=None)
    try:
        writer.execute("PRAGMA journal_mode=WAL")
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("INSERT INTO t VALUES (3, 4, 2)")
        assert load_dataset(query(path), MODEL).samples == 1
        writer.execute("COMMIT")
        assert load_dataset(query(path), MODEL).samples == 2
    finally:
        writer.close()


def test_a_file_that_is_no_database_is_told(tmp_path):
    path = tmp_path / "t.db"
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(DataError, match="not a database"):
        check_source(query(path))


# ---- a folder of .npz -------------------------------------------------------------------------------


def test_an_error_in_a_folder_names_the_file(tmp_path):
    np.savez(tmp_path / "1.npz", x=X, y=Y)
    np.savez(tmp_path / "2.npz", x=np.full((1, 2), np.nan), y=Y[:1])
    refused(NpzFolder(tmp_path), "2.npz: 'x', row 0: NaN")
    np.savez(tmp_path / "2.npz", x=X)
    refused(NpzFolder(tmp_path), "2.npz: no array 'y'")
    (tmp_path / "2.npz").write_bytes(b"half")
    refused(NpzFolder(tmp_path), "2.npz: damaged")


def test_a_folder_cannot_ask_for_much_memory(tmp_path):
    np.savez(tmp_path / "1.npz", x=X, y=np.empty((1 << 40, 0)))
    refused(NpzFolder(tmp_path), "above 1073741824")
