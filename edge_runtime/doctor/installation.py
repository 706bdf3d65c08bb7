"""Python, the processor, and whether the packages of this environment go together."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from edge_runtime.device.readings import read_text
from edge_runtime.doctor.check import Check, good, problem, unknown, warning

RUNTIME = "onnxruntime"
MIN_PYTHON = (3, 10)
INSTALL = "pip install 'fleetgrad[device]'"
# Below these this project does not work; the reason where it is more than that something is not there yet.
MINIMUM: Mapping[str, tuple[tuple[int, ...], str]] = {
    RUNTIME: ((1, 22), "1.21 dies with SIGILL on a Raspberry Pi 4"),
    "numpy": ((1, 26), ""),
    "paho-mqtt": ((2, 0), "1.x has another interface"),
    "cryptography": ((42,), ""),
    "protobuf": ((4, 25), "the generated code refuses older ones"),
    "cattrs": ((23, 2), ""),
    "typer": ((0, 16), "older ones read flags wrongly with the click of today"),
}


@dataclass(frozen=True, kw_only=True)
class Installation:
    """``packages``: version by distribution name, lower case. ``cpu_features``: None where nothing tells them.

    import_error: what importing the runtime raised; None: it imports, or it was not tried.
    """

    python: tuple[int, int, int]
    is_64_bit: bool
    system: str
    machine: str
    packages: Mapping[str, str]
    cpu_features: frozenset[str] | None = None
    import_error: str | None = None
    environment: str = field(default="")

    @property
    def runtimes(self) -> list[str]:
        """All distributions that install the import package ``onnxruntime``."""
        return sorted(name for name in self.packages if re.fullmatch(rf"{RUNTIME}(-.+)?", name))


def look(import_runtime: Callable[[], object], root: Path = Path("/")) -> Installation:
    """This interpreter. The runtime is imported only if its version is good: a bad one may kill the process."""
    packages: dict[str, str] = {}
    for found in metadata.distributions():
        name = str(found.metadata["Name"] or "").lower().replace("_", "-")
        packages.setdefault(name, found.version)  # the first on sys.path is the one that is imported
    installation = Installation(
        python=sys.version_info[:3],
        is_64_bit=sys.maxsize > 1 << 32,
        system=platform.system(),
        machine=platform.machine(),
        packages=packages,
        cpu_features=_cpu_features(root),
        environment=sys.prefix,
    )
    error = None
    if _runtime(installation).remedy == "":
        try:
            import_runtime()
        except Exception as raised:  # noqa: BLE001 - whatever it is, it is the finding
            error = (str(raised).splitlines() or [type(raised).__name__])[0][:300]
    return Installation(**{**vars(installation), "import_error": error})


def checks(found: Installation) -> list[Check]:
    """Pure."""
    return [_python(found), _platform(found), _runtime(found), _libraries(found), _processor(found)]


def _python(found: Installation) -> Check:
    version = ".".join(map(str, found.python))
    if found.python[:2] < MIN_PYTHON:
        return problem("python", f"Python {version}", "make the environment with Python 3.10 or newer")
    return good("python", f"Python {version} in {found.environment}")


def _platform(found: Installation) -> Check:
    here = f"{found.system} on {found.machine}"
    if not found.is_64_bit:
        return problem(
            "platform",
            f"{here}, but this Python is 32-bit: onnxruntime has no wheel for it",
            "install a 64-bit system (Raspberry Pi OS 64-bit, Debian arm64)",
        )
    if found.system != "Linux":
        return warning(
            "platform", here, "devices are tested on Linux only; what reads the machine is unknown"
        )
    return good("platform", here)


def _runtime(found: Installation) -> Check:
    names = found.runtimes
    if not names:
        return problem("runtime", "onnxruntime is not installed", INSTALL)
    listed = ", ".join(f"{name} {found.packages[name]}" for name in names)
    if len(names) > 1:
        return problem(
            "runtime",
            f"{listed} are in one environment: they overwrite each other's files, and which one runs is chance",
            f"pip uninstall -y {' '.join(names)} && {INSTALL}",
        )
    if names != [RUNTIME] and parse_version(found.packages[names[0]]) < MINIMUM[RUNTIME][0]:
        return problem(
            "runtime",
            f"{listed} instead of onnxruntime; training here runs on stock onnxruntime 1.22 or newer",
            f"pip uninstall -y {names[0]} && {INSTALL}",
        )
    if (complaint := _complaint(names[0], found.packages[names[0]])) is not None:
        return problem("runtime", complaint, f"pip install --upgrade {names[0]}")
    if found.import_error is not None:
        return problem(
            "runtime",
            f"{listed} does not import: {found.import_error}",
            f"pip install --force-reinstall {names[0]}",
        )
    return good("runtime", listed)


def _libraries(found: Installation) -> Check:
    """All but the runtime."""
    others = {name: version for name, version in found.packages.items() if name not in found.runtimes}
    missing = [name for name in MINIMUM if name != RUNTIME and name not in others]
    complaints = [f"{name} is not installed" for name in missing]
    complaints += [text for name, version in others.items() if (text := _complaint(name, version))]
    if complaints:
        return problem("libraries", "; ".join(sorted(complaints)), f"{INSTALL} --upgrade")
    own = others.get("fleetgrad", "from a folder, not installed")
    if "zstandard" not in others:
        return warning(
            "libraries",
            f"fleetgrad {own}, without zstandard: updates travel with zlib",
            "pip install zstandard",
        )
    return good("libraries", f"fleetgrad {own}, all that it needs is there")


def _processor(found: Installation) -> Check:
    if found.cpu_features is None:
        return unknown("processor", "/proc/cpuinfo tells no features")
    for feature, what in (("avx2", "AVX2"), ("asimddp", "dot products"), ("asimd", "NEON")):
        if feature in found.cpu_features:
            more = "" if feature != "asimd" else ", no dot products (a Pi 3 or 4): slower, not wrong"
            return good("processor", f"has {what}{more}")
    if found.machine in ("x86_64", "AMD64"):
        return warning("processor", "has no AVX2", "nothing: training is slower, but right")
    return unknown("processor", f"{found.machine}: features that are not known here")


def _complaint(name: str, version: str) -> str | None:
    needed, reason = MINIMUM.get(name, ((), ""))
    if parse_version(version) < needed:
        spelled = ".".join(map(str, needed))
        return f"{name} {version}, {spelled} or newer is needed{f' ({reason})' if reason else ''}"
    return None


def parse_version(version: str) -> tuple[int, ...]:
    """The numbers at its beginning: (1, 22, 0) of "1.22.0rc1"."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _cpu_features(root: Path) -> frozenset[str] | None:
    for line in read_text(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return frozenset(value.split())
    return None
