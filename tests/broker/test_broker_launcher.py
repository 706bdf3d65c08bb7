from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aggregator.broker import BrokerStartError, launcher, start_broker
from edge_runtime.transport.base import Connected
from tests.support.brokers import PATIENCE_S, ROOT, BrokerUnderTest, mosquitto_installed, receive, wait_for

needs_mosquitto = pytest.mark.skipif(not mosquitto_installed(), reason="mosquitto is not installed")


def _gone(pid: int) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@needs_mosquitto
def test_mosquitto_keeps_retained_messages_and_sessions_over_sigterm(tmp_path: Path) -> None:
    broker = BrokerUnderTest(tmp_path / "a folder with spaces")
    first = broker.transport("c")
    first.open()
    first.subscribe("x/#")
    first.publish("x/1", b"kept", retain=True)
    receive(first)
    first.close()
    broker.restart()
    second = broker.transport("c")
    second.open()
    assert wait_for(second, Connected).session_present is True
    assert receive(second).payload == b"kept"
    second.close()
    broker.stop()
    assert (tmp_path / "a folder with spaces" / "mosquitto.db").is_file()


@needs_mosquitto
def test_a_taken_port_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with (
        start_broker(tmp_path / "1") as first,
        pytest.raises(
            BrokerStartError, match=rf"127\.0\.0\.1:{first.port}: Address already in use; .*its URL"
        ),
    ):
        start_broker(tmp_path / "2", port=first.port)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"bind": "0.0.0.0"}, "refusing an open broker on 0.0.0.0"),  # noqa: S104 - refused
        ({"bind": "localhost"}, "is no IP address"),
        ({"port": 70_000}, "not between 0 and 65535"),
        ({"kind": "rabbit"}, "choose one of mosquitto, amqtt"),
        ({"password_file": Path("absent")}, "absent does not exist"),
    ],
)
def test_bad_options_are_refused_in_words(tmp_path: Path, options: dict[str, object], complaint: str) -> None:
    with pytest.raises(BrokerStartError, match=complaint):
        start_broker(tmp_path, **options)  # type: ignore[arg-type]


@needs_mosquitto
def test_a_broker_that_ends_at_once_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "mosquitto_config", lambda *_: "nonsense true\n")
    with pytest.raises(BrokerStartError, match=r"mosquitto ended at once: .*nonsense.*log: "):
        start_broker(tmp_path, kind="mosquitto")


def test_without_any_broker_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(launcher, "_SBIN", (str(tmp_path),))
    with pytest.raises(BrokerStartError, match="apt install mosquitto"):
        start_broker(tmp_path, kind="mosquitto")


def test_without_mosquitto_amqtt_is_used_and_says_that_it_is_for_development(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("amqtt")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(launcher, "_SBIN", (str(tmp_path),))
    said: list[str] = []
    with start_broker(tmp_path / "broker", warn=said.append) as broker:
        assert broker.kind == "amqtt"
    assert "development only" in "".join(said)
    assert _gone(broker.pid)


@pytest.mark.parametrize("kind", ["mosquitto", "amqtt"])
def test_a_broker_dies_with_a_parent_that_is_killed(tmp_path: Path, kind: str) -> None:
    if kind == "mosquitto" and not mosquitto_installed():
        pytest.skip("mosquitto is not installed")
    if kind == "amqtt":
        pytest.importorskip("amqtt")
    code = (
        "import sys, time; from pathlib import Path; from aggregator.broker import start_broker\n"
        f"print(start_broker(Path(sys.argv[1]), kind={kind!r}).pid, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(parent.pid, signal.SIGKILL)
    assert _gone(pid)


@needs_mosquitto
def test_the_foreground_broker_ends_cleanly_on_sigterm_and_fails_if_the_broker_dies(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from aggregator.broker import run_broker_in_foreground\n"
        "sys.exit(run_broker_in_foreground(Path(sys.argv[1]), port=0, echo=lambda t: print(t, flush=True)))"
    )
    for victim, expected in (("launcher", 0), ("broker", 1)):
        command = [sys.executable, "-c", code, str(tmp_path / victim)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            assert process.stdout is not None
            assert "mosquitto listens at mqtt://127.0.0.1:" in process.stdout.readline()
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(process.pid if victim == "launcher" else int(children[0]), signal.SIGTERM)
            assert process.wait(PATIENCE_S) == expected
        assert _gone(int(children[0]))
