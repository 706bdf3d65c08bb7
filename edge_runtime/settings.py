"""TOML files as frozen keyword-only dataclasses, for the device and the aggregator; nothing unknown is let through.

A settings class is a frozen, keyword-only dataclass of bool, int, float, str, Path, enums, literals, homogeneous
tuples, ``X | None`` and other such classes. It checks its values in ``__post_init__`` with ``require``.
Secrets are never values of a file: a key that ends in ``_file`` names where one lies.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import stat
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from cattrs import Converter
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn

from edge_runtime.protocol.errors import Fault, FleetgradError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_FILE_BYTES = 1 << 20
MAX_SECRET_BYTES = 64 * 1024
_HEX = re.compile(rb"(?:[0-9a-f]{2})+")
_SECRET_WORDS = ("password", "passphrase", "secret", "token", "credential")

T = TypeVar("T")
Reader = Callable[[object, Path], object]


class Problem(NamedTuple):
    """One thing wrong in a file. ``key``: dotted path; ``""`` is the file as a whole."""

    key: str
    found: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.key}: {self.found}; {self.allowed}" if self.key else f"{self.found}; {self.allowed}"


class ConfigError(FleetgradError, fault=Fault.ENGINEER, remedy="correct the named key of the named file"):
    """A settings file that cannot be used: every problem found in it, with key, value and what is allowed."""

    def __init__(self, file: Path, *problems: Problem) -> None:
        lines = [f"{file}: {problem}" for problem in problems]
        super().__init__("\n".join(lines))
        self.file = file
        self.problems = problems


class BadSetting(ValueError):
    """A value outside its bounds; ``load`` turns it into a ConfigError with the whole path.

    A reader of ``load`` raises it with an empty ``key``: the key is the one being read.
    """

    def __init__(self, key: str, found: str, allowed: str) -> None:
        super().__init__(f"{key}: {found}; {allowed}" if key else f"{found}; {allowed}")
        self.key = key
        self.found = found
        self.allowed = allowed


def require(holds: bool, key: str, value: object, allowed: str) -> None:
    """Raises BadSetting naming ``key`` of this section unless ``holds``; secrets are not repeated."""
    if not holds:
        raise BadSetting(key, _shown(key, value), allowed)


def load(path: Path, settings: type[T], readers: Mapping[object, Reader] | None = None) -> T:
    """The file as ``settings``. Relative paths in it are relative to its folder; ``~`` is the home folder.

    readers: for types of the caller's own, ``(TOML value, folder of the file) -> value`` or BadSetting.
    Raises ConfigError: missing or unreadable file, no TOML, unknown or missing key, wrong type, bad value.
    """
    return structure(read_document(path), settings, path, readers)


def read_document(path: Path) -> dict[str, Any]:
    """The file as TOML's own types, for ``structure``. Raises ConfigError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(path, Problem("", "not a regular file", "name a TOML file"))
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            path, Problem("", f"cannot be read: {error.strerror or error}", "name a TOML file that exists")
        ) from error
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(
            path, Problem("", f"larger than {MAX_FILE_BYTES} bytes", "is this a settings file?")
        )
    try:
        document: dict[str, Any] = tomllib.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(path, Problem("", f"not TOML: {error}", "see https://toml.io")) from error
    return document


def structure(
    document: Mapping[str, object],
    settings: type[T],
    path: Path,
    readers: Mapping[object, Reader] | None = None,
) -> T:
    """A parsed TOML document as ``settings``, as ``load`` does it; ``path`` names the file in errors."""
    converter = _converter(path.absolute().parent, readers or {})
    try:
        return converter.structure(document, settings)
    except (ClassValidationError, _WrongType) as error:
        known = tuple(_known_keys(settings))
        raise ConfigError(path, *_problems(error, "", known)) from error


def read_secret_file(path: Path) -> bytes:
    """The content of a ``*_file``, without the line end that editors add; 1 byte to 64 KiB. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_SECRET_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            path,
            Problem("", f"cannot be read: {error.strerror or error}", "this user must be able to read it"),
        ) from error
    content = content.removesuffix(b"\n").removesuffix(b"\r")
    if not 1 <= len(content) <= MAX_SECRET_BYTES:
        raise ConfigError(
            path, Problem("", "empty or too long", f"a secret has 1 to {MAX_SECRET_BYTES} bytes")
        )
    return content


def read_hex_file(path: Path, size: int | None = None) -> bytes:
    """A ``*_file`` of hex digits as the bytes they spell; ``size``: how many there must be. Raises ConfigError."""
    content = read_secret_file(path)
    if not _HEX.fullmatch(content) or (size is not None and len(content) != 2 * size):
        wanted = f"{2 * size} hex digits" if size else "an even number of hex digits"
        raise ConfigError(path, Problem("", f"{len(content)} bytes", f"expected {wanted}, 0-9 a-f"))
    return bytes.fromhex(content.decode("ascii"))


def read_key_file(path: Path, size: int = 32) -> bytes:
    """A file of hex digits that must stay secret. Raises ConfigError, also if other users may read or change it."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError:
        mode = 0  # read_hex_file tells why
    if mode & 0o077:
        raise ConfigError(
            path,
            Problem(
                "",
                f"other users can read it (mode {mode:04o})",
                f"`chmod 600 {path}`, and think about whether the key is still secret",
            ),
        )
    return read_hex_file(path, size)


# ---- types ------------------------------------------------------------------------------------------


