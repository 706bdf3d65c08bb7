"""When a running device reads its data again."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.support.device_stage import Stage


def test_data_that_changed_are_read_again_in_the_next_round_and_others_are_kept(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.manifest(1)
    rounds = [1]

    def enough() -> bool:
        started = [told["round"] for told in stage.all_told("training_started")]
        if started == rounds and rounds[-1] < 3:
            if rounds[-1] == 2:  # for the third round
                np.savez(tmp_path / "train.npz", x=np.ones((24, 1, 8, 8), np.float32), y=np.arange(24) % 10)
            rounds.append(rounds[-1] + 1)
            stage.manifest(rounds[-1])
        return len(started) == 3

    stage.run(enough)
    stage.peer.close()
    assert [told["samples"] for told in stage.all_told("training_started")] == [64, 64, 24]
