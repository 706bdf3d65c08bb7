"""What a person types and reads, played from tests/cli/transcripts (``tests.support.transcript`` says how)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.brokers import ROOT, mosquitto_installed
from tests.support.transcript import free_port, parse, pattern, play

TRANSCRIPTS = sorted((Path(__file__).parent / "transcripts").glob("*.txt"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.long] * path.stem.endswith("_long"))
        for path in TRANSCRIPTS
    ],
)
def test_the_programs_answer_as_in_the_transcript(path: Path, tmp_path: Path) -> None:
    if "& mosquitto" in path.read_text("utf-8") and not mosquitto_installed():
        pytest.skip("needs mosquitto")
    play(path, tmp_path, EXAMPLES=str(ROOT / "examples"), PORT=str(free_port()))


def test_there_are_transcripts() -> None:
    assert len(TRANSCRIPTS) >= 3


def test_an_ellipsis_stands_for_lines_and_angle_brackets_for_text() -> None:
    assert pattern(["a <...> c", "...", "z"]).fullmatch("a b c\n1\n2\nz\n")
    assert pattern(["a", "...", "z"]).fullmatch("a  \nz\n")
    assert not pattern(["a", "z"]).fullmatch("a\nb\nz\n")
    assert not pattern(["a.c"]).fullmatch("abc\n")


def test_output_before_a_command_is_refused() -> None:
    with pytest.raises(ValueError, match="line 2"):
        parse("# remark\nstray\n$ true\n")
