"""The ``[broker]`` section as an address: whose name and password go to the broker."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.transport.address import PASSWORD_VARIABLE
from edge_runtime.transport.broker_config import BrokerConfig


@pytest.fixture(autouse=True)
def no_password_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)


@pytest.mark.parametrize("username", ["pi", "me@home", "a:b/c", "50%", "o'brien #1?", "Jürgen"])
def test_a_username_arrives_as_it_was_written(username: str) -> None:
    address = BrokerConfig(url="mqtt://b:1884", username=username).address()
    assert (address.username, address.password, address.host, address.port) == (username, None, "b", 1884)


def test_the_sections_username_goes_before_that_of_the_tokens_url_and_leaves_its_password_behind(
    tmp_path: Path,
) -> None:
    token = "mqtt://them:theirs@b:1884"
    address = BrokerConfig(username="me@home").address(token)
    assert (address.username, address.password, address.host, address.port) == ("me@home", None, "b", 1884)
    (tmp_path / "pw").write_text("mine\n")
    address = BrokerConfig(username="me", password_file=tmp_path / "pw").address(token)
    assert (address.username, address.password, address.host) == ("me", "mine", "b")


def test_without_a_username_the_tokens_url_says_who_we_are() -> None:
    address = BrokerConfig().address("mqtt://them:theirs@b:1884")
    assert (address.username, address.password, address.host) == ("them", "theirs", "b")
