"""Starting from given weights: what fits goes in, everything else is refused with all its names."""

from __future__ import annotations

import contextlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from edge_runtime.protocol.errors import Fault
from model_export.model import Model, check_model
from model_export.weights import WeightsError, load_weights, read_weights

Arrays = dict[str, np.ndarray[Any, Any]]


class Net(nn.Module):
    """A parameter under two names, running statistics, a constant buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.second(self.first(x))) + self.shift


@pytest.fixture
def model() -> Model:
    return check_model(lambda: (Net(), (torch.randn(3, 4),), torch.arange(3), "cross_entropy"), "net", 0)


@pytest.fixture
def arrays() -> Arrays:
    torch.manual_seed(7)
    other = Net()
    other.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    other.shift.fill_(3)  # type: ignore[operator]
    return {name: value.numpy().copy() for name, value in other.state_dict().items()}


def write(path: Path, arrays: Arrays) -> Path:
    save_file(arrays, path) if path.suffix == ".safetensors" else np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_whole_state_dict_goes_in(model: Model, arrays: Arrays, suffix: str, tmp_path: Path) -> None:
    load_weights(model, read_weights(write(tmp_path / f"w.{suffix}", arrays)), "w")
    for name, value in model.module.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), arrays[name])


@pytest.mark.parametrize("left_out", ["second.weight", "first.weight", "shift", "norm.num_batches_tracked"])
def test_an_alias_a_constant_and_a_counter_may_be_left_out(
    model: Model, arrays: Arrays, left_out: str
) -> None:
    del arrays[left_out]
    load_weights(model, arrays, "w")
    np.testing.assert_array_equal(model.module.state_dict()["norm.running_var"], arrays["norm.running_var"])


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"norm.running_mean": None, "first.bias": None}, "missing: first.bias, norm.running_mean"),
    "unknown": ({"head.weight": np.zeros(1, np.float32)}, "unknown: head.weight"),
    "shape": (
        {"first.bias": np.zeros(5, np.float32)},
        r"first.bias is float32 of shape \(5,\), the module has float32 of \(4,\)",
    ),
    "dtype": ({"first.bias": np.zeros(4)}, r"first.bias is float64 .* float32"),
    "not finite": ({"first.bias": np.full(4, np.nan, np.float32)}, "first.bias is not finite"),
    "two values for one": (
        {"second.weight": np.zeros((4, 4), np.float32)},
        "second.weight and first.weight are one tensor",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_weights_of_another_model_are_refused_and_change_nothing(
    model: Model, arrays: Arrays, name: str
) -> None:
    changes, message = CHANGES[name]
    before = model.theta()
    changed = {key: value for key, value in {**arrays, **changes}.items() if value is not None}
    with pytest.raises(WeightsError, match=f"w.npz does not fit the module: .*{message}") as caught:
        load_weights(model, changed, "w.npz")
    assert caught.value.fault is Fault.MODELLER
    np.testing.assert_array_equal(model.theta(), before)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.pt", b"", r"is a pickle, .* numpy.savez\('weights.npz'"),
        ("model.PTH", b"", "is a pickle"),
        ("weights.txt", b"", "must end in .npz or .safetensors"),
        ("weights.npz", b"PK\x03\x04 nonsense", "weights.npz: cannot be read"),
        ("weights.npz", b"", "weights.npz: cannot be read"),
        ("weights.safetensors", b"\x08" * 16, "weights.safetensors: cannot be read"),
        ("none.npz", None, "none.npz: cannot be read: No such file"),
        ("none.safetensors", None, "none.safetensors: cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path / name)


def test_an_npz_with_a_pickle_inside_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", weight=np.array([{}], dtype=object))
    with pytest.raises(WeightsError, match="cannot be read: Object arrays"):
        read_weights(tmp_path / "w.npz")


def test_the_names_of_a_tied_tensor_are_told_also_where_the_alias_sorts_first(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z, self.a = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.a.weight = self.z.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.z(x))

    model = check_model(lambda: (Tied(), (torch.randn(3, 4),), torch.arange(3), "cross_entropy"), "net", 0)
    weights = {"a.weight": np.zeros((4, 4), np.float32), "z.weight": np.ones((4, 4), np.float32)}
    with pytest.raises(WeightsError, match=r"z\.weight and a\.weight are one tensor"):
        load_weights(model, weights, "w")


def test_an_npz_that_is_an_npy_or_holds_other_files_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "one.npz").open("wb") as file:
        np.save(file, np.ones(3))
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("first.bias", "hello")
    with pytest.raises(WeightsError, match="one array without a name"):
        read_weights(tmp_path / "one.npz")
    with pytest.raises(WeightsError, match=r"no arrays: first\.bias"):
        read_weights(tmp_path / "text.npz")


def test_damaged_bytes_are_always_a_refusal(tmp_path: Path) -> None:
    path, random = tmp_path / "w.npz", np.random.default_rng(3)
    np.savez_compressed(path, a=np.ones((3, 4), np.float32), b=np.arange(5))
    whole = path.read_bytes()
    for _ in range(300):
        raw = bytearray(whole)
        raw[random.integers(len(raw))] = random.integers(256)
        path.write_bytes(raw)
        with contextlib.suppress(WeightsError):
            assert all(isinstance(value, np.ndarray) for value in read_weights(path).values())
