"""Bad settings give one clear line each: file, key, what was found, what is allowed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal

import pytest

from edge_runtime.settings import ConfigError, load, read_key_file, read_secret_file, require


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 1
    rate: float = 0.5
    names: tuple[str, ...] = ()
    password_file: Path | None = None

    def __post_init__(self) -> None:
        require(self.size < 10, "size", self.size, "below 10")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    flag: bool = False
    mode: Literal["fast", "safe"] = "safe"
    colour: Colour = Colour.RED
    folder: Path | None = None
    inner: Inner = field(default_factory=Inner)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "s.toml"
    path.write_text(text)
    return path


def test_a_whole_file_is_read_and_paths_are_relative_to_it(tmp_path):
    path = write(
        tmp_path,
        'name = "n"\nflag = true\nmode = "fast"\ncolour = "red"\nfolder = "sub/x"\n'
        '[inner]\nsize = 3\nrate = 2\nnames = ["a", "b"]\npassword_file = "/etc/pw"\n',
    )
    assert load(path, Outer) == Outer(
        name="n",
        flag=True,
        mode="fast",
        folder=tmp_path / "sub/x",
        inner=Inner(size=3, rate=2.0, names=("a", "b"), password_file=Path("/etc/pw")),
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "name: missing; this key is needed"),
        ('name = "n"\nnane = 1', "nane: unknown key; did you mean name?"),
        ('name = "n"\nsize = 1', "size: unknown key; did you mean inner.size?"),
        ('name = "n"\nzzz = 1', "zzz: unknown key; allowed here: name, flag, mode, colour, folder, inner"),
        ('name = "n"\n[inner]\nsice = 1', "inner.sice: unknown key; did you mean size?"),
        ("name = 3", "name: 3; expected text in quotes"),
        ('name = "n"\nflag = 1', "flag: 1; expected true or false"),
        ('name = "n"\nmode = "slow"', 'mode: "slow"; expected one of "fast", "safe"'),
        ('name = "n"\nmode = []', 'mode: an array of 0; expected one of "fast", "safe"'),
        ('name = "n"\ncolour = "blue"', 'colour: "blue"; expected one of "red"'),
        ('name = "n"\nfolder = 1', "folder: 1; expected a path (text)"),
        ('name = "n"\ninner = 1', "inner: 1; expected a section (table)"),
        ('name = "n"\n[inner]\nsize = true', "inner.size: true; expected a whole number"),
        ('name = "n"\n[inner]\nsize = "3"', 'inner.size: "3"; expected a whole number'),
        ('name = "n"\n[inner]\nsize = 3.0', "inner.size: 3.0; expected a whole number"),
        ('name = "n"\n[inner]\nsize = 10', "inner.size: 10; below 10"),
        ('name = "n"\n[inner]\nrate = nan', "inner.rate: nan; expected a finite number"),
        ('name = "n"\n[inner]\nnames = "ab"', 'inner.names: "ab"; expected an array'),
        (
            'name = "n"\n[inner]\nnames = ["a", 1]',
            "inner.names: 1; expected each entry must be text in quotes",
        ),
    ],
)
def test_each_mistake_is_named_by_its_dotted_key(tmp_path, text, line):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path, Outer)
    assert str(caught.value) == f"{path}: {line}"


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, "nam = 1\nflag = 2\n[inner]\nsize = 'x'"), Outer)
    assert {problem.key for problem in caught.value.problems} == {"name", "nam", "flag", "inner.size"}


def test_a_secret_in_the_file_is_refused_without_repeating_it(tmp_path):
    with pytest.raises(ConfigError, match="name that in password_file") as caught:
        load(write(tmp_path, 'name = "n"\n[inner]\npassword = "hunter2"'), Outer)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("raw", [b"name = ", b"\xff\xfe", b"a = " + b"[" * 5000])
def test_what_is_not_toml_is_refused(tmp_path, raw):
    path = tmp_path / "s.toml"
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match="not TOML"):
        load(path, Outer)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.toml: cannot be read: No such file"):
        load(tmp_path / "no.toml", Outer)
    with pytest.raises(ConfigError, match="not a regular file"):
        load(tmp_path, Outer)


def test_a_secret_file_is_read_without_its_line_end(tmp_path):
    path = tmp_path / "pw"
    path.write_bytes(b"hunter2\n")
    assert read_secret_file(path) == b"hunter2"
    path.write_bytes(b"\n")
    with pytest.raises(ConfigError, match="empty"):
        read_secret_file(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_secret_file(tmp_path / "none")


def test_a_key_file_that_others_can_read_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "signing.key"
    path.write_text("ab" * 32 + "\n")
    path.chmod(0o600)
    assert read_key_file(path) == b"\xab" * 32
    for mode in (0o604, 0o640, 0o622):
        path.chmod(mode)
        with pytest.raises(ConfigError, match=rf"mode {mode:04o}\); `chmod 600 ") as caught:
            read_key_file(path)
        assert "abab" not in str(caught.value)
    path.chmod(0o400)
    with pytest.raises(ConfigError, match="expected 32 hex digits"):
        read_key_file(path, 16)
    with pytest.raises(ConfigError, match="No such file"):
        read_key_file(tmp_path / "none")
