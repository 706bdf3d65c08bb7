"""``device.toml``."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from edge_runtime.config import DataConfig, DeviceConfig, TelemetryConfig, load_device_config, read_seed_file
from edge_runtime.data import CsvFile, NpzFile, NpzFolder, PythonFunction, SqliteQuery
from edge_runtime.protocol.messages import Telemetry
from edge_runtime.settings import ConfigError

SAMPLE = Path(__file__).parents[3] / "deploy" / "device.toml"


def config(tmp_path: Path, text: str) -> DeviceConfig:
    path = tmp_path / "device.toml"
    path.write_text('state_folder = "state"\n' + text)
    return load_device_config(path)


def test_the_sample_is_valid_and_holds_the_defaults():
    assert load_device_config(SAMPLE) == DeviceConfig(
        state_folder=SAMPLE.parent / "state", data=DataConfig(source=NpzFile(SAMPLE.parent / "train.npz"))
    )


def uncommented(text: str) -> str:
    return re.sub(r"^# (\[|[a-z_0-9]+ = )", r"\1", text, flags=re.M)


def without_sections(text: str, *names: str) -> str:
    """As if they had been left commented."""
    return "".join(
        part for part in re.split(r"^(?=\[)", text, flags=re.M) if not part.startswith(tuple(names))
    )


SOURCES = {"npz": '"train.npz"', "folder": '"readings/"', "python": '"python:sensors:load"'}


@pytest.mark.parametrize("source", [*SOURCES, "csv", "sqlite"])
def test_the_sample_names_every_key_and_its_commented_lines_are_valid_for_every_source(tmp_path, source):
    text = uncommented(SAMPLE.read_text())
    for section in (DeviceConfig, *typing.get_type_hints(DeviceConfig).values(), CsvFile, SqliteQuery):
        for field in dataclasses.fields(section) if dataclasses.is_dataclass(section) else ():
            assert re.search(rf"^(\[(data\.)?{field.name}\]|{field.name} = )", text, flags=re.M), field.name
    text = without_sections(text, *{"[data.csv]", "[data.sqlite]"} - {f"[data.{source}]"})
    own = rf"^source = {SOURCES[source]}$" if source == "npz" else r"^source = .*$"
    text = re.sub(own, f"source = {SOURCES[source]}" if source in SOURCES else "", text, flags=re.M)
    if source not in ("npz", "folder"):  # the names of arrays have no meaning there
        head, data, tail = text.partition("[data]\n")
        text = head + data + re.sub(r'^(inputs = \["x"\]|target = "y")$', "", tail, flags=re.M)
    path = tmp_path / "device.toml"
    path.write_text(text)
    origin = load_device_config(path).data.origin
    kinds = {
        "npz": NpzFile,
        "folder": NpzFolder,
        "python": PythonFunction,
        "csv": CsvFile,
        "sqlite": SqliteQuery,
    }
    assert type(origin) is kinds[source]


def test_telemetry_has_one_switch_for_each_field_of_the_message():
    names = [field.name for field in dataclasses.fields(Telemetry)]
    assert [field.name for field in dataclasses.fields(TelemetryConfig)] == names
    full = Telemetry(**dict.fromkeys(names, 7))
    for name in names:
        assert TelemetryConfig(**{name: False}).permitted(full) == dataclasses.replace(full, **{name: 0})


CSV = '[data.csv]\nfile = "t.csv"\ninputs = [["a", "b"]]\ntarget = "c"\n'
SQLITE = '[data.sqlite]\nfile = "t.db"\nquery = "SELECT 1"\ninputs = [["a"]]\ntarget = "c"\n'


def test_data_come_from_files_beside_the_config_or_from_a_function(tmp_path):
    def origin(text):
        return config(tmp_path, text).data.origin

    assert origin('[data]\nsource = "d/t.npz"') == NpzFile(tmp_path / "d/t.npz", ("x",), "y")
    named = origin('[data]\nsource = "d/"\ninputs = ["a", "b"]\ntarget = "c"')
    assert named == NpzFolder(tmp_path / "d", ("a", "b"), "c")
    assert origin('[data]\nsource = "python:s.wind:load"') == PythonFunction("s.wind", "load", tmp_path)
    assert origin(CSV) == CsvFile(file=tmp_path / "t.csv", inputs=(("a", "b"),), target="c")
    assert origin(SQLITE) == SqliteQuery(
        file=tmp_path / "t.db", query="SELECT 1", inputs=(("a",),), target="c"
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "data: missing"),
        ("[data]", "data.source: nothing; name one of source, csv, sqlite"),
        (
            '[data]\nsource = "t.csv"',
            'data.source: "t.csv"; this is described in its own section, [data.csv]',
        ),
        ('[data]\nsource = "t.db"', "own section, [data.sqlite]"),
        ('[data]\nsource = "t.parquet"', 'data.source: "t.parquet"; expected "data.npz", "folder/"'),
        ('[data]\nsource = "t.npz"\n' + CSV, "t.csv; choose one of source and csv"),
        (CSV + SQLITE, "t.db; choose one of csv and sqlite"),
        ('[data]\ntarget = "z"\n' + CSV, 'data.target: "z"; this names arrays of .npz files'),
        ('[data]\ninputs = ["z"]\nsource = "python:a:b"', "data.inputs: an array of 1; this names arrays"),
        (CSV + "quote = 1", "data.csv.quote: unknown key; allowed here: inputs, target, labels"),
        (CSV + 'delimiter = ",,"', 'data.csv.delimiter: ",,"; one character'),
        (
            CSV + 'dtypes = ["float64"]',
            'data.csv.dtypes: "float64"; expected each entry must be one of "bool", "float32"',
        ),
        (CSV + 'labels = ["a", "a"]', "data.csv.labels: an array of 2; each word once"),
        (
            CSV.replace('[["a", "b"]]', '["a", "b"]'),
            'data.csv.inputs: "a"; expected each entry must be an array',
        ),
        (SQLITE + "blob_shapes = [[1], [2]]", "data.sqlite.blob_shapes: an array of 2; one for each input"),
        (SQLITE + "timeout_s = 0", "data.sqlite.timeout_s"),
        ('[data]\nsource = "python:os.system"', "expected python:module:function"),
        ('[data]\nsource = "python:a:b()"', "expected python:module:function"),
        ("[data]\nsource = 3", "data.source: 3; expected text"),
        ('[data]\nsource = "t.npz"\ninputs = []', "data.inputs"),
        ('[data]\nsource = "t.npz"\ninputs = ["y"]', "must be different"),
        ('[data]\nsource = "t.npz"\n[limits]\nthreads = 0', "limits.threads: 0; 1 to 256"),
        (
            '[data]\nsource = "t.npz"\n[limits]\nmax_memory_mb = 512',
            "limits.max_memory_mb",
        ),  # nothing reads it
        ('[data]\nsource = "t.npz"\n[checkin]\nttl_s = 0', "checkin.ttl_s: 0"),
        (
            '[data]\nsource = "t.npz"\n[broker]\nurl = "http://b"',
            'broker.url: "http://b"; a broker URL begins with mqtt://',
        ),
        (
            '[data]\nsource = "t.npz"\n[broker]\nurl = "mqtt://b:99999"',
            'broker.url: "mqtt://b:99999"; the broker URL has a bad host or port',
        ),
        ('[data]\nsource = "t.npz"\n[broker]\nurl = "mqtt://b/x"', "broker.url"),
        ('[data]\nsource = "t.npz"\n[broker]\nurl = "mqtt://b"\nca_file = "c"', "need mqtts://"),
        ('[data]\nsource = "t.npz"\n[broker]\ncert_file = "c"', "come together"),
        ('[data]\nsource = "t.npz"\n[broker]\npassword_file = "c"', "a password needs a username"),
    ],
)
def test_a_bad_device_config_is_refused_by_key(tmp_path, text, complaint):
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        config(tmp_path, text)


def test_a_password_in_the_broker_url_is_refused_and_not_repeated(tmp_path):
    with pytest.raises(ConfigError, match="password_file") as caught:
        config(tmp_path, '[data]\nsource = "t.npz"\n[broker]\nurl = "mqtt://me:hunter2@b"')
    assert "hunter2" not in str(caught.value)


def test_a_seed_file_holds_64_hex_digits(tmp_path):
    path = tmp_path / "seed"
    path.write_text(bytes(range(32)).hex() + "\n")
    assert read_seed_file(path) == bytes(range(32))
    for bad in (b"short", b"g" * 64, b"AB" * 32):
        path.write_bytes(bad)
        with pytest.raises(ConfigError, match="64 hex digits") as caught:
            read_seed_file(path)
        assert bad.decode() not in str(caught.value).replace(str(path), "")
