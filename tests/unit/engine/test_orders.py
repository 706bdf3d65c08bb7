"""Orders, rollbacks and revocations on a real folder: obeyed once, whatever is killed, and answered in words."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from aggregator.config import AggregatorConfig, VersionsConfig, load_aggregator_config
from aggregator.core.records import CheckedIn, RoundAborted, VersionRestored
from aggregator.ledger.invariants import check_invariants
from aggregator.ledger.values import Batch, OrderKind, OrderRow
from aggregator.registrar import folder as registrar_folder
from aggregator.service import Service
from aggregator.setup import initialise
from aggregator.versions import VersionError
from edge_runtime.protocol.certificates import issue_revocations
from edge_runtime.protocol.crypto.keys import SigningKey
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.identities import Revocation, RevocationList
from edge_runtime.protocol.ids import DeviceId, FederationId, RoundId
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import FederationState, Phase
from tests.support.brokers import ROOT
from tests.support.engines import (
    FEDERATION,
    ONE,
    A,
    B,
    Said,
    announced,
    make_versions,
    opened,
    parameters,
    seen,
    service,
    stored,
)

ARTIFACT = ROOT / "examples" / "digits" / "artifact"


@pytest.fixture
def config(tmp_path: Path) -> AggregatorConfig:
    settings = ["round.cohort=1", "round.goal=1", "round.minimum=1"]
    return load_aggregator_config(
        initialise(tmp_path / "agg", FEDERATION, ARTIFACT, "mqtt://127.0.0.1:1", settings)
    )


def ordered(running: Service, kind: OrderKind, argument: str = "") -> OrderRow:
    """The order, after the engine has looked for it."""
    ledger = running.engine.ledger
    number = ledger.give_order(kind, argument, "mia@host")
    look(running)
    row = ledger.order(number)
    assert row is not None
    return row


def look(running: Service) -> None:
    running.engine._orders._looked_at = None
    running.engine.tick()


def ticket(device: DeviceId, sequence: int = 1) -> CheckedIn:
    return CheckedIn(device=device, sequence=sequence, expires_at=4e9, samples=7, codecs=("float32",))


# ---- pause, drain -----------------------------------------------------------------------------------


def test_a_paused_federation_opens_no_round_over_a_restart_until_it_is_resumed(
    config: AggregatorConfig,
) -> None:
    with service(config) as running:
        running.engine.start()
        assert ordered(running, OrderKind.PAUSE).answer == "no new round opens; no round is open"
        assert ordered(running, OrderKind.PAUSE).answer == "it is paused already"
        running.engine.ledger.commit(Batch(records=(ticket(A),)))
    said = Said()
    with service(config, said) as running:
        running.engine.start()
        running.engine.tick()
        assert running.engine.state.phase is None
        assert said.of("standing_orders")[0]["paused"] is True
        assert ordered(running, OrderKind.RESUME).obeyed
        assert running.engine.state.phase is Phase.COLLECTING
        assert ordered(running, OrderKind.PAUSE).answer == "no new round opens; round 1 ends normally"
        assert check_invariants(running.engine.ledger) == []


def test_a_drain_ends_the_open_round_first_survives_a_kill_and_holds_once(config: AggregatorConfig) -> None:
    with service(config) as running:
        running.engine.ledger.commit(Batch(records=(opened(running), ticket(B))))
    with service(config) as running:
        running.engine.start()
        assert ordered(running, OrderKind.DRAIN).answer == "the aggregator ends; round 1 ends normally first"
        assert not running.engine.drained
    with service(config) as running:
        running.engine.start()
        assert not running.engine.drained
        running.engine.clock = lambda: 5e9  # past the deadline
        running.engine.tick()
        running.engine.tick()
        assert (running.engine.state.phase, running.engine.drained) == (Phase.ABORTED, True)
    with service(config) as running:
        running.engine.start()
        assert not running.engine.drained
        assert running.engine.state.phase is Phase.COLLECTING
        assert check_invariants(running.engine.ledger) == []


# ---- devices ----------------------------------------------------------------------------------------


def test_an_evicted_device_loses_its_ticket_and_is_refused_until_it_is_readmitted(
    config: AggregatorConfig,
) -> None:
    with service(config) as running:
        running.engine.ledger.commit(
            Batch(records=(opened(running, cohort=(B,)), ticket(A)), devices=(seen(A),))
        )
    with service(config) as running:
        running.engine.start()
        assert ordered(running, OrderKind.EVICT, A).obeyed
        assert running.engine.state.tickets == {}
        with pytest.raises(RemoteProtocolError) as refused:
            running.engine._reception._admit(A, 9)
        assert refused.value.reject is Reject.EVICTED
        assert ordered(running, OrderKind.READMIT, A).obeyed
        running.engine._reception._admit(A, 1)
        assert ordered(running, OrderKind.READMIT, A).answer == "a is not evicted"


def test_an_evicted_devices_update_of_the_open_round_is_excluded_whatever_comes_after(
    config: AggregatorConfig,
) -> None:
    with service(config) as running:
        records = (opened(running, cohort=(A, B)), stored(A), stored(B))
        running.engine.ledger.commit(Batch(records=records, devices=(seen(A),)))
    with service(config) as running:
        running.engine.start()
        answer = ordered(running, OrderKind.EVICT, A).answer
        assert answer is not None
        assert answer.endswith("its update of the open round is excluded")
        assert running.engine.state.counted == {B}


# ---- rolling back -----------------------------------------------------------------------------------


def test_a_rollback_makes_a_new_version_of_old_parameters_and_the_next_round_starts_from_it(
    config: AggregatorConfig,
) -> None:
    with service(config) as running:
        make_versions(running, 3)
    said = Said()
    with service(config, said) as running:
        engine = running.engine
        engine.start()
        answer = "version 4 has the parameters of version 1"
        assert ordered(running, OrderKind.ROLLBACK, "1").answer == answer
        assert engine.state.version == 4
        assert np.array_equal(parameters(running, 4), parameters(running, 1))
        description = json.loads((engine.versions.path(4) / "version.json").read_text())
        assert (description["version"], description["restored_from"]) == (4, 1)
        manifest = announced(engine)[-1]
        assert (manifest.state, manifest.base_version) == (FederationState.WAITING, 4)
        (published,) = said.of("version_restored")
        assert (published["version"], published["restored_from"]) == (4, 1)
        assert check_invariants(engine.ledger) == []
        assert ordered(running, OrderKind.ROLLBACK, "0").obeyed
        assert np.array_equal(parameters(running, 5), parameters(running, 0))
        assert opened(running, RoundId(1, 4), 5).base_version == 5


def test_a_rollback_aborts_the_open_round_with_its_reason(config: AggregatorConfig) -> None:
    with service(config) as running:
        make_versions(running, 2)
        running.engine.ledger.commit(
            Batch(records=(opened(running, RoundId(1, 3), 2), stored(A, RoundId(1, 3))))
        )
    with service(config) as running:
        running.engine.start()
        answer = ordered(running, OrderKind.ROLLBACK, "1").answer
        assert answer == "version 3 has the parameters of version 1; round 3 was aborted"
        (last,) = running.engine.ledger.rounds(1)
        assert (last.phase, last.reason) == (Phase.ABORTED, "the model was rolled back to version 1")
        assert not list((config.folder / "round-keys").iterdir())
        assert check_invariants(running.engine.ledger) == []


class Killed(Exception):
    """The process is gone at this point."""


def dies_before(running: Service, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def die(*_: object, **__: object) -> None:
        raise Killed

    part, _, method = where.rpartition(".")
    monkeypatch.setattr(getattr(running.engine, part), method, die)


@pytest.mark.parametrize(
    "where", ["versions.write_parameters", "ledger.commit", "versions.publish", "versions.prune"]
)
def test_a_rollback_killed_at_any_point_is_made_exactly_once(
    config: AggregatorConfig, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    with service(config) as running:
        make_versions(running, 2)
        running.engine.ledger.commit(Batch(records=(opened(running, RoundId(1, 3), 2),)))
    with service(config) as running:
        running.engine.start()
        running.engine.ledger.give_order(OrderKind.ROLLBACK, "1", "mia@host")
        with monkeypatch.context() as patch:
            dies_before(running, patch, where)
            with pytest.raises(Killed):
                look(running)
    with service(config) as running:
        engine = running.engine
        engine.start()
        look(running)
        assert engine.state.version == 3
        assert np.array_equal(parameters(running, 3), parameters(running, 1))
        assert (engine.versions.path(3) / "version.json").exists()
        records = list(engine.ledger.journal())
        assert sum(isinstance(record, VersionRestored) for record in records) == 1
        assert sum(isinstance(record, RoundAborted) for record in records) == 1
        assert check_invariants(engine.ledger) == []
        assert engine.ledger.waiting_orders() == []


@pytest.mark.parametrize(
    ("kind", "argument", "complaint"),
    [
        (OrderKind.EVICT, "b", "no device b has ever checked in"),
        (OrderKind.EVICT, "B!", "B!"),
        (OrderKind.READMIT, "b", "no device b has ever checked in"),
        (OrderKind.ROLLBACK, "2", "version 2 is the newest already"),
        (OrderKind.ROLLBACK, "3", "there is no version 3; the newest is 2"),
        (OrderKind.ROLLBACK, "-1", "there is no version -1"),
        (OrderKind.ROLLBACK, "9" * 40, "there is no version 999"),
    ],
)
def test_an_order_that_makes_no_sense_is_refused_with_its_reason_and_changes_nothing(
    config: AggregatorConfig, kind: OrderKind, argument: str, complaint: str
) -> None:
    with service(config) as running:
        make_versions(running, 2)
    with service(config) as running:
        running.engine.start()
        before = list(running.engine.ledger.journal())
        row = ordered(running, kind, argument)
        assert row.obeyed is False
        assert row.answer is not None
        assert complaint in row.answer
        assert list(running.engine.ledger.journal()) == before


# ---- the last N versions ----------------------------------------------------------------------------


def test_only_the_newest_versions_stay_on_disk_and_a_removed_one_is_told_as_such(
    config: AggregatorConfig, tmp_path: Path
) -> None:
    with service(config) as running:
        make_versions(running, 4)
    keeping = dataclasses.replace(config, versions=VersionsConfig(keep=2))
    (config.folder / "versions" / ".removed-000001").mkdir()  # of a kill in the middle
    (config.folder / "versions" / "1").mkdir()  # not ours
    with service(keeping) as running:
        running.engine.start()
        on_disk = sorted(path.name for path in (config.folder / "versions").iterdir())
        assert on_disk == ["000003", "000004", "1"]
        assert running.engine.versions.kept(3) == (3,)
        assert [row.version for row in running.engine.ledger.versions()] == [1, 2, 3, 4]
        row = ordered(running, OrderKind.ROLLBACK, "2")
        assert row.obeyed is False
        assert row.answer is not None
        assert "version 2 is no longer on disk: [versions] keep = 2" in row.answer
        with pytest.raises(VersionError, match="no longer on disk"):
            running.engine.versions.export(1, tmp_path / "out")
        assert ordered(running, OrderKind.ROLLBACK, "3").obeyed
        assert running.engine.versions.kept(9) == (4, 5)
        assert ordered(running, OrderKind.ROLLBACK, "0").obeyed
        assert check_invariants(running.engine.ledger) == []


# ---- revocations ------------------------------------------------------------------------------------


def publish_list(config: AggregatorConfig, number: int, federation: str = FEDERATION, **epochs: int) -> None:
    assert config.revocations_file is not None
    root = SigningKey(registrar_folder.read_key(config.revocations_file.parent / registrar_folder.ROOT_KEY))
    entries = tuple(Revocation(device=DeviceId(name), epoch=epoch) for name, epoch in sorted(epochs.items()))
    listed = RevocationList(federation=FederationId(federation), number=number, entries=entries)
    config.revocations_file.write_text(issue_revocations(CRYPTO, root, listed).hex() + "\n")


def test_a_revoked_device_is_not_drawn_at_the_next_manifest_and_enrolled_again_it_is(
    config: AggregatorConfig,
) -> None:
    said = Said()
    with service(config) as running:
        running.engine.ledger.commit(Batch(records=(ticket(A),)))
    with service(config, said) as running:
        engine = running.engine
        engine.ledger.commit(Batch())
        publish_list(config, 1, b=1)
        engine.start()  # takes list 1 and opens round 1 with a
        engine.tick()
        assert engine.state.round is not None
        assert engine.state.round.cohort == {A}
        publish_list(config, 2, a=1, b=1)
        engine.clock = lambda: 5e9
        engine.tick()  # too late: round 1 is aborted
        records = (dataclasses.replace(ticket(A, 2), expires_at=9e9),)
        engine.ledger.commit(Batch(records=records))
        engine.state.tickets[A] = records[0]
        engine.tick()  # draws a, reads list 2 before the manifest is made, and draws anew
        assert engine.state.phase is Phase.ABORTED
        assert engine.state.tickets == {}
        with pytest.raises(RemoteProtocolError) as refused:
            engine._reception._admit(A, 1)
        assert refused.value.reject is Reject.REVOKED
        engine._reception._admit(A, 2)
        assert [fields["number"] for fields in said.of("revocations_taken")] == [1, 2]
        assert check_invariants(engine.ledger) == []
    assert config.revocations_file is not None
    config.revocations_file.unlink()
    with service(config, said := Said()) as running:
        running.engine.start()
        assert running.engine.state.revoked == {A: 1, B: 1}
        assert "is gone; list 2 holds" in said.of("revocations_refused")[0]["reason"]


def older(config: AggregatorConfig) -> None:
    publish_list(config, 4)


def another_of_its_number(config: AggregatorConfig) -> None:
    publish_list(config, 5, b=1)


def of_another_federation(config: AggregatorConfig) -> None:
    publish_list(config, 6, "other")


def forged(config: AggregatorConfig) -> None:
    publish_list(config, 6)
    assert config.revocations_file is not None
    raw = bytearray.fromhex(config.revocations_file.read_text())
    raw[-1] ^= 1
    config.revocations_file.write_text(raw.hex())


def no_hex(config: AggregatorConfig) -> None:
    assert config.revocations_file is not None
    config.revocations_file.write_bytes(b"\xff")


@pytest.mark.parametrize(
    ("tamper", "complaint"),
    [
        (older, "is list 4; the newer list 5 holds"),
        (another_of_its_number, "another list 5 than the one taken"),
        (of_another_federation, "not of fed"),
        (forged, "not signed by the root"),
        (no_hex, "no hex"),
    ],
)
def test_a_list_that_cannot_be_trusted_leaves_the_last_one_in_force_and_is_reported(
    config: AggregatorConfig, tamper: Callable[[AggregatorConfig], None], complaint: str
) -> None:
    publish_list(config, 5, a=3)
    with service(config) as running:
        running.engine.start()
    tamper(config)
    with service(config, said := Said()) as running:
        running.engine.start()
        assert (running.engine.state.revocations, running.engine.state.revoked) == (5, {A: 3})
        assert complaint in said.of("revocations_refused")[0]["reason"]


def test_the_open_round_of_a_restart_is_not_touched_by_a_new_list(config: AggregatorConfig) -> None:
    with service(config) as running:
        running.engine.ledger.commit(Batch(records=(opened(running),)))
    publish_list(config, 1, a=1)
    with service(config) as running:
        running.engine.start()
        assert running.engine.state.round is not None
        assert running.engine.state.round.round_id == ONE
        assert running.engine.state.revoked == {}
