"""The pieces of the demo that need no fleet: the split, the faults, the processes, the folder, the verdict."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fldemo.baselines import Baselines
from fldemo.data import dirichlet_parts, load_digits_split, write_npz
from fldemo.examples import DIGITS
from fldemo.federation import Run, record
from fldemo.figures import Figures, Memory
from fldemo.memory import MemorySampler
from fldemo.processes import Event, ProcessError, Supervisor
from fldemo.report import seed_line
from fldemo.scenario import (
    DEVICES,
    FIRST_KILL,
    RETURN,
    SECOND_KILL,
    TRIES,
    Faults,
    Kill,
    Restart,
    Round,
    sample_passes,
)
from fldemo.verify import verify
from fldemo.workfolder import MARKER, WorkFolderError, fresh_folder
from hypothesis import given, settings
from hypothesis import strategies as st

# ---- data -------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(parts=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_a_split_gives_every_row_to_exactly_one_part_of_at_least_the_least_size(
    parts: int, seed: int
) -> None:
    labels = np.arange(600) % 10
    split = dirichlet_parts(labels, parts, np.random.default_rng(seed), least=5)
    assert Counter(np.concatenate(split).tolist()) == Counter(range(600))
    assert min(map(len, split)) >= 5


def test_too_many_parts_for_the_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="fewer parts"):
        dirichlet_parts(np.arange(50) % 10, 6, np.random.default_rng(0), least=10)


def test_the_split_of_the_digits_is_a_function_of_the_seed_and_far_from_even() -> None:
    one, again, other = load_digits_split(10, 3), load_digits_split(10, 3), load_digits_split(10, 4)
    assert all(np.array_equal(a.x, b.x) for a, b in zip(one.devices, again.devices, strict=True))
    assert not np.array_equal(one.held_out.x, other.held_out.x)
    assert sum(len(part.y) for part in one.devices) == len(one.pooled.y) == 1797 - len(one.held_out.y)
    assert one.pooled.x.dtype == np.float32
    assert (one.pooled.x.min(), one.pooled.x.max()) == (0.0, 1.0)
    classes = [len(np.unique(part.y)) for part in one.devices]
    assert min(classes) < 10
    # stratified: every class has its share of the held-out fifth
    assert np.bincount(one.held_out.y).min() >= 34


def test_a_device_file_holds_the_samples_it_was_given(tmp_path: Path) -> None:
    part = load_digits_split(10, 0).devices[0]
    write_npz(tmp_path / "train.npz", part)
    with np.load(tmp_path / "train.npz", allow_pickle=False) as stored:
        assert np.array_equal(stored["x"], part.x)
        assert np.array_equal(stored["y"], part.y)


# ---- faults -----------------------------------------------------------------------------------------


def event(source: str, kind: str, round_: int = 0, **fields: object) -> Event:
    return Event(source, 0.0, {"event": kind, "round": round_, **fields})


def play(faults: Faults, number: int, accepted: list[str]) -> list[Kill | Restart | None]:
    """A round in which all of DEVICES train, device-01 first."""
    events = [event(device, "training_started", number) for device in DEVICES]
    events.append(event("aggregator", "round_frozen", number, accepted=accepted))
    events.append(event("aggregator", "round_published", number))
    done: list[Kill | Restart | None] = [faults.kill(one) for one in events]
    return [one for one in done + [faults.restart(one) for one in events] if one]


def test_two_devices_die_in_different_rounds_and_the_first_returns() -> None:
    faults = Faults()
    done = [one for number in range(1, RETURN + 3) for one in play(faults, number, ["device-09"])]
    assert done == [
        Kill("device-01", FIRST_KILL),
        Kill("device-02", SECOND_KILL),
        Restart("device-01", RETURN),
    ]


def test_a_kill_that_came_too_late_is_undone_and_repeated_in_a_later_round() -> None:
    faults = Faults()
    assert [play(faults, number, []) for number in range(1, FIRST_KILL)] == [[]] * (FIRST_KILL - 1)
    late = play(faults, FIRST_KILL, ["device-01", "device-03"])
    assert late == [Kill("device-01", FIRST_KILL), Restart("device-01", FIRST_KILL - 1)]
    assert (faults.kills, faults.restarts) == ([], [])
    assert play(faults, FIRST_KILL + 1, ["device-03"]) == [Kill("device-01", FIRST_KILL + 1)]


def test_kills_that_always_come_too_late_end_after_some_tries() -> None:
    faults = Faults()
    for number in range(1, 3 * TRIES):
        play(faults, number, list(DEVICES))
    assert (len(faults.missed), faults.kills, faults.restarts) == (TRIES, [], [])


def test_a_device_that_starts_late_in_a_closed_round_is_spared() -> None:
    faults = Faults()
    faults.kill(event("aggregator", "round_frozen", FIRST_KILL, accepted=[]))
    assert faults.kill(event("device-01", "training_started", FIRST_KILL)) is None


def test_the_passes_are_those_of_published_updates_only() -> None:
    samples = {"a": 100, "b": 300}
    rounds = [
        Round(1, ("a", "b"), accepted=("a", "b"), published=True),
        Round(2, ("a", "b"), accepted=("b",), published=True),
        Round(3, ("a", "b"), accepted=("a",), aborted=True),
    ]
    assert sample_passes(rounds, samples, dataclasses.replace(DIGITS.plan, epochs=4, steps=0)) == 7
    assert (
        sample_passes(rounds, samples, dataclasses.replace(DIGITS.plan, epochs=0, steps=25, batch_size=8))
        == 2
    )


def test_events_become_rounds_with_their_accepted_sets() -> None:
    run = Run()
    record(run, event("aggregator", "round_opened", 1, cohort=["a", "b"]))
    record(run, event("aggregator", "round_frozen", 1, accepted=["b"]))
    record(run, event("aggregator", "update_late", 1, device="a"))
    record(run, event("aggregator", "update_late", 1, device="a"))
    ended = record(run, event("aggregator", "round_published", 1, version=1))
    assert ended is run.rounds[0]
    assert (ended.accepted, ended.version, len(run.late)) == (("b",), 1, 1)


# ---- processes --------------------------------------------------------------------------------------


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # one that nobody has waited for yet counts as gone
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True


def test_json_lines_become_events_and_everything_is_logged(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        code = """print('{"event": "round_opened", "round": 7}'); print('plain'); print('[1]')"""
        child = supervisor.start("a", python(code), read_events=True)
        assert supervisor.wait(child, 20) == 0
        got = supervisor.events.get(timeout=5)
    assert (got.source, got.kind, got.round) == ("a", "round_opened", 7)
    assert supervisor.events.empty()
    assert child.log_file.read_text().splitlines()[1:] == ["plain", "[1]"]


def test_a_failing_program_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor, pytest.raises(ProcessError) as caught:
        supervisor.run_all({"bad": python("raise SystemExit('no such broker')")}, at_once=1)
    assert "no such broker" in str(caught.value)
    assert str(tmp_path / "bad.log") in str(caught.value)


def test_a_background_program_that_dies_stops_the_wait_for_the_others(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        supervisor.start("registrar", python("raise SystemExit(3)"))
        with pytest.raises(ProcessError, match="registrar ended with code 3"):
            supervisor.run_all({"waits": python("import time; time.sleep(60)")}, at_once=1)


def test_a_killed_device_is_no_failure_and_its_death_is_seen(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        child = supervisor.start("device", python("import time; time.sleep(60)"))
        supervisor.kill(child)
        supervisor.check()
    assert child.exit_code() == -signal.SIGKILL


def test_whatever_happens_no_process_is_left(tmp_path: Path) -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1); time.sleep(60)"
    pids = []

    def interrupted() -> None:
        with Supervisor(tmp_path, grace_s=0.2) as supervisor:
            child = supervisor.start("stubborn", python(stubborn))
            pids.append(child.pid)
            while not child.log_file.read_text():
                time.sleep(0.02)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert gone(pids[0])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG")
def test_children_die_with_a_demo_that_is_killed(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from fldemo.processes import Supervisor; import sys, time\n"
        f"s = Supervisor(Path({str(tmp_path)!r}))\n"
        "c = s.start('child', [sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        'print(\'{"event": "up", "pid": %d}\' % c.pid, flush=True); time.sleep(60)'
    )
    with Supervisor(tmp_path / "outer") as supervisor:
        demo = supervisor.start("demo", python(code), read_events=True)
        child_pid = int(supervisor.events.get(timeout=30).fields["pid"])
        supervisor.kill(demo)
        deadline = time.monotonic() + 20
        while not gone(child_pid) and time.monotonic() < deadline:
            time.sleep(0.02)
    assert gone(child_pid)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc")
def test_memory_is_sampled_and_processes_that_ended_are_kept() -> None:
    sampler = MemorySampler()
    sampler.watch("self", os.getpid())
    sampler.sample()
    sampler.forget("self")
    sampler.sample()
    usage = sampler.usage()["self"]
    assert 0 < usage.pss_mean <= usage.pss_peak == sampler.total_peak()
    assert usage.rss_peak >= usage.pss_peak


# ---- the folder -------------------------------------------------------------------------------------


def test_a_folder_of_somebody_else_is_never_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(WorkFolderError, match="no demo made it"), fresh_folder(tmp_path):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_what_an_earlier_demo_left_is_removed_but_not_what_its_links_point_to(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("x")
    with fresh_folder(tmp_path / "demo") as folder:
        (folder / "old").mkdir()
        (folder / "link").symlink_to(kept)
    with fresh_folder(tmp_path / "demo") as folder:
        assert [path.name for path in folder.iterdir()] == [MARKER]
    assert (kept / "file").exists()


def test_two_demos_cannot_share_a_folder(tmp_path: Path) -> None:
    with (
        fresh_folder(tmp_path / "demo"),
        pytest.raises(WorkFolderError, match="another demo"),
        fresh_folder(tmp_path / "demo"),
    ):
        pass


# ---- the verdict ------------------------------------------------------------------------------------


MEMORY = Memory(
    device_pss_mean=52_000_000,
    device_rss_peak=104_000_000,
    aggregator_pss=68_000_000,
    broker_pss=4_000_000,
    total_peak=615_000_000,
    processes=12,
)
BAD_FIGURES: list[tuple[dict[str, object], str]] = [
    ({"score": 0.98 - DIGITS.limit_points / 100 - 0.012}, "below central"),
    ({"update_bytes_per_parameter": 1.11}, "bytes per parameter"),
    ({"update_bytes_per_parameter": None}, "none was sent"),
    ({"memory": dataclasses.replace(MEMORY, total_peak=1_301_000_000)}, "all processes"),
    ({"memory": dataclasses.replace(MEMORY, device_pss_mean=101_000_000)}, "on average"),
    ({"memory": dataclasses.replace(MEMORY, device_rss_peak=151_000_000)}, "of RSS"),
]


def good_run() -> tuple[Figures, Run]:
    kills, back = [Kill("device-01", 4), Kill("device-02", 6)], [Restart("device-01", 8)]
    rounds = [
        Round(
            n, ("device-01", "device-03"), ("device-01" if n > 8 else "device-03",), published=True, version=n
        )
        for n in range(1, 21)
    ]
    run = Run(rounds=rounds, faults=Faults(kills, back), killed_codes={"device-01": -9, "device-02": -9})
    run.exit_codes = {"aggregator": 0, "device-03": 0}
    figures = Figures(
        example="digits",
        metric="accuracy",
        seed=0,
        broker="mosquitto",
        samples={"device-01": 10},
        held_out=360,
        parameters=1_000_000,
        score=0.97,
        score_npz=0.97,
        error=0.009,
        recall={"0": 0.97},
        baselines=Baselines(central=0.98, local=(0.5, 0.6), passes=3),
        rounds=20,
        aborted=0,
        version=20,
        late=0,
        refused={},
        killed={},
        returned={},
        updates=20,
        round_median_s=0.5,
        round_mean_s=0.5,
        bytes_up=None,
        bytes_down=None,
        update_bytes_per_parameter=0.5,
        memory=MEMORY,
        start_up_s=1.0,
        total_s=2.0,
        files=(),
        violations=(),
    )
    return figures, run


def failures(figures: Figures, run: Run) -> list[str]:
    return [check.text for check in verify(figures, run, 20, DIGITS.limit_points) if not check.holds]


def test_a_good_run_passes() -> None:
    figures, run = good_run()
    assert failures(figures, run) == []
    at_the_limit = dataclasses.replace(figures, score=0.96, score_npz=0.96)
    assert failures(at_the_limit, run) == []
    elsewhere = dataclasses.replace(figures, memory=None, round_median_s=99.0)  # no /proc; no time is checked
    assert failures(elsewhere, run) == []


@pytest.mark.parametrize(("change", "complaint"), BAD_FIGURES)
def test_the_stand_in_broker_is_held_to_no_figure(change: dict[str, object], complaint: str) -> None:
    figures, run = good_run()
    stand_in = dataclasses.replace(figures, broker="amqtt", **change, score_npz=change.get("score", 0.97))
    assert failures(stand_in, run) == []


def test_a_line_for_each_seed_shows_its_gap_and_what_failed() -> None:
    figures, run = good_run()
    line, holds = seed_line(figures, verify(figures, run, 20, DIGITS.limit_points))
    assert holds
    assert "passed" in line
    assert "gap +1.00 points" in line
    line, holds = seed_line(figures, verify(figures, run, 21, DIGITS.limit_points))
    assert not holds
    assert "FAILED" in line
    assert "21 versions published: 20" in line


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"score_npz": 0.96}, "agree"),
        ({"score": 0.5, "score_npz": 0.5}, "local-only"),
        *BAD_FIGURES,
        ({"rounds": 19}, "versions published"),
        ({"violations": ("round 3: an update was counted twice",)}, "counted twice"),
    ],
)
def test_a_figure_that_is_off_fails_the_demo(change: dict[str, object], complaint: str) -> None:
    figures, run = good_run()
    assert any(complaint in text for text in failures(dataclasses.replace(figures, **change), run))


def test_faults_that_did_not_happen_fail_the_demo() -> None:
    figures, run = good_run()
    run.killed_codes["device-02"] = 0
    assert any("SIGKILL" in text for text in failures(figures, run))
    figures, run = good_run()
    run.rounds[3].accepted = ("device-01",)
    assert any("round it died in" in text for text in failures(figures, run))
    figures, run = good_run()
    for round_ in run.rounds:
        round_.accepted = ("device-03",)
    assert any("took part again" in text for text in failures(figures, run))
    figures, run = good_run()
    run.exit_codes["aggregator"] = 1
    assert any("ended well" in text for text in failures(figures, run))
