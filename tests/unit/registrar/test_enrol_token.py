from __future__ import annotations

import base64
import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.protocol.crypto.keys import SealingPublicKey, VerifyKey
from edge_runtime.protocol.enrol_token import MAX_TOKEN_CHARACTERS, PREFIX, EnrolToken, TokenError
from edge_runtime.protocol.ids import NAME_PATTERN, DeviceId, FederationId

SECRET = bytes(range(64, 96))
TOKEN = EnrolToken(
    federation=FederationId("digits"),
    broker_url="mqtt://user:hunter2@broker:1883",
    root=VerifyKey(bytes(range(32))),
    registrar=SealingPublicKey(bytes(range(32, 64))),
    token_id="00ff00ff00ff00ff",
    secret=SECRET,
    device=DeviceId("pi-1"),
)
TEXT = TOKEN.encode()

names = st.from_regex(NAME_PATTERN, fullmatch=True)
keys = st.binary(min_size=32, max_size=32)
tokens = st.builds(
    EnrolToken,
    federation=names.map(FederationId),
    broker_url=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=512),
    root=keys.map(VerifyKey),
    registrar=keys.map(SealingPublicKey),
    token_id=names,
    secret=keys,
    device=st.none() | names.map(DeviceId),
)


def fields(token: EnrolToken) -> dict[str, object]:
    return {name: getattr(token, name) for name in EnrolToken.__dataclass_fields__}


def spell(content: bytes) -> str:
    checksum = hashlib.sha256(PREFIX.encode() + content).digest()[:8]
    return PREFIX + base64.urlsafe_b64encode(content + checksum).rstrip(b"=").decode()


@given(tokens)
def test_a_token_comes_back_from_its_string(token: EnrolToken) -> None:
    text = token.encode()
    assert fields(EnrolToken.parse(text)) == fields(token)
    assert len(text) <= MAX_TOKEN_CHARACTERS


def test_the_string_has_this_spelling_for_ever() -> None:
    def text(part: bytes) -> bytes:
        return len(part).to_bytes(2, "little") + part

    content = bytes(range(96))  # root key, registrar key, secret
    content += text(b"00ff00ff00ff00ff") + text(b"digits") + text(b"pi-1")
    content += text(b"mqtt://user:hunter2@broker:1883")
    assert spell(content) == TEXT
    assert hashlib.sha256(TEXT.encode()).hexdigest() == VECTOR


def test_white_space_around_the_string_is_dropped() -> None:
    assert EnrolToken.parse(f"  {TEXT}\n").secret == SECRET


@given(st.integers(0, len(TEXT) - 1), st.characters(min_codepoint=33, max_codepoint=126))
def test_a_mistyped_character_is_found(at: int, char: str) -> None:
    typed = TEXT[:at] + char + TEXT[at + 1 :]
    if typed != TEXT:
        with pytest.raises(TokenError):
            EnrolToken.parse(typed)


@given(st.integers(0, len(TEXT) - 1))
def test_a_lost_end_is_found(length: int) -> None:
    with pytest.raises(TokenError) as caught:
        EnrolToken.parse(TEXT[:length])
    assert length <= len(PREFIX) or TEXT[len(PREFIX) : length][:20] not in str(caught.value)


@given(st.text(max_size=200) | st.text(max_size=200).map(PREFIX.__add__) | st.binary(max_size=300).map(spell))
def test_any_text_is_a_token_or_a_token_error(text: str) -> None:
    with pytest.raises(TokenError):
        EnrolToken.parse(text)


@pytest.mark.parametrize(
    "second_spelling", [TEXT + "=", TEXT + "==", TEXT[:40] + "\n" + TEXT[40:], TEXT + "A"]
)
def test_a_second_spelling_is_refused(second_spelling: str) -> None:
    with pytest.raises(TokenError, match="mistyped or cut off"):
        EnrolToken.parse(second_spelling)


def test_a_token_of_another_version_says_so() -> None:
    with pytest.raises(TokenError, match="another version"):
        EnrolToken.parse(TEXT.replace("-1.", "-2.", 1))


def test_text_that_is_no_token_says_how_one_begins() -> None:
    with pytest.raises(TokenError, match=r"begins with fleetgrad-enrol-1\."):
        EnrolToken.parse("hunter2")


@pytest.mark.parametrize(
    "change",
    [
        {"secret": b"short"},
        {"broker_url": ""},
        {"broker_url": "mqtt://é"},
        {"federation": "A"},
        {"device": "a/b"},
    ],
)
def test_a_token_out_of_bounds_cannot_be_made(change: dict[str, object]) -> None:
    with pytest.raises(TokenError):
        replace(TOKEN, **change)  # type: ignore[arg-type]


def test_printing_a_token_shows_neither_secret_nor_password() -> None:
    shown = f"{TOKEN!r} {TOKEN}"
    assert "hunter2" not in shown
    assert SECRET.hex() not in shown
    assert repr(SECRET) not in shown
    assert "00ff00ff00ff00ff" in shown


VECTOR = "dda2563eec116933610df836d000cc7b8209a547aacdee84fdc84886ff12e07e"
