"""An operator's orders to a federation of running processes, given by the commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from aggregator import cli
from tests.support.command_line import refusal, run
from tests.support.federation import ARTIFACT, Federation, federation

pytestmark = pytest.mark.long


def order(fed: Federation, *words: str) -> str:
    """What the command prints; the aggregator runs, so it answers."""
    done = run(cli.main, *words, "--config", config(fed), "--wait-s", "60")
    assert (done.code, done.err) == (0, "")
    return done.out.strip()


def config(fed: Federation) -> str:
    return str(fed.folder / "aggregator" / "aggregator.toml")


def parameters(fed: Federation, version: int) -> bytes:
    return (fed.version(version) / "params.bin").read_bytes()


def test_an_evicted_device_holds_up_no_round_is_refused_and_comes_back_when_readmitted(
    tmp_path: Path,
) -> None:
    with federation(
        tmp_path, gated=["device-2"], round__minimum=2, round__patience_s=0.5, round__rounds=1000
    ) as fed:
        fed.start()
        fed.wait_at_gate("device-2")
        for device in ("device-0", "device-1"):
            fed.aggregator.wait_for("update_stored", round=1, device=device)
        answer = order(fed, "evict", "device-2")
        assert answer == "device-2 takes part in nothing until `aggregator readmit device-2`"
        frozen = fed.aggregator.wait_for("round_frozen", round=1)
        assert frozen.fields["accepted"] == ["device-0", "device-1"]
        fed.open_gate("device-2")
        fed.aggregator.wait_for("refused", device="device-2", reject="evicted")
        opened = fed.aggregator.wait_for("round_opened", round=2)
        assert opened.fields["cohort"] == ["device-0", "device-1"]
        order(fed, "readmit", "device-2")
        fed.aggregator.wait_for("round_opened", cohort=["device-0", "device-1", "device-2"], times=2)
        fed.aggregator.close()
        assert fed.status()["invariant_violations"] == []


def test_pause_rollback_resume_and_drain_over_a_running_federation_and_a_stopped_one(tmp_path: Path) -> None:
    with federation(tmp_path, gated=["device-2"], round__rounds=1000) as fed:
        fed.start()
        fed.wait_at_gate("device-2")
        assert order(fed, "pause") == "no new round opens; round 1 ends normally"
        fed.open_gate("device-2")
        fed.aggregator.wait_for("round_published", version=1)
        refused = refusal(cli.main, "rollback", "--to", "9", "--config", config(fed), "--wait-s", "60")
        assert "there is no version 9; the newest is 1" in refused
        assert order(fed, "rollback", "--to", "0") == "version 2 has the parameters of version 0"
        fed.aggregator.wait_for("version_restored", version=2, restored_from=0)
        assert parameters(fed, 2) == (ARTIFACT / "params.bin").read_bytes() != parameters(fed, 1)
        assert not fed.aggregator.seen("round_opened", round=2)
        order(fed, "resume")
        fed.aggregator.wait_for("round_opened", base_version=2, round=2)
        assert order(fed, "drain").startswith("the aggregator ends; ")
        assert fed.aggregator.wait() == 0
        assert fed.aggregator.seen("drained")
        assert fed.status()["invariant_violations"] == []

        assert "nothing to drain" in refusal(cli.main, "drain", "--config", config(fed))
        waits = run(cli.main, "pause", "--config", config(fed), "--wait-s", "0")
        assert "takes effect when the aggregator runs" in waits.out
        fed.aggregator.start()
        fed.aggregator.wait_for("order_obeyed", kind="pause")
        assert order(fed, "resume") == "rounds open again"
        fed.aggregator.close()
        assert fed.status()["invariant_violations"] == []


def test_a_revoked_device_is_refused_from_the_next_manifest_and_comes_back_with_a_new_key(
    tmp_path: Path,
) -> None:
    with federation(
        tmp_path, samples=(120, 130, 140), round__minimum=2, round__patience_s=0.5, round__rounds=1000
    ) as fed:
        everybody, others = list(fed.devices), ["device-0", "device-1"]
        fed.start()
        fed.aggregator.wait_for("round_published", version=1)
        revoked = fed.command(
            *("aggregator.cli", "registrar", "revoke", "--device", "device-2"),
            *("--folder", str(fed.folder / "aggregator" / "registrar")),
        )
        assert revoked.returncode == 0, revoked.stderr
        assert "certificate (epoch 1)" in revoked.stdout
        fed.aggregator.wait_for("revocations_taken", number=2, devices=1)
        fed.aggregator.wait_for("round_opened", cohort=others)
        fed.aggregator.wait_for("refused", device="device-2", reject="revoked")
        fed.aggregator.wait_for("round_published", updates=2)
        events = fed.aggregator.events()
        (taken,) = [i for i, event in enumerate(events) if event.name == "revocations_taken"]
        cohorts = [event.fields["cohort"] for event in events[taken:] if event.name == "round_opened"]
        assert all(cohort == others for cohort in cohorts)

        fed.devices["device-2"].close()
        fed.enrol_again("device-2")
        full = len(fed.aggregator.seen("round_opened", cohort=everybody))
        fed.devices["device-2"].start()
        back = fed.aggregator.wait_for("round_opened", cohort=everybody, times=full + 1)
        fed.aggregator.wait_for("update_stored", round=back.fields["round"], device="device-2")
        fed.aggregator.close()
        assert fed.status()["invariant_violations"] == []
