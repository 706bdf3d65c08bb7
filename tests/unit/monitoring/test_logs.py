"""The log: one line an event, named fields, nothing secret, whatever is thrown at it."""

from __future__ import annotations

import ast
import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.monitoring.events import EVENTS
from aggregator.monitoring.logs import safe_fields, structured_logs
from edge_runtime.protocol.crypto.keys import SigningKey
from edge_runtime.protocol.enrol_token import PREFIX
from edge_runtime.protocol.ids import DeviceId
from edge_runtime.protocol.rejects import Reject
from tests.support.brokers import ROOT

SECRET = bytes(range(32))
library = logging.getLogger("some.library")


@contextmanager
def logged(**options: Any) -> Iterator[Any]:
    """(report, stdout, stderr) while the log is on."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), structured_logs(**options) as report:
        yield report, out, err


def lines(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_an_event_is_one_json_object_with_time_event_level_and_federation():
    with logged(as_json=True, federation="plant-7") as (report, out, err):
        report("update_stored", round=3, device=DeviceId("kitchen-pi"), samples=40)
        report("round_aborted", round=4, reason="1 of at least 2\nupdates")
        first, second = lines(out)
        assert list(first)[:4] == ["time", "event", "level", "federation"]
        assert first["time"] > 1e9
        del first["time"], second["time"]
        assert first == {
            "event": "update_stored",
            "level": "info",
            "federation": "plant-7",
            "round": 3,
            "device": "kitchen-pi",
            "samples": 40,
        }
        assert (second["level"], second["reason"]) == ("warning", "1 of at least 2\nupdates")
        assert err.getvalue() == ""


def test_what_a_library_says_comes_through_the_same_pipe_with_its_name_and_traceback():
    with logged(as_json=True, federation="plant-7") as (_, out, err):
        library.info("not shown: below a warning")
        library.warning("cannot reach %s after %d tries", "broker.example", 3)
        try:
            raise ValueError("broken")
        except ValueError:
            library.exception("failed")
        warning, error = lines(out)
        assert (warning["event"], warning["logger"], warning["level"]) == (
            "library",
            "some.library",
            "warning",
        )
        assert warning["message"] == "cannot reach broker.example after 3 tries"
        assert error["exception"].endswith("ValueError: broken")
        assert err.getvalue() == ""


def test_for_people_events_go_to_stdout_and_libraries_to_stderr():
    with logged(as_json=False, federation="plant-7") as (report, out, err):
        report("round_opened", round=3, cohort=["a", "b"], base_version=2, nothing=None)
        report("round_frozen", round=3, accepted=[f"d{i}" for i in range(40)])
        library.warning("cannot reach %s", "it")
        opened, frozen = out.getvalue().splitlines()
        assert opened[8:] == "  round opened       round=3 cohort=a, b base_version=2"
        assert frozen.endswith("d6, d7, ... (40)")
        assert err.getvalue()[8:] == "  warning  cannot reach it\n"


def test_no_secret_gets_into_a_line():
    token = f"{PREFIX}c2VjcmV0"
    for as_json in (True, False):
        with logged(as_json=as_json) as (report, out, err):
            report(
                "refused",
                payload=SECRET,
                nested={"signing_key": SECRET.hex(), "list": [bytearray(SECRET)]},
                key=SigningKey(SECRET),
                enrolment_token="a word",
                detail=f"got {token}",
                reject=Reject.BAD_SEAL,
            )
            library.warning("got %r and %r", SECRET, SigningKey(SECRET))
        text = out.getvalue() + err.getvalue()
        assert "bad_seal" in text
        for spelling in (SECRET.hex(), repr(SECRET)[2:-1], repr(bytearray(SECRET)), token, "a word"):
            assert spelling not in text
        assert "(32 bytes)" in text


@settings(max_examples=40)
@given(
    st.dictionaries(
        st.text(max_size=8),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text()
            | st.binary()
            | st.builds(object),
            lambda inner: (
                st.lists(inner) | st.dictionaries(st.text(max_size=4), inner) | st.frozensets(st.text())
            ),
            max_leaves=8,
        ),
    )
)
def test_every_value_becomes_json_under_its_name(fields):
    safe = safe_fields(None, "info", dict(fields))
    json.dumps(safe, allow_nan=False)
    assert fields.keys() == safe.keys()


def test_a_text_line_is_one_line_whatever_a_stranger_sent():
    with logged(as_json=False, federation="plant-7") as (report, out, _):
        report("refused", detail="one\ntwo\x1b[31m", topic="fl/\r")
        assert out.getvalue().count("\n") == 1
        assert out.getvalue().strip().isprintable()


def test_the_log_leaves_nothing_behind():
    before = logging.getLogger().handlers[:], logging.getLogger().level
    with logged(as_json=True):
        assert len(logging.getLogger().handlers) == len(before[0]) + 1
    assert (logging.getLogger().handlers, logging.getLogger().level) == before


def said() -> dict[str, set[str]]:
    """Event and the fields named at the places where the aggregator reports it."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "aggregator").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name, first = getattr(node.func, "attr", getattr(node.func, "id", "")), node.args[0]
            events = [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]
            for event in events:
                if name in ("report", "say", "log") and isinstance(event, ast.Constant):
                    words = {word.arg for word in node.keywords if word.arg}
                    found.setdefault(str(event.value), set()).update(words)
    return found


def test_every_event_that_is_reported_stands_in_the_table_with_its_fields():
    events = said()
    assert {"round_opened", "round_published", "refused"} <= events.keys()
    assert events.keys() <= EVENTS.keys()
    assert {name: fields - set(EVENTS[name].fields) for name, fields in events.items()} == {
        name: set() for name in events
    }


def test_every_event_of_the_table_is_reported_somewhere():
    written = "".join(path.read_text("utf-8") for path in Path(ROOT / "aggregator").rglob("*.py"))
    assert [name for name in EVENTS if written.count(f'"{name}"') < 2 and name != "library"] == []
