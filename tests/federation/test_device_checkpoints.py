"""A device process that dies in the middle of a long training, by SIGKILL and by SIGTERM, makes the same model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.federation import Federation, aggregated_once, federation

# 2,340 steps: some seconds of training.
LONG_ROUND = {"samples": [1237], "round__rounds": 1, "plan__epochs": 60}


def _federation(folder: Path) -> Federation:
    folder.mkdir()
    fed = federation(folder, **LONG_ROUND)  # type: ignore[arg-type]
    config = fed.folder / "device-0.toml"
    config.write_text(config.read_text().replace("[training]\n", "[training]\ncheckpoint_s = 0.1\n"))
    return fed


@pytest.mark.long
def test_a_device_killed_in_mid_training_goes_on_from_its_checkpoint_to_the_same_model(
    tmp_path: Path,
) -> None:
    with _federation(tmp_path / "undisturbed") as fed:
        fed.start()
        undisturbed = fed.finish()
    with _federation(tmp_path / "disturbed") as fed:
        fed.start()
        device = fed.devices["device-0"]
        device.wait_for("checkpoint_written")
        device.kill()
        written = device.seen("checkpoint_written")
        device.start()
        device.wait_for("training_resumed")
        device.wait_for("checkpoint_written", times=len(written) + 1)
        device.close()  # SIGTERM: it writes another one, of its last step
        stopped = [event for event in device.seen("checkpoint_written") if event.run == 1][-1]
        device.start()
        assert fed.finish() == undisturbed
        aggregated_once(fed.status(), devices=1, versions=1)
        first, second = device.seen("training_resumed")
        assert first.run == 1
        assert first.fields["step"] >= written[-1].fields["step"]
        assert (second.run, second.fields["step"]) == (2, stopped.fields["step"])
        assert [event.run for event in device.seen("training_started")] == [0]
        assert list((fed.folder / "device-0" / "checkpoints").iterdir()) == []
        assert device.errors() == ""
