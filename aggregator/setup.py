"""``aggregator init``: a folder with settings, keys, registrar and certificate.

An error leaves nothing behind. A kill leaves a folder without ``aggregator.toml``, which is written last: remove
the folder and begin again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aggregator import registrar
from aggregator.config import (
    DeliveryConfig,
    EvaluationConfig,
    MonitoringConfig,
    VersionsConfig,
    aggregator_config,
)
from aggregator.core.round_rules import RoundRules
from aggregator.files import make_private_folder, write_atomic
from aggregator.plan_presets import DEFAULT, PRESETS, with_preset
from aggregator.registrar.folder import REVOCATIONS
from edge_runtime.backends.artifact_folder import read_artifact_folder
from edge_runtime.command_line import OptionError
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.plan import OPTIMIZERS
from edge_runtime.protocol.schedules import SHAPES, Schedule
from edge_runtime.settings import BadSetting

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG_FILE = "aggregator.toml"
LAST_ROUND = 1_000_000

# The comments of the file, by section and key; every key of the settings has one (a test checks it).
COMMENTS: dict[str, dict[str, str]] = {
    "": {
        "federation": "The federation's name, part of every topic and signature.",
        "folder": "All state: ledger, inbox, versions. Relative paths are relative to this file.",
        "artifact": "What `model-export build` wrote.",
        "root_key": "The registrar's public key: certificates must be signed by it.",
        "certificate_file": "The root's word that these keys are ours; `aggregator registrar certify` renews it.",
        "signing_key_file": "Signs manifests and receipts. Secret.",
        "sealing_key_file": "Opens check-ins and telemetry. Secret.",
        "generation": "Raise by one, with a new certificate, after restoring the ledger from a backup.",
        "run_seed_file": "64 hex digits that fix the selection (default: made once, kept secret in the folder).",
        "revocations_file": "The root's list of revoked devices, by `aggregator registrar revoke`; read for each "
        "manifest. No file: nobody is revoked yet.",
        "keep_updates": "Keep the sealed updates of closed rounds. Nobody can open them: the round's key is gone.",
    },
    "broker": {
        "url": "mqtt://host:port, or mqtts:// for TLS.",
        "ca_file": "Whom to trust (PEM); the system's authorities by default.",
        "cert_file": "Who we are, if the broker asks (PEM).",
        "key_file": "The key of cert_file (PEM).",
        "username": "If the broker wants a name and a password.",
        "password_file": "The password, alone in a file.",
    },
    "round": {
        "rounds": "Versions to make in all.",
        "cohort": "Devices selected for a round; more than goal is over-selection against dropout.",
        "share": "Select at least this share of the free devices, 0.3 for 30 %; goal and minimum grow with it. "
        "0: always `cohort`.",
        "goal": "Close the round as soon as so many updates are stored.",
        "minimum": "Close it at the deadline with at least so many; with fewer it is aborted.",
        "deadline_s": "Seconds from the manifest to the cut-off.",
        "fleet": "Wait for so many check-ins before the first round; 0: as many as the cohort.",
        "patience_s": "After so long without a full cohort, open a round with at least `minimum` devices.",
        "retry_s": "Seconds between two looks while waiting.",
    },
    "plan": {
        "preset": f"One of {', '.join(PRESETS)}. Lines commented out show what follows from it; set any to differ.",
        "epochs": "Passes of a device over its data in a round; or set steps and epochs = 0.",
        "steps": "Optimiser steps of a device in a round; 0: use epochs.",
        "batch_size": "Samples in an optimiser step.",
        "optimizer": f"One of {', '.join(OPTIMIZERS)}; its state is zero when a round begins.",
        "learning_rate": "Of the optimizer on the device, before [plan.schedule].",
        "momentum": "Of sgd.",
        "nesterov": "Nesterov's momentum, of sgd.",
        "weight_decay": "sgd, adam: added to the gradient (L2); adamw: decoupled.",
        "adam_beta1": "Of adam and adamw: decay of the mean of gradients.",
        "adam_beta2": "Of adam and adamw: decay of the mean of their squares.",
        "adam_epsilon": "Of adam and adamw: added to the denominator.",
        "max_grad_norm": "Clip each gradient to this L2 norm; 0: never.",
        "beta": "An update weighs (samples / sample_cap)^(1 + beta); 0 is FedAvg, -1 counts devices alike.",
        "sample_cap": "More samples than this count as this many.",
        "max_abs_delta": "An update with a larger coordinate is refused.",
        "codecs": "How updates may travel, best first.",
    },
    "plan.schedule": {
        "shape": f"What the learning rate is multiplied by, by the versions made so far: {', '.join(SHAPES)}.",
        "factor": "step: factor^(version // every); cosine: the share that is left at the end.",
        "every": "step: versions between two reductions.",
        "after": "step: none up to this version.",
        "rounds": "cosine: the version where it ends.",
        "warmup_rounds": "Versions over which the rate rises to full in equal steps, with any shape; 0: none.",
    },
    "delivery": {
        "chunk_bytes": "Packet size of models and updates; the broker must allow 512 bytes more.",
        "gather_s": "A model is sent to all who asked once nobody else has asked for so many seconds.",
        "bytes_per_s": "Pace of what the broker sends on to devices, all together: what its network carries "
        "and its devices read; above that the broker fills its memory. The default suits a gigabit link.",
    },
    "versions": {
        "keep": "How many of the newest versions stay on disk, to export or roll back to; 0: all.",
    },
    "evaluation": {
        "data": "Held-out samples (.npz): each version is evaluated on them, beside the rounds.",
        "inputs": "The arrays that are the model's inputs, in its order.",
        "target": "The array that the loss compares with.",
        "every": "Evaluate every so many versions.",
        "threads": "CPU threads of an evaluation.",
    },
    "monitoring": {
        "listen": "host:port of /metrics, /healthz and /readyz; empty: off. Plain HTTP without login: "
        "127.0.0.1:9464, or behind a proxy.",
        "stalled_s": "/healthz fails when the loop has not turned for so many seconds; a round's sum is one turn.",
    },
}


def initialise(
    folder: Path, federation: str, artifact: Path, broker_url: str, settings: Sequence[str]
) -> Path:
    """Everything ``serve`` needs, in a new folder; returns the settings file.

    ``settings``: ``section.key=value`` in TOML spelling. Raises ConfigError, RegistrarError, ArtifactFolderError,
    FleetgradError for a folder that is in use; nothing is left behind then.
    """
    if folder.exists() and any(folder.iterdir()):
        raise OptionError(
            f"{folder} is not empty: choose a new folder, or remove it if nothing in it is needed"
        )
    read_artifact_folder(artifact)  # a bad artifact is told before any key is made
    chosen = [_setting(text) for text in settings]
    existed = folder.exists()
    make_private_folder(folder)
    try:
        return _fill(folder, federation, artifact, broker_url, chosen)
    except BaseException:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not existed:
            folder.rmdir()
        raise


def write_certificate(path: Path, certificate: bytes) -> None:
    """A certificate file: hex, so that it survives mail and terminals."""
    write_atomic(path, certificate.hex().encode() + b"\n", mode=0o644)


def _fill(
    folder: Path, federation: str, artifact: Path, broker_url: str, chosen: list[tuple[str, str, str]]
) -> Path:
    authority = registrar.create(folder / "registrar", federation)
    keys = folder / "keys"
    make_private_folder(keys)
    signing = CRYPTO.generate_signing_key(os.urandom(32))
    sealing = CRYPTO.generate_sealing_key(os.urandom(32))
    write_atomic(keys / "signing.key", signing.to_bytes().hex().encode() + b"\n")
    write_atomic(keys / "sealing.key", sealing.to_bytes().hex().encode() + b"\n")
    public = (CRYPTO.verify_key(signing).raw, CRYPTO.sealing_public_key(sealing).raw)
    write_certificate(keys / "certificate", authority.certify_aggregator(*public, 1, 0, LAST_ROUND))
    authority.close()
    required = {
        "federation": _toml(federation),
        "folder": _toml("state"),
        "artifact": _toml(str(artifact.resolve())),
        "root_key": _toml(authority.root.raw.hex()),
        "certificate_file": _toml("keys/certificate"),
        "signing_key_file": _toml("keys/signing.key"),
        "sealing_key_file": _toml("keys/sealing.key"),
        "revocations_file": _toml(f"registrar/{REVOCATIONS}"),
        "broker.url": _toml(broker_url),
    }
    path = folder / CONFIG_FILE
    text = settings_text(required, chosen)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"the settings of --set make no TOML file together: {error}") from error
    aggregator_config(document, path)
    write_atomic(path, text.encode())
    return path


def settings_text(required: dict[str, str], chosen: Sequence[tuple[str, str, str]]) -> str:
    """The commented settings file. ``required``, ``chosen``: values in TOML spelling, by dotted key."""
    values = {
        "generation": "1",
        "keep_updates": "false",
        **_defaults("round", RoundRules()),
        "plan.preset": _toml(DEFAULT),
        **_defaults("delivery", DeliveryConfig()),
        **_defaults("versions", VersionsConfig()),
        **_defaults("evaluation", EvaluationConfig()),
        **_defaults("monitoring", MonitoringConfig()),
        **required,
        **{f"{section}.{key}" if section else key: value for section, key, value in chosen},
    }
    implied = _implied_by_preset(chosen)
    lines = ["# Settings of one aggregator. Unknown keys are refused, so a typo is never silent."]
    for section, comments in COMMENTS.items():
        if section:
            lines += ["", f"[{section}]"]
        for key, comment in comments.items():
            name = f"{section}.{key}" if section else key
            value = values.pop(name, None)
            unset = f"# {key} = {implied.get(name, _toml('...'))}"
            lines += [f"# {comment}", unset if value is None else f"{key} = {value}"]
        for name in [name for name in values if name.rpartition(".")[0] == section]:
            lines.append(f"{name.rpartition('.')[2]} = {values.pop(name)}")
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        lines += ["", f"[{section}]", f"{key} = {value}"]
    return "\n".join(lines) + "\n"


Section = RoundRules | DeliveryConfig | VersionsConfig | EvaluationConfig | MonitoringConfig


def _defaults(section: str, config: Section) -> dict[str, str]:
    return {
        f"{section}.{f.name}": _toml(value)
        for f in dataclasses.fields(config)
        if f.name in COMMENTS[section] and (value := getattr(config, f.name)) is not None
    }


def _implied_by_preset(chosen: Sequence[tuple[str, str, str]]) -> dict[str, str]:
    """What [plan] and [plan.schedule] hold without being set, in TOML spelling; nothing for an unknown preset."""
    plan: dict[str, Any] = {}
    for section, key, value in chosen:
        if section == "plan":
            plan[key] = tomllib.loads(f"x = {value}")["x"]
        elif section == "plan.schedule":
            plan.setdefault("schedule", {})[key] = tomllib.loads(f"x = {value}")["x"]
    with contextlib.suppress(BadSetting):
        plan = with_preset(plan)
        schedule = {**dataclasses.asdict(Schedule()), **plan.pop("schedule")}
        return {f"plan.{key}": _toml(value) for key, value in plan.items()} | {
            f"plan.schedule.{key}": _toml(value) for key, value in schedule.items()
        }
    return {}


def _setting(text: str) -> tuple[str, str, str]:
    name, equals, value = text.partition("=")
    section, _, key = name.strip().rpartition(".")
    if not equals or not all(word.isidentifier() for word in name.strip().split(".")):
        raise OptionError(f"--set takes section.key=value, not {text[:80]!r}")
    value = value.strip()
    try:
        is_toml = tomllib.loads(f"x = {value}").keys() == {"x"}  # one value, and no line of its own after it
    except tomllib.TOMLDecodeError:
        is_toml = False
    return section, key, value if is_toml else _toml(value)  # a bare word is text


def _toml(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():  # a JSON string is a TOML string, but for DEL
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case tuple() | list():
            return "[" + ", ".join(_toml(item) for item in value) + "]"
        case _:
            return str(value)
