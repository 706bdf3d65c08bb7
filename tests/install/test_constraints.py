"""constraints.txt against what a development environment holds."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

from edge_runtime.settings import tomllib

ROOT = Path(__file__).parents[2]
OF_A_CUDA_BUILD = ("cuda-", "nvidia-", "triton")  # torch's; the constraints fit any build of it


def constraints() -> list[Requirement]:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def name_of(requirement: Requirement) -> str:
    return re.sub(r"[-_.]+", "-", requirement.name).lower()


def wanted() -> set[str]:
    """Names of all that ``.[dev]`` and the build backend bring here, directly or not."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = document["project"]
    optional: dict[str, list[str]] = project["optional-dependencies"]
    found: set[tuple[str, str]] = set()
    to_do = [Requirement(line) for line in (*document["build-system"]["requires"], "fleetgrad[dev]")]
    while to_do:
        requirement = to_do.pop()
        name = name_of(requirement)
        for extra in {"", *requirement.extras} - {e for n, e in found if n == name}:
            found.add((name, extra))
            if name == project["name"]:
                lines = optional[extra] if extra else project["dependencies"]
            else:
                try:
                    lines = distribution(name).requires or []
                except PackageNotFoundError:  # the build backend, in an environment that was made without it
                    lines = []
            for one in map(Requirement, lines):
                if one.marker is None or one.marker.evaluate({"extra": extra}):
                    to_do.append(one)
    return {name for name, _ in found if name != project["name"] and not name.startswith(OF_A_CUDA_BUILD)}


def test_the_constraints_name_every_package_of_a_development_environment() -> None:
    here = {name_of(one) for one in constraints() if one.marker is None or one.marker.evaluate()}
    assert wanted() - here == set()


def test_every_constraint_is_one_public_version() -> None:
    for one in constraints():
        (pin,) = one.specifier
        assert pin.operator == "==", one
        assert "+" not in pin.version, f"{one}: a local version is found on one machine only"
        assert one.url is None
