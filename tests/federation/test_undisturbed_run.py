"""What an undisturbed run leaves behind: models, an exact ledger, no keys, and nothing private on the broker."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import onnxruntime
import pytest
import torch

from aggregator.rules.mean import aggregate
from edge_runtime.backends.artifact_folder import initial_parameters, read_artifact_folder
from edge_runtime.backends.ort import OrtBackend
from edge_runtime.data import NpzFile, load_dataset
from edge_runtime.protocol.codecs import codec_named
from edge_runtime.protocol.codecs.int8_block import INT8_BLOCK
from edge_runtime.protocol.crypto.keys import SealingPrivateKey
from edge_runtime.protocol.crypto.prg import Stream, derive_seed
from edge_runtime.protocol.crypto.provider import CRYPTO
from edge_runtime.protocol.ids import DeviceId, RoundId
from edge_runtime.protocol.messages import Update
from edge_runtime.protocol.tensors import Vector, vector_from_bytes
from edge_runtime.training.trainer import LocalTraining, batch_seed, delta
from tests.federation.conftest import ROUNDS, Undisturbed
from tests.support.federation import ARTIFACT, SAMPLES, Federation, aggregated_once, device_data
from tests.support.traffic import found_bytes, found_numbers, spellings

WINDOW = 16  # bytes: long enough that no chance hit comes in a lifetime of test runs


@pytest.fixture(scope="module")
def retrained(undisturbed: Undisturbed) -> dict[tuple[str, int], tuple[Vector, Update, bytes]]:
    """By (device, round): the device's true delta, its update before sealing, its int8 values before zstd.

    Computed here once more from the same seeds and data.
    """
    fed = undisturbed.federation
    artifact = read_artifact_folder(ARTIFACT)
    plan = fed.config.round_plan()
    session = OrtBackend().load(artifact)
    result = {}
    for name, seed in fed.seeds.items():
        dataset = load_dataset(NpzFile(fed.folder / f"{name}.npz"), artifact.manifest)
        for number in range(1, ROUNDS + 1):
            round_id, device = RoundId(1, number), DeviceId(name)
            theta = parameters(fed, number - 1)
            training = LocalTraining(
                *(session, dataset, plan, theta),
                seed=batch_seed(seed, round_id, device),
                version=number - 1,
            )
            trained = training.run()
            change = delta(trained.theta, theta)
            codec = codec_named(plan.codecs[0])
            stream_seed = derive_seed(seed, "codec", 1, number, device)
            encoded, _ = codec.encode(change, codec.init(change.size), Stream(stream_seed))
            update = Update(
                samples=trained.samples,
                steps=trained.steps,
                loss_first=trained.loss_first,
                loss_last=trained.loss_last,
                codec=codec.name,
                delta=encoded,
                parameter_count=change.size,
            )
            result[name, number] = (change, update, INT8_BLOCK.pack(change, Stream(stream_seed)))
    return result


def parameters(fed: Federation, version: int) -> Vector:
    if version == 0:
        return initial_parameters(read_artifact_folder(ARTIFACT))
    raw = (fed.version(version) / "params.bin").read_bytes()
    return vector_from_bytes(len(raw) // 4, raw)


def windows(content: bytes, *, apart: int = 499, distinct: int = 8) -> Iterator[bytes]:
    """Samples of ``content`` that are not mostly one value."""
    for at in range(0, len(content) - WINDOW + 1, apart * 4):
        if len(set(content[at : at + WINDOW])) >= distinct:
            yield content[at : at + WINDOW]


def moved(change: Vector, values: Vector) -> bytes:
    """``values`` where the device moved its parameters: elsewhere its model is the public one."""
    runs = np.flatnonzero(np.convolve(change != 0, np.ones(4), "valid") == 4)
    return b"".join(values[at : at + 4].astype("<f4").tobytes() for at in runs[::997])


def test_every_update_is_in_its_version_exactly_once(undisturbed: Undisturbed) -> None:
    aggregated_once(undisturbed.status, devices=3, versions=ROUNDS)
    assert undisturbed.status["refused"] == {}
    committed = {row["version"]: row["model_sha256"] for row in undisturbed.status["versions"]}
    assert undisturbed.models == committed
    assert json.loads(undisturbed.printed_status)["versions"] == undisturbed.status["versions"]


def test_each_version_is_the_mean_of_the_updates_that_its_devices_must_have_sent(
    undisturbed: Undisturbed, retrained: dict[tuple[str, int], tuple[Vector, Update, bytes]]
) -> None:
    fed = undisturbed.federation
    plan = fed.config.round_plan()
    for number in range(1, ROUNDS + 1):
        updates = [(DeviceId(name), retrained[name, number][1]) for name in fed.devices]
        theta, excluded = aggregate(parameters(fed, number - 1), updates, plan)
        assert excluded == ()
        assert hashlib.sha256(theta.astype("<f4").tobytes()).hexdigest() == undisturbed.models[number]


def test_no_update_of_a_device_crosses_the_broker_in_clear(
    undisturbed: Undisturbed, retrained: dict[tuple[str, int], tuple[Vector, Update, bytes]]
) -> None:
    """Searched: samples of 16 bytes of each delta and each local model as float32, of the int8 values, of the
    compressed update; the losses as float64. The same search finds the public model."""
    everything = b"\0".join(message.payload for message in undisturbed.traffic)
    needles = []
    for (name, number), (change, update, int8) in retrained.items():
        local = (parameters(undisturbed.federation, number - 1) + change).astype(np.float32)
        spelt = {
            "delta": list(windows(moved(change, change), apart=4)),
            "model": list(windows(moved(change, local), apart=4)),
            "int8": list(windows(int8, apart=97)),
            "compressed": list(windows(update.delta, apart=97)),
            "loss": [struct.pack("<d", update.loss_first), struct.pack("<d", update.loss_last)],
        }
        assert min(len(samples) for samples in spelt.values()) >= 2
        needles += [(f"{how} of {name}, {number}", n) for how, found in spelt.items() for n in found]
    assert len(needles) > 500
    assert found_bytes(everything, needles) == set()

    public = [
        (f"version {number}", sample)
        for number in range(ROUNDS)
        for sample in windows(parameters(undisturbed.federation, number).astype("<f4").tobytes())
    ]
    assert found_bytes(everything, public) == {f"version {number}" for number in range(ROUNDS)}
    # And the ciphertexts are there: each device's update was recorded, whole.
    for name, number in retrained:
        assert len(undisturbed.federation.traffic.sealed(name, number)) > len(
            retrained[name, number][1].delta
        )


def test_no_private_key_and_no_token_crosses_the_broker(undisturbed: Undisturbed) -> None:
    """Searched: device identities, the aggregator's two keys, root and registrar keys, every round's key, seeds of
    devices and of the selection, tokens; raw, in hex, in base64. The same search finds the public halves."""
    fed, watched = undisturbed.federation, undisturbed.watched
    assert sorted(watched.keys) == [1, 2, 3], "the round keys were not seen on disk"
    aggregator, office = fed.folder / "aggregator" / "keys", fed.folder / "aggregator" / "registrar"
    identities = {name: fed.signing_key(name) for name in fed.devices}
    secrets = {f"identity of {name}": key.to_bytes() for name, key in identities.items()}
    secrets |= {f"seed of {name}": seed for name, seed in fed.seeds.items()}
    secrets |= {f"round {number}": key for number, key in watched.keys.items()}
    secrets |= {f"token {i}": token.secret for i, token in enumerate(fed.tokens)}
    secrets |= {f"token text {i}": token.encode().encode() for i, token in enumerate(fed.tokens)}
    for file in [*aggregator.glob("*.key"), *office.glob("*.key"), fed.folder / "run_seed"]:
        secrets[file.name] = bytes.fromhex(file.read_text().strip())
    assert len(secrets) >= 3 * 5 + 4 + 1
    needles = [(name, needle) for name, secret in secrets.items() for needle in spellings(secret)]
    everything = b"\0".join(m.topic.encode() + b"\0" + m.payload for m in undisturbed.traffic)
    assert found_bytes(everything, needles) == set()

    public = [(name, name.encode()) for name in fed.devices]
    public += [
        (f"round {number}", CRYPTO.sealing_public_key(SealingPrivateKey(key)).raw)
        for number, key in watched.keys.items()
    ]
    assert found_bytes(everything, public) == {name for name, _ in public}


def test_no_sample_count_crosses_the_broker(undisturbed: Undisturbed) -> None:
    """Searched: 1237, 1361 and 1489 as protobuf integers at any depth, as 64-bit integers of both byte orders and
    float64, and in payloads below 4 KiB as 32-bit integers, float32 and text. 10007, which is public, is found."""
    payloads = [message.payload for message in undisturbed.traffic]
    assert found_numbers(payloads, SAMPLES) == set()
    assert found_numbers(payloads, [10_007]) == {"10007 as a protobuf integer"}


def test_a_published_round_leaves_neither_its_key_nor_its_updates_on_disk(undisturbed: Undisturbed) -> None:
    fed, watched = undisturbed.federation, undisturbed.watched
    # They were there while the round was open ...
    assert sorted(watched.keys) == sorted(watched.inbox_bytes) == [1, 2, 3]
    assert min(watched.inbox_bytes.values()) > 10_000
    # ... and gone before the next one opened.
    assert watched.left_over == {1: [], 2: [], 3: []}
    needles = [(f"key of round {number}", key) for number, key in watched.keys.items()]
    for name in fed.devices:
        for number in range(1, ROUNDS + 1):
            sealed = fed.traffic.sealed(name, number)
            needles += [(f"update of {name}, {number}", w) for w in windows(sealed)]
    for path in fed.config.folder.rglob("*"):
        if path.is_file():
            assert found_bytes(path.read_bytes(), needles) == set(), path
    published = (fed.version(1) / "params.bin").read_bytes()
    assert found_bytes(published, [("itself", next(windows(published)))]) == {"itself"}


def test_a_second_aggregator_on_the_same_folder_is_refused_naming_the_first(undisturbed: Undisturbed) -> None:
    """Also with --take-over: the folder's lock says that the first one lives, so nothing is taken over."""
    for done in undisturbed.second_serve:
        assert done.returncode == 1
        assert f"in use by process {undisturbed.serving_pid}" in done.stderr
        assert "Traceback" not in done.stderr


def test_the_published_model_loads_into_torch_by_name_and_computes_what_the_onnx_model_does(
    undisturbed: Undisturbed,
) -> None:
    spec = spec_from_file_location("digits_model", ARTIFACT.parent / "model.py")
    assert spec is not None
    assert spec.loader is not None
    source = module_from_spec(spec)
    spec.loader.exec_module(source)
    module, *_ = source.build()
    folder = undisturbed.federation.version(ROUNDS)
    with np.load(folder / "model.npz") as arrays:
        module.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays.files})
    data = device_data(7, 300)
    with torch.no_grad():
        by_torch = module.eval()(torch.from_numpy(data["x"])).numpy()
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (by_onnx,) = session.run(None, {session.get_inputs()[0].name: data["x"]})
    np.testing.assert_allclose(by_onnx, by_torch, rtol=1e-4, atol=1e-5)
    assert (by_onnx.argmax(axis=1) == data["y"]).mean() > 0.8  # and it has learnt something


def test_no_program_wrote_to_stderr(undisturbed: Undisturbed) -> None:
    fed = undisturbed.federation
    assert {p.name: p.errors() for p in (fed.aggregator, *fed.devices.values())} == dict.fromkeys(
        ["aggregator", *fed.devices], ""
    )
