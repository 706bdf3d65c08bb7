"""README and docs against the tree: links, commands (both ways), options, make targets, phases in the picture."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from fldemo import cli as demo_cli
from flperftest import cli as perf_cli

from aggregator import cli as aggregator_cli
from edge_runtime import cli as device_cli
from edge_runtime.protocol.rounds import MOVES, Phase
from model_export import cli as export_cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = {
    "aggregator": aggregator_cli,
    "edge-runtime": device_cli,
    "model-export": export_cli,
    "fldemo": demo_cli,
    "flperftest": perf_cli,
}
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(
    r"(?<![-\w./])(aggregator|edge-runtime|model-export|fldemo|flperftest)((?: +[a-z][a-z-]+)+)([^`\n|;#]*)"
)


def each(paths: list[Path]) -> list[object]:
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


@pytest.mark.parametrize("document", each(DOCUMENTS))
def test_every_relative_link_leads_to_a_file(document: Path) -> None:
    missing = [
        link for link in LINK.findall(document.read_text("utf-8")) if not (document.parent / link).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("document", each(DOCUMENTS))
def test_every_command_and_option_that_is_shown_exists(document: Path) -> None:
    code = "\n".join(CODE.findall(document.read_text("utf-8"))).replace("\\\n", " ")
    for program, words, rest in COMMAND.findall(code):
        command, path = typer.main.get_command(PROGRAMS[program].app), program
        for word in words.split():
            children = getattr(command, "commands", None)
            if children is None:
                break
            assert word in children, f"{path} has no command {word}"
            command, path = children[word], f"{path} {word}"
        known = {"--help", *(option for parameter in command.params for option in parameter.opts)}
        assert set(re.findall(r"(?<!\S)\[?(--?[a-z][a-z-]*)", rest)) <= known, f"{path}: {rest.strip()}"


def leaves(command: object, path: str) -> Iterator[str]:
    """The commands below one that do something themselves."""
    children = getattr(command, "commands", None)
    if children is None:
        yield path
    for name, child in (children or {}).items():
        yield from leaves(child, f"{path} {name}")


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_is_shown_in_a_document(program: str) -> None:
    shown = " ".join(" ".join(document.read_text("utf-8").split()) for document in DOCUMENTS)
    everything = list(leaves(typer.main.get_command(PROGRAMS[program].app), program))
    # A program of one command is called without its name.
    alone = len(everything) == 1
    assert [
        command for command in everything if command not in shown and not (alone and program in shown)
    ] == []


def test_every_make_target_that_is_shown_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for document in DOCUMENTS:
        code = "\n".join(CODE.findall(document.read_text("utf-8")))
        assert set(re.findall(r"\bmake ([a-z-]+)", code)) <= targets, document.name


def test_the_picture_of_a_round_shows_every_phase_and_every_move() -> None:
    picture = (ROOT / "docs" / "images" / "round.svg").read_text("utf-8")
    assert set(re.findall(r'class="(?:phase|stop)".*?<text[^>]*>(\w+)<', picture)) == {
        phase.value for phase in Phase
    }
    assert sorted(re.findall(r'data-move="(\w+) (\w+)"', picture)) == sorted(
        (phase.value, after.value) for phase, allowed in MOVES.items() for after in allowed
    )
