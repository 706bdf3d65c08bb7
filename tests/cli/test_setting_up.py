"""``aggregator init`` and the file it writes: complete, commented, or not there at all."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from dataclasses import replace
from pathlib import Path

import pytest

from aggregator import cli
from aggregator.config import AggregatorConfig, load_aggregator_config
from aggregator.core.round_rules import RoundRules
from aggregator.plan_presets import PRESETS
from aggregator.setup import COMMENTS
from edge_runtime.protocol.codecs import entropy
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.schedules import Schedule
from tests.support.brokers import ROOT
from tests.support.command_line import Done, refusal, run

ARTIFACT = ROOT / "examples" / "digits" / "artifact"
NOT_TO_BE_SET = {"plan.scale_bits"}


def words(folder: Path, *settings: str, federation: str = "digits", artifact: Path = ARTIFACT) -> list[str]:
    sets = [word for setting in settings for word in ("--set", setting)]
    return ["init", "--folder", str(folder), "--federation", federation, "--artifact", str(artifact), *sets]


def init(folder: Path, *settings: str) -> Done:
    return run(cli.main, *words(folder, *settings))


def keys(settings: typing.Any, prefix: str = "") -> set[str]:
    """Dotted names of all keys of a settings class."""
    hints = typing.get_type_hints(settings)
    found = set()
    for f in dataclasses.fields(settings):
        kind = hints[f.name]
        found |= keys(kind, f"{prefix}{f.name}.") if dataclasses.is_dataclass(kind) else {prefix + f.name}
    return found


def test_the_written_file_is_valid_holds_the_defaults_and_says_what_comes_next(tmp_path):
    done = init(tmp_path / "agg")
    assert (done.code, done.err) == (0, "")
    for step in ("aggregator registrar serve", "aggregator enroll-token", "aggregator serve --config"):
        assert step in done.out
    config = load_aggregator_config(tmp_path / "agg" / "aggregator.toml")
    assert (config.federation, config.folder, config.artifact) == (
        "digits",
        tmp_path / "agg" / "state",
        ARTIFACT,
    )
    assert (config.round, config.plan) == (RoundRules(), Plan())


def test_every_setting_has_its_comment_in_the_written_file(tmp_path):
    commented = {f"{section}.{key}" if section else key for section, keys in COMMENTS.items() for key in keys}
    assert commented == keys(AggregatorConfig) - NOT_TO_BE_SET | {"plan.preset"}
    init(tmp_path / "agg")
    text = (tmp_path / "agg" / "aggregator.toml").read_text()
    for section, comments in COMMENTS.items():
        part = text.partition(f"[{section}]\n")[2] if section else text
        for key, comment in comments.items():
            assert re.search(rf"^# {re.escape(comment)}\n(# )?{key} = ", part, flags=re.M), f"{section}.{key}"


def test_the_lines_of_the_written_file_that_are_commented_out_are_settings_too(tmp_path):
    init(tmp_path / "agg", "broker.url=mqtts://broker.example")
    path = tmp_path / "agg" / "aggregator.toml"
    path.write_text(re.sub(r'^# ([a-z_]+ = "\.\.\.")$', r"\1", path.read_text(), flags=re.M))
    config = load_aggregator_config(path)
    assert config.run_seed_file is not None
    assert None not in dataclasses.astuple(config.broker)


def test_settings_override_the_defaults_and_a_bare_word_is_text(tmp_path):
    settings = (
        "round.rounds=7",
        "round.deadline_s = 2.5",
        "broker.url=mqtt://broker.example:1884",
        'plan.codecs=["float32"]',
        "keep_updates=true",
        "run_seed_file=seed.hex",
        'broker.username=o\'brien "the\\ 1st"',
    )
    assert init(tmp_path / "agg", *settings).code == 0
    config = load_aggregator_config(tmp_path / "agg" / "aggregator.toml")
    assert (config.round.rounds, config.round.deadline_s, config.plan.codecs) == (7, 2.5, ("float32",))
    assert (config.broker.url, config.keep_updates) == ("mqtt://broker.example:1884", True)
    assert config.run_seed_file == tmp_path / "agg" / "seed.hex"
    assert config.broker.username == 'o\'brien "the\\ 1st"'


# ---- presets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_plan_and_the_commented_lines_of_the_file_say_the_same(tmp_path, name):
    assert init(tmp_path / "agg", f"plan.preset={name}").code == 0
    path = tmp_path / "agg" / "aggregator.toml"
    assert load_aggregator_config(path).plan == PRESETS[name].plan
    before, plan, after = re.split(r"(^\[plan\]\n.*?(?=^\[delivery))", path.read_text(), flags=re.M | re.S)
    plan = re.sub(r"^# ([a-z_0-9]+ = )", r"\1", plan, flags=re.M)
    path.write_text(before + plan.replace(f'preset = "{name}"\n', "") + after)
    assert load_aggregator_config(path).plan == PRESETS[name].plan


def test_single_keys_override_a_preset_and_a_shape_begins_a_schedule_anew(tmp_path):
    iot = PRESETS["iot"].plan
    for number, (settings, expected) in enumerate(
        (
            (["plan.batch_size=8"], replace(iot, batch_size=8)),
            (["plan.schedule.every=7"], replace(iot, schedule=replace(iot.schedule, every=7))),
            (["plan.schedule.shape=constant"], replace(iot, schedule=Schedule())),
            (
                ["plan.schedule.shape=cosine", "plan.schedule.rounds=100"],
                replace(iot, schedule=Schedule(shape="cosine", rounds=100)),
            ),
        )
    ):
        folder = tmp_path / str(number)
        assert init(folder, "plan.preset=iot", *settings).code == 0
        assert load_aggregator_config(folder / "aggregator.toml").plan == expected


def test_the_presets_keep_what_their_names_promise_and_are_named_where_people_look():
    epochs = {name: preset.plan.epochs for name, preset in PRESETS.items()}
    assert 3 <= epochs["medical"] <= 5
    assert 5 <= epochs["finance"] <= 10
    assert all(preset.plan.problem() is None for preset in PRESETS.values())
    assert PRESETS["default"].plan == Plan()
    assert all(preset.plan.max_grad_norm == 5 for preset in PRESETS.values())
    help_text = re.sub(r"[^a-z]+", " ", run(cli.main, "init", "--help").out)
    operator = (ROOT / "docs" / "operator.md").read_text()
    for name, preset in PRESETS.items():
        assert re.search(rf"\b{name}\b", help_text.partition("plan preset")[2])
        assert f"| `{name}` | {preset.reason} |" in operator


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("round.cohrt=3", "round.cohrt: unknown key; did you mean cohort?"),
        ("rounds=3", "rounds: unknown key"),
        ("somewhere.else=3", "somewhere: unknown key"),
        ("round.rounds=many", 'round.rounds: "many"; expected a whole number'),
        ("round.rounds=2.0", "round.rounds: 2.0; expected a whole number"),
        ("round.deadline_s=nan", "round.deadline_s: nan; expected a finite number"),
        ("round.cohort=1", "minimum <= goal <= cohort"),
        ("plan.codecs=[\"zip\"]", "plan.codecs: an array of 1; choose from"),
        (f"plan.codecs={json.dumps(['float32'] * 17)}", "plan.codecs: an array of 17; at most 16 names"),
        ("plan.learning_rate=-1", "learning_rate"),
        ("round.deadline_s=2592001", "round.deadline_s: 2592001.0; at most 2592000 seconds (30 days)"),
        ("round.cohort=100001", "round.cohort: 100001; at most 100000 devices"),
        ("plan.scale_bits=9", "plan.scale_bits: 9; it follows from the cohort"),
        ("delivery.chunk_bytes=100", "delivery.chunk_bytes: 100; 8192 to"),
        ("broker.url=http://x", "mqtt:// or mqtts://"),
        ("broker.url=mqtt://me:hunter2@x", "use username and password_file"),
        ("broker.password=hunter2", "broker.password: a secret in a settings file"),
        ("round.rounds", "--set takes section.key=value"),
        ("a.b.c=1", "a: unknown key"),
        ("a..c=1", "--set takes section.key=value"),
        ("plan={}", "the settings of --set make no TOML file together"),
        ("plan.preset=hospital", 'plan.preset: "hospital"; choose from default, medical, finance, iot'),
        ("plan.preset=3", "plan.preset: 3; choose from"),
        ("plan.optimizer=lamb", 'plan.optimizer: "lamb"; choose from sgd, adam, adamw'),
        ("plan.schedule.shape=linear", 'plan.schedule.shape: "linear"; choose from constant, step, cosine'),
        ("plan.schedule.factor=0.5", "schedule.factor means nothing to the shape constant: choose another"),
        ("plan.schedule.shap=step", "plan.schedule.shap: unknown key; did you mean shape?"),
        ("plan.schedule.every=1.5", "plan.schedule.every: 1.5; expected a whole number"),
        ("round.rounds=3\nkeep_updates=true", "round.rounds"),
        ("round.rounds=3\nrounds=4", "round.rounds"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_refused_and_nothing_is_left_behind(tmp_path, setting, complaint):
    text = refusal(cli.main, *words(tmp_path / "agg", setting))
    assert complaint in text
    assert "hunter2" not in text
    assert list(tmp_path.iterdir()) == []


def test_without_zstandard_the_plan_offers_what_is_left_and_refuses_to_offer_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(entropy, "HAS_ZSTD", False)
    assert init(tmp_path / "agg").code == 0
    config = load_aggregator_config(tmp_path / "agg" / "aggregator.toml")
    assert config.plan == Plan()
    assert config.round_plan().codecs == ("int8-block+zlib",)
    text = refusal(cli.main, *words(tmp_path / "none", 'plan.codecs=["int8-block+zstd", "float32+zstd"]'))
    assert "plan.codecs: an array of 2; none of them can be used here: install zstandard, or choose" in text


def test_a_folder_that_was_there_empty_stays_and_one_in_use_is_left_alone(tmp_path):
    empty = tmp_path / "agg"
    empty.mkdir()
    refusal(cli.main, *words(empty, "round.rounds=x"))
    assert list(empty.iterdir()) == []
    assert init(empty).code == 0
    before = {path: path.read_bytes() for path in empty.rglob("*") if path.is_file()}
    assert "is not empty: choose a new folder" in refusal(cli.main, *words(empty))
    assert {path: path.read_bytes() for path in empty.rglob("*") if path.is_file()} == before


def test_a_bad_name_and_a_missing_or_tampered_artifact_are_refused_before_any_key_is_made(tmp_path):
    folder, changed = tmp_path / "agg", tmp_path / "artifact"
    assert "'Digits!' is no federation name" in refusal(cli.main, *words(folder, federation="Digits!"))
    assert "model-export build" in refusal(cli.main, *words(folder, artifact=tmp_path / "none"))
    changed.mkdir()
    for file in ARTIFACT.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    (changed / "grad.onnx").write_bytes((ARTIFACT / "grad.onnx").read_bytes()[:-1] + b"\0")
    text = refusal(cli.main, *words(folder, artifact=changed))
    assert "grad.onnx" in text
    assert "Build the artifact again" in text
    assert not folder.exists()


def test_keys_and_state_are_for_their_owner_only(tmp_path):
    init(tmp_path / "agg")
    secret = [p for p in (tmp_path / "agg").rglob("*") if p.suffix == ".key"]
    assert len(secret) == 4
    assert {p.stat().st_mode & 0o777 for p in secret} == {0o600}
