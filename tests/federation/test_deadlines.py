"""What a deadline does: close a round without the missing, or abort it; the late are told, and not counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.protocol.rounds import Verdict
from tests.support.federation import federation
from tests.support.programs import eventually

pytestmark = pytest.mark.long


def test_two_dead_of_five_do_not_hold_a_round_up_and_too_few_abort_it(tmp_path: Path) -> None:
    """Round 1: five selected, goal 4, two die: closed at the deadline with three, the minimum.

    Round 2: the three that are left, one of them too late: aborted. Round 3: all three again.
    """
    settings = {"goal": 4, "minimum": 3, "rounds": 2, "deadline_s": 6.0, "patience_s": 0.5}
    with federation(
        tmp_path,
        samples=(160,) * 5,
        record=True,
        gated=["device-3", "device-4"],
        **{f"round__{key}": value for key, value in settings.items()},
    ) as fed:
        fed.start()
        for name in ("device-3", "device-4"):
            fed.wait_at_gate(name)
            fed.devices[name].kill()
        fed.aggregator.wait_for("round_published", round=1)
        late = fed.devices["device-2"]
        late.wait_for("settled", round=1)
        # With its ticket given it sleeps through round 2 from the moment it is selected.
        fed.aggregator.wait_for("round_opened", round=2)
        late.freeze()
        fed.aggregator.wait_for("round_aborted", round=2)
        late.thaw()
        late.wait_for("settled", round=2, verdict="late")
        versions = fed.finish()
        status = fed.status()
        receipts = fed.traffic.receipts("device-2")

    assert sorted(versions) == [1, 2]
    assert status["invariant_violations"] == []
    rows = {row["round"]: row for row in status["rounds"]}
    assert [
        (n, rows[n]["phase"], rows[n]["cohort"], rows[n]["stored"], rows[n]["accepted"]) for n in (1, 2, 3)
    ] == [
        (1, "published", 5, 3, 3),
        (2, "aborted", 3, 2, None),
        (3, "published", 3, 3, 3),
    ]
    assert "2 of at least 3 updates at the deadline" in rows[2]["reason"]
    assert rows[3]["base_version"] == 1
    assert status["outcomes"] == {"aggregated": 6, "aborted": 2}
    assert status["counters"]["late"] >= 1
    assert {(number, receipt.verdict) for number, receipt in receipts} == {
        (1, Verdict.STORED),
        (2, Verdict.LATE),
        (3, Verdict.STORED),
    }


def test_an_update_after_the_version_is_published_is_late_and_changes_nothing(tmp_path: Path) -> None:
    """Two of three are the goal; the third finds its round published, and takes part in the next."""
    names = ["device-0", "device-1", "device-2"]
    with federation(
        tmp_path, samples=(160,) * 3, record=True, gated=names, round__rounds=2, round__goal=2,
        round__minimum=2,
    ) as fed:  # fmt: skip
        config = str(fed.folder / "aggregator" / "aggregator.toml")
        fed.start()
        for name in names:
            fed.wait_at_gate(name)
        # Were round 2 to open, the third would leave its training for it, and no late update would come.
        paused = fed.command("aggregator.cli", "pause", "--config", config, "--wait-s", "60")
        assert paused.stdout == "no new round opens; round 1 ends normally\n"
        fed.open_gate("device-0")
        fed.open_gate("device-1")
        fed.aggregator.wait_for("round_published", round=1)
        first = fed.models()[1]
        fed.open_gate("device-2")
        fed.devices["device-2"].wait_for("settled", round=1, verdict="late")
        assert fed.models() == {1: first}
        fed.command("aggregator.cli", "resume", "--config", config, "--wait-s", "60")
        versions = fed.finish()
        status = fed.status()
        eventually(lambda: bool(fed.traffic.receipts("device-2")), "the receipt is recorded")
        receipts = fed.traffic.receipts("device-2")

    assert versions[1] == first
    assert (receipts[0][0], receipts[0][1].verdict) == (1, Verdict.LATE)
    assert status["invariant_violations"] == []
    assert [row["accepted"] for row in status["rounds"]] == [2, 2]
    assert status["counters"]["late"] >= 1