class _WrongType(Exception):
    def __init__(self, value: object, expected: str) -> None:
        super().__init__(expected)
        self.value = value
        self.expected = expected


def _converter(folder: Path, readers: Mapping[object, Reader]) -> Converter:
    """cattrs without its conversions: by default ``int`` would read "7", true and 7.9."""
    converter = Converter(forbid_extra_keys=True, detailed_validation=True)

    def exactly(kind: type, expected: str) -> Callable[[object, Any], object]:
        def hook(value: object, _: Any) -> object:
            if type(value) is not kind:
                raise _WrongType(value, expected)
            return value

        return hook

    def number(value: object, _: Any) -> float:
        if type(value) not in (int, float) or not math.isfinite(typing.cast(float, value)):
            raise _WrongType(value, "a finite number")
        return float(typing.cast(float, value))

    def location(value: object, _: Any) -> Path:
        if not isinstance(value, str) or not value or "\0" in value:
            raise _WrongType(value, "a path (text)")
        path = Path(value)
        if value.split("/", 1)[0] == "~":
            path = path.expanduser()
        return folder / path

    def choice(value: object, kind: Any) -> object:
        members = list(kind) if isinstance(kind, type) else get_args(kind)  # type: ignore[call-overload]
        table = {getattr(member, "value", member): member for member in members}
        if isinstance(value, bool) or not isinstance(value, str | int) or value not in table:
            raise _WrongType(value, f"one of {', '.join(_quoted(option) for option in table)}")
        return table[value]

    def sequence(value: object, kind: Any) -> object:
        element, *rest = get_args(kind)
        if rest != [...]:
            raise TypeError(f"settings hold tuples of one type, not {kind}")
        if not isinstance(value, list):
            raise _WrongType(value, "an array")
        try:
            return tuple(converter.structure(entry, element) for entry in value)
        except _WrongType as error:
            raise _WrongType(error.value, f"each entry must be {error.expected}") from None

    def section(kind: Any) -> Callable[[object, Any], object]:
        fill = make_dict_structure_fn(
            kind, converter, _cattrs_forbid_extra_keys=True, _cattrs_detailed_validation=True
        )

        def hook(value: object, _: Any) -> object:
            if not isinstance(value, Mapping):
                raise _WrongType(value, "a section (table)")
            return fill(value, kind)

        return hook

    converter.register_structure_hook(bool, exactly(bool, "true or false"))
    converter.register_structure_hook(int, exactly(int, "a whole number"))
    converter.register_structure_hook(str, exactly(str, "text in quotes"))
    converter.register_structure_hook(float, number)
    converter.register_structure_hook(Path, location)
    converter.register_structure_hook_func(lambda kind: _origin(kind) is Literal, choice)
    converter.register_structure_hook(Enum, choice)
    converter.register_structure_hook_func(lambda kind: _origin(kind) is tuple, sequence)
    converter.register_structure_hook_factory(dataclasses.is_dataclass, section)
    for own, reader in readers.items():
        converter.register_structure_hook_func(*_own(own, reader, folder))
    return converter


def _origin(kind: object) -> object:
    return get_origin(kind)


def _own(
    own: object, reader: Reader, folder: Path
) -> tuple[Callable[[Any], bool], Callable[[object, Any], object]]:
    return (lambda kind: kind == own), (lambda value, _: reader(value, folder))


# ---- errors -----------------------------------------------------------------------------------------


def _problems(error: Exception, path: str, known: tuple[str, ...]) -> Iterator[Problem]:
    """cattrs' tree of exceptions as lines with dotted paths."""
    if isinstance(error, ClassValidationError):
        placed, others = error.group_exceptions()
        for inner, note in placed:
            yield from _problems(inner, _join(path, note.name), known)
        for inner in others:
            yield from _problems(inner, path, known)
    elif isinstance(error, ForbiddenExtraKeysError):
        for key in sorted(error.extra_fields):
            yield _unknown_key(_join(path, key), known)
    elif isinstance(error, KeyError):
        yield Problem(path, "missing", "this key is needed")
    elif isinstance(error, BadSetting):
        yield Problem(_join(path, error.key), error.found, error.allowed)
    elif isinstance(error, _WrongType):
        yield Problem(path, _shown(path, error.value), f"expected {error.expected}")
    else:
        raise error  # a mistake in a settings class, not in the file


def _unknown_key(key: str, known: tuple[str, ...]) -> Problem:
    section, _, name = key.rpartition(".")
    siblings = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == section]
    if f"{name}_file" in siblings:
        return Problem(
            key, "a secret in a settings file", f"put it in a file of its own and name that in {name}_file"
        )
    elsewhere = [other for other in known if other.rpartition(".")[2] == name]
    close = difflib.get_close_matches(name, siblings, n=1) or elsewhere[:1]
    hint = f"did you mean {close[0]}?" if close else f"allowed here: {', '.join(siblings)}"
    return Problem(key, "unknown key", hint)


def _known_keys(settings: Any, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        yield _join(prefix, field.name)
        for kind in (hints[field.name], *get_args(hints[field.name])):
            if dataclasses.is_dataclass(kind):
                yield from _known_keys(kind, _join(prefix, field.name))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path and key else path or key


def _shown(key: str, value: object) -> str:
    if any(word in key.lower() for word in _SECRET_WORDS):
        return "a value that is not shown"
    if isinstance(value, Mapping):
        return "a section"
    if isinstance(value, list):
        return f"an array of {len(value)}"
    if value is None:
        return "nothing"
    text = _quoted(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _quoted(value: object) -> str:
    """As TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
