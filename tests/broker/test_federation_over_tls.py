"""A federation of real processes over mutual TLS, with nothing but what the commands wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from aggregator import cli, registrar
from edge_runtime import cli as device_cli
from tests.support.brokers import mosquitto_installed
from tests.support.command_line import Done, run
from tests.support.federation import ARTIFACT, device_data
from tests.support.programs import Program
from tests.support.secured_broker import SecuredBroker

pytestmark = pytest.mark.skipif(not mosquitto_installed(), reason="needs mosquitto")

DEVICES = ("pi-1", "pi-2")
ROUND = {"rounds": 1, "cohort": 2, "goal": 2, "minimum": 2, "retry_s": 0.2, "patience_s": 600.0}


def did(main: object, *words: str) -> Done:
    done = run(main, *words)  # type: ignore[arg-type]
    assert done.code == 0, done
    return done


def test_devices_with_kits_train_one_round_over_mutual_tls(tmp_path: Path) -> None:
    site, office_folder = tmp_path / "site", str(tmp_path / "site" / "registrar")
    broker_url = "mqtts://127.0.0.1"  # the port is known once the broker runs
    sets = [word for key, value in ROUND.items() for word in ("--set", f"round.{key}={json.dumps(value)}")]
    init = ["init", "--folder", str(site), "--federation", "plant-7", "--artifact", str(ARTIFACT)]
    did(cli.main, *init, "--broker", broker_url, *sets)
    did(
        cli.main,
        "registrar",
        "tls",
        "--folder",
        office_folder,
        "--host",
        "127.0.0.1",
        "--out",
        str(site / "tls"),
    )
    office = registrar.open(Path(office_folder))
    broker = SecuredBroker(site / "tls", office, existing=True)
    office.close()
    settings = site / "aggregator.toml"
    text = settings.read_text().replace(f'url = "{broker_url}"', f'url = "{broker.url}"')
    for key, name in (("ca_file", "ca.crt"), ("cert_file", "client.crt"), ("key_file", "client.key")):
        assert f'# {key} = "..."' in text
        text = text.replace(f'# {key} = "..."', f'{key} = "tls/aggregator/{name}"')
    settings.write_text(text)
    module = [sys.executable, "-m"]
    serve_registrar = [
        "aggregator.cli",
        "registrar",
        "serve",
        "--folder",
        office_folder,
        "--broker",
        broker.url,
    ]
    programs = [
        Program("registrar", [*module, *serve_registrar], tmp_path),
        Program(
            "aggregator",
            [*module, "aggregator.cli", "serve", "--config", str(settings), "--log-json"],
            tmp_path,
        ),
    ]
    try:
        for program in programs:
            program.start()
        for index, name in enumerate(DEVICES):
            made = tmp_path / name
            kit = ["--device", name, "--broker", broker.url, "--out", str(made)]
            did(cli.main, "registrar", "kit", "--folder", office_folder, *kit)
            np.savez(made / "train.npz", **device_data(index, 40))
            config = str(made / "device.toml")
            with (made / "device.toml").open("a") as file:
                file.write("[policy]\nenabled = false\n")  # a busy test machine would not train
            enroll = ["enroll", "--config", config, "--device", name, "--token-file", str(made / "token.txt")]
            did(device_cli.main, *enroll)
            run_device = [*module, "edge_runtime.cli", "run", "--log-json", "--config", config]
            programs.append(Program(name, run_device, tmp_path))
            programs[-1].start()
        aggregator = programs[1]
        aggregator.fellows = [program for program in programs if program is not aggregator]
        aggregator.wait_for("finished")
        status = json.loads(did(cli.main, "status", "--config", str(settings), "--json", "--verify").out)
        assert (status["version"], status["outcomes"]) == (1, {"aggregated": 2})
        assert status["invariant_violations"] == []
        for program in programs:  # the ACL let everything pass that was said or asked for
            assert "check its ACLs" not in program.output()
    finally:
        for program in reversed(programs):
            program.close()
        broker.stop()
