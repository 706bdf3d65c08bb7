"""``device.toml``."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from edge_runtime.config import DataConfig, DeviceConfig, TelemetryConfig, load_device_config, read_seed_file
from edge_runtime.data import NpzFile, PythonFunction
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


def test_the_sample_names_every_key_and_its_commented_lines_are_valid_too(tmp_path):
    text = re.sub(r"^# ([a-z_]+ = )", r"\1", SAMPLE.read_text(), flags=re.M)
    path = tmp_path / "device.toml"
    path.write_text(text)
    load_device_config(path)
    for section in (DeviceConfig, *typing.get_type_hints(DeviceConfig).values()):
        for field in dataclasses.fields(section) if dataclasses.is_dataclass(section) else ():
            assert re.search(rf"^(\[{field.name}\]|{field.name} = )", text, flags=re.M), field.name


def test_telemetry_has_one_switch_for_each_field_of_the_message():
    names = [field.name for field in dataclasses.fields(Telemetry)]
    assert [field.name for field in dataclasses.fields(TelemetryConfig)] == names
    full = Telemetry(**dict.fromkeys(names, 7))
    for name in names:
        assert TelemetryConfig(**{name: False}).permitted(full) == dataclasses.replace(full, **{name: 0})


def test_data_comes_from_a_file_beside_the_config_or_from_a_function(tmp_path):
    assert config(tmp_path, '[data]\nsource = "d/t.npz"').data.source == NpzFile(tmp_path / "d/t.npz")
    source = config(tmp_path, '[data]\nsource = "python:sensors.wind:load"').data.source
    assert source == PythonFunction("sensors.wind", "load", tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "data: missing"),
        ('[data]\nsource = "t.csv"', 'data.source: "t.csv"; expected a file.npz'),
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
