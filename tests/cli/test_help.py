"""``--help`` of every command: it works, explains every option, and names the next step."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import typer

from aggregator import cli as aggregator_cli
from edge_runtime import cli as device_cli
from model_export import cli as export_cli
from tests.support.command_line import run

PROGRAMS = {"aggregator": aggregator_cli, "edge-runtime": device_cli, "model-export": export_cli}


def commands(group: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """(words, command) of everything below a typer application."""
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


ALL = [
    pytest.param(name, words, command, id=" ".join((name, *words)))
    for name, module in PROGRAMS.items()
    for words, command in commands(typer.main.get_command(module.app))
]


@pytest.mark.parametrize(("name", "words", "command"), ALL)
def test_every_command_explains_itself_its_options_and_what_comes_next(monkeypatch, name, words, command):
    monkeypatch.setenv("COLUMNS", "200")
    done = run(PROGRAMS[name].main, *words, "--help")
    assert (done.code, done.err) == (0, "")
    own = " ".join((name, *words))
    assert own in done.out
    for parameter in command.params:
        assert getattr(parameter, "help", None) or parameter.param_type_name == "argument", parameter.name
    # A command of ours that is not this one, or the function that takes what this one makes.
    named = set(re.findall(r"(?:aggregator|edge-runtime|model-export) [a-z-]+[a-z]", done.out)) - {own}
    groups = getattr(command, "commands", None)
    ends = "InferenceSession" in done.out or name == "model-export"
    assert groups or ends or named - {f"{name} {word}" for word in words[:1]}


def test_a_command_without_its_options_names_them_on_stderr():
    for main, words, missing in (
        (device_cli.main, ["enroll"], "--config"),
        (aggregator_cli.main, ["init"], "--folder"),
        (aggregator_cli.main, ["serve", "--confg", "x"], "--confg"),
    ):
        done = run(main, *words)
        assert (done.code, done.out) == (2, "")
        assert missing in done.err
