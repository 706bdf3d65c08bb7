"""A message that decodes is within its bounds; one step beyond is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from edge_runtime.protocol import certificates, topics
from edge_runtime.protocol import wire_pb2 as wire
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.envelope import Header, pack, seal_context, unpack
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.ids import DeviceId, FederationId, RoundId, device_id, shard_of
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.manifest import Cohort
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import Verdict
from edge_runtime.protocol.schedules import MAX_ROUNDS, SHAPES, Schedule
from tests.support import message_samples as samples
from tests.support.message_samples import BODIES, FEDERATION, MANIFEST

NAN, INFINITY = float("nan"), float("inf")

BEYOND: list[tuple[str, dict[str, Any]]] = [
    ("CheckIn", {"ttl_s": 0}),
    ("CheckIn", {"ttl_s": 7 * 24 * 3600 + 1}),
    ("CheckIn", {"samples": (1 << 40) + 1}),
    ("CheckIn", {"codecs": ("x",) * 17}),
    ("CheckIn", {"codecs": ("",)}),
    ("CheckIn", {"codecs": ("x" * 49,)}),
    ("CheckIn", {"runtime": "x" * 101}),
    ("Fetch, wave", {"digest": bytes(31)}),
    ("Update", {"samples": 0}),
    ("Update", {"samples": (1 << 40) + 1}),
    ("Update", {"steps": 0}),
    ("Update", {"loss_first": NAN}),
    ("Update", {"loss_last": INFINITY}),
    ("Update", {"codec": ""}),
    ("Telemetry", {"train_s": NAN}),
    ("Telemetry", {"temperature_c": -INFINITY}),
    ("Receipt, stored", {"reject": Reject.TOO_LARGE}),
    ("Receipt, rejected", {"reject": None}),
    ("Receipt, stored", {"update_digest": b""}),
    ("Chunk", {"digest": bytes(33)}),
    ("Cohort", {"devices": ()}),
    ("Cohort", {"devices": ("b", "a")}),
    ("Cohort", {"devices": ("a", "a")}),
    ("Cohort", {"devices": ("a/b",)}),
    ("EnrolRequest", {"token_secret": bytes(31)}),
    ("EnrolRequest", {"signing_key": bytes(33)}),
    ("EnrolRequest", {"token_id": "../x"}),
    ("EnrolAnswer, enrolled", {"request_digest": b""}),
    ("DeviceCertificate", {"role": 0}),
    ("DeviceCertificate", {"role": 3}),
    ("DeviceCertificate", {"device": "+"}),
    ("DeviceCertificate", {"signing_key": b""}),
    ("AggregatorCertificate", {"first_round": 5, "last_round": 4}),
    ("AggregatorCertificate", {"sealing_key": b""}),
    ("Manifest, collecting", {"federation": "#"}),
    ("Manifest, collecting", {"cohort": None}),
    ("Manifest, collecting", {"sealing_key": bytes(31)}),
    ("Manifest, collecting", {"chunk_bytes": 8191}),
    ("Manifest, collecting", {"chunk_bytes": (16 << 20) + 1}),
    ("Manifest, collecting", {"parameter_count": 0}),
    ("Manifest, collecting", {"parameter_count": (1 << 28) + 1}),
    ("Manifest, collecting", {"model": replace(MANIFEST.model, size=0)}),
    ("Manifest, collecting", {"artifact": replace(MANIFEST.artifact, size=(1 << 30) + 1)}),
]


@pytest.mark.parametrize(("name", "changes"), BEYOND, ids=lambda case: str(case)[:40])
def test_a_value_beyond_its_bounds_is_malformed(name: str, changes: dict[str, Any]) -> None:
    good = BODIES[name]
    with pytest.raises(RemoteProtocolError) as refusal:
        type(good).decode(replace(good, **changes).encode())
    assert refusal.value.reject is Reject.MALFORMED


def test_a_verdict_or_state_of_a_newer_peer_is_malformed() -> None:
    receipt = wire.Receipt(verdict=len(Verdict) + 1, update_digest=bytes(32)).SerializeToString()
    manifest = wire.Manifest()
    manifest.ParseFromString(MANIFEST.encode())
    manifest.state = 4
    for kind, raw in (("Receipt, late", receipt), ("Manifest, waiting", manifest.SerializeToString())):
        with pytest.raises(RemoteProtocolError, match="malformed"):
            type(BODIES[kind]).decode(raw)


PLANS = [
    {"epochs": 0, "steps": 0},
    {"epochs": 1, "steps": 1},
    {"epochs": 10_001},
    {"epochs": 0, "steps": 100_000_001},
    {"batch_size": 0},
    {"batch_size": (1 << 20) + 1},
    {"learning_rate": 0.0},
    {"learning_rate": NAN},
    {"momentum": 1.0},
    {"momentum": -0.1},
    {"optimizer": ""},
    {"optimizer": "lamb"},
    {"nesterov": True, "momentum": 0.0},
    {"nesterov": True, "optimizer": "adam"},
    {"weight_decay": -0.1},
    {"weight_decay": 101.0},
    {"weight_decay": NAN},
    {"adam_beta1": -0.1},
    {"adam_beta1": NAN},
    {"adam_beta2": 0.9999999},
    {"adam_beta2": NAN},
    {"adam_epsilon": 0.0},
    {"adam_epsilon": INFINITY},
    {"schedule": Schedule(factor=0.5)},
    {"schedule": Schedule(every=20)},
    {"schedule": Schedule(after=20)},
    {"schedule": Schedule(rounds=20)},
    {"schedule": Schedule(warmup_rounds=MAX_ROUNDS + 1)},
    {"schedule": Schedule(shape="step", factor=0.5)},
    {"schedule": Schedule(shape="step", factor=0.0, every=1)},
    {"schedule": Schedule(shape="step", factor=1.1, every=1)},
    {"schedule": Schedule(shape="step", factor=NAN, every=1)},
    {"schedule": Schedule(shape="step", factor=0.5, every=1, rounds=1)},
    {"schedule": Schedule(shape="cosine", factor=0.5)},
    {"schedule": Schedule(shape="cosine", factor=-0.1, rounds=10)},
    {"schedule": Schedule(shape="cosine", factor=INFINITY, rounds=10)},
    {"schedule": Schedule(shape="cosine", rounds=10, warmup_rounds=10)},
    {"schedule": Schedule(shape="cosine", rounds=10, every=1)},
    {"max_grad_norm": -1.0},
    {"max_grad_norm": INFINITY},
    {"beta": -1.1},
    {"beta": 8.1},
    {"sample_cap": 0},
    {"sample_cap": (1 << 40) + 1},
    {"max_abs_delta": 0.0},
    {"max_abs_delta": 1e7},
    {"scale_bits": 61},
    {"codecs": ()},
    {"codecs": ("x",) * 17},
]


@pytest.mark.parametrize("changes", PLANS, ids=str)
def test_a_plan_beyond_its_bounds_is_malformed(changes: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError) as refusal:
        Plan.from_wire(replace(Plan(), **changes).to_wire())
    assert refusal.value.reject is Reject.MALFORMED


def test_a_plan_that_names_no_optimizer_or_an_unknown_shape_is_malformed() -> None:
    silent, curved = Plan().to_wire(), Plan().to_wire()
    silent.ClearField("optimizer")
    curved.schedule.shape = len(SHAPES)
    for message in (silent, curved):
        with pytest.raises(RemoteProtocolError, match="malformed"):
            Plan.from_wire(message)


def test_the_author_of_a_plan_is_told_the_key_of_the_schedule() -> None:
    for schedule, complaint in (
        (Schedule(shape="linear"), "schedule.shape must be one of constant, step, cosine"),
        (Schedule(shape="cosine", rounds=9, every=5), "schedule.every means nothing to the shape cosine"),
        (Schedule(shape="step", factor=0.5), "schedule.every at least 1"),
    ):
        assert complaint in str(Plan(schedule=schedule).problem())


def test_a_schedule_that_is_absent_is_constant() -> None:
    assert not Plan().to_wire().HasField("schedule")
    assert Plan.from_wire(Plan().to_wire()).schedule == Schedule()


def test_the_plan_nobody_has_changed_has_no_problem() -> None:
    assert Plan().problem() is None
    assert Plan.from_wire(Plan().to_wire()) == Plan()


def test_a_manifest_at_rest_names_no_cohort_and_no_key_even_if_they_are_sent() -> None:
    waiting = replace(samples.WAITING, cohort=MANIFEST.cohort, sealing_key=MANIFEST.sealing_key)
    assert type(waiting).decode(waiting.encode()) == samples.WAITING


def test_a_manifest_stays_far_below_its_bound() -> None:
    worst = replace(MANIFEST, plan=replace(MANIFEST.plan, codecs=("x" * 48,) * 16))
    assert len(worst.encode()) < Kind.MANIFEST.max_payload_bytes // 8


# ---- envelope and certificates ----------------------------------------------------------------------


def _envelope(header: dict[str, Any] | None = None, **changes: Any) -> bytes:
    message = wire.Envelope()
    message.ParseFromString(samples.SAMPLES[2].messages[0])
    inner = wire.Header()
    inner.ParseFromString(message.header)
    for name, value in (header or {}).items():
        setattr(inner, name, value)
    message.header = inner.SerializeToString()
    for name, value in changes.items():
        setattr(message, name, value)
    return message.SerializeToString()


@pytest.mark.parametrize(
    ("raw", "reject"),
    [
        (_envelope({"kind": 99}), Reject.UNEXPECTED_KIND),
        (_envelope({"kind": Kind.RECEIPT.number}), Reject.UNEXPECTED_KIND),
        (_envelope({"federation": "other"}), Reject.WRONG_FEDERATION),
        (_envelope({"federation": "UPPER"}), Reject.MALFORMED),
        (_envelope({"device": "a/b"}), Reject.MALFORMED),
        (_envelope({"manifest_digest": bytes(31)}), Reject.MALFORMED),
        (_envelope({"payload_digest": b""}), Reject.MALFORMED),
        (_envelope({"payload_digest": bytes(32)}), Reject.BAD_DIGEST),
        (_envelope({"chunk_count": 0}), Reject.MALFORMED),
        (_envelope({"chunk_index": 1}), Reject.MALFORMED),
        (_envelope({"chunk_count": 2}), Reject.MALFORMED),
        (_envelope({"chunk_count": 65_537}), Reject.MALFORMED),
        (_envelope(signature=bytes(63)), Reject.MALFORMED),
        (_envelope(signature=b""), Reject.MALFORMED),
        (_envelope(body=bytes(64 * 1024 + 1)), Reject.TOO_LARGE),
        (_envelope(body=b""), Reject.BAD_DIGEST),
    ],
)
def test_an_envelope_that_contradicts_itself_is_refused(raw: bytes, reject: Reject) -> None:
    with pytest.raises(RemoteProtocolError) as refusal:
        unpack(raw, FEDERATION, Kind.FETCH)
    assert refusal.value.reject is reject


def test_seal_contexts_of_different_headers_differ() -> None:
    header: Header = BODIES["Header"]
    others = [
        replace(header, kind=Kind.TELEMETRY),
        replace(header, federation=FederationId("digit"), device=DeviceId("spi-3")),
        replace(header, round_id=RoundId(7, 2)),
        replace(header, manifest_digest=None),
        replace(header, device=None),
    ]
    assert len({seal_context(one) for one in [header, *others]}) == 6
    assert seal_context(header) == seal_context(replace(header, sequence=1, chunk_index=0, chunk_count=1))


def test_an_empty_payload_is_one_empty_piece() -> None:
    (raw,) = pack(BODIES["Header"], b"", lambda message: bytes(64))
    assert unpack(raw, FEDERATION, Kind.UPDATE).body == b""


def test_a_certificate_does_not_pass_for_one_of_the_other_kind() -> None:
    root = samples.verify_key("root")
    with pytest.raises(RemoteProtocolError, match="bad_certificate"):
        certificates.check_device(
            CRYPTO, root, samples.AGGREGATOR_CERTIFICATE_SIGNED, FEDERATION, samples.DEVICE
        )
    with pytest.raises(RemoteProtocolError, match="bad_certificate"):
        certificates.check_aggregator(
            CRYPTO, root, samples.DEVICE_CERTIFICATE_SIGNED, FEDERATION, samples.ROUND
        )


@pytest.mark.parametrize("number", [0, 1000])
def test_a_certificate_covers_its_first_and_its_last_round(number: int) -> None:
    root, raw = samples.verify_key("root"), samples.AGGREGATOR_CERTIFICATE_SIGNED
    certificates.check_aggregator(CRYPTO, root, raw, FEDERATION, RoundId(2, number))
    with pytest.raises(RemoteProtocolError, match="bad_certificate"):
        certificates.check_aggregator(CRYPTO, root, raw, FEDERATION, RoundId(2, 1001))


def test_an_enrolment_request_does_not_print_its_secret() -> None:
    shown = repr(BODIES["EnrolRequest"])
    assert samples.TOKEN_SECRET.hex() not in shown
    assert repr(samples.TOKEN_SECRET) not in shown


# ---- names and topics -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", "-a", "a-", "_a", "a_", "A", "a.b", "a/b", "a b", "a" * 49, "ä", "a\n", "+", "#", "..", "a\0"],
)
def test_a_bad_name_is_refused(text: str) -> None:
    with pytest.raises(RemoteProtocolError, match="malformed"):
        device_id(text)


@pytest.mark.parametrize("text", ["a", "0", "a" * 48, "pi-3", "a_b", "0-9"])
def test_a_good_name_is_taken_as_it_is(text: str) -> None:
    assert device_id(text) == text


def test_the_shard_is_the_last_byte_of_the_names_hash() -> None:
    assert shard_of(DeviceId("pi-3")) == 89
    assert topics.up(FEDERATION, DeviceId("pi-3")).split("/")[4] == "89"


def test_a_cohort_is_found_again_sorted() -> None:
    cohort = Cohort(devices=(DeviceId("a"), DeviceId("b-1"), DeviceId("b1")))
    assert Cohort.decode(cohort.encode()) == cohort
