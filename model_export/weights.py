"""Weights to start from: arrays by torch name out of an .npz or .safetensors file. Nothing in it can run code."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import torch

from edge_runtime.protocol.errors import Fault
from model_export.errors import ExportError
from model_export.model import Model, aliases

Arrays = Mapping[str, npt.NDArray[Any]]

_CONVERT = (
    "numpy.savez('weights.npz', **{name: value.numpy() for name, value in "
    "torch.load('model.pt', weights_only=True).items()})"
)


class WeightsError(
    ExportError,
    fault=Fault.MODELLER,
    remedy="give a file of the module's state_dict(): its names and shapes, float32",
):
    """A file of weights that cannot be read, or that is of another model."""


def read_weights(path: Path) -> Arrays:
    """The arrays of ``path`` by name. Raises WeightsError; for a pickle it says what to do."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".npz":
            return _read_npz(path)
        if suffix == ".safetensors":
            with safetensors.safe_open(path, framework="numpy") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except WeightsError:
        raise
    except Exception as error:  # zipfile, zlib and numpy's parser of headers share no base class
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise WeightsError(
            f"{path}: cannot be read: {reason}; name an .npz or .safetensors file that exists"
        ) from error
    if suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise WeightsError(
            f"{path} is a pickle, which can run code when it is read. Where you trust it, convert it: "
            f"{_CONVERT}"
        )
    raise WeightsError(f"{path}: must end in .npz or .safetensors")


def _read_npz(path: Path) -> Arrays:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd headers: they say nothing about the weights
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            raise WeightsError(f"{path} is one array without a name, an .npy file: use numpy.savez")
        with found:
            arrays = {name: found[name] for name in found.files}
    if strange := [name for name, value in arrays.items() if not isinstance(value, np.ndarray)]:
        raise WeightsError(f"{path}: no arrays: {_list(strange)}")
    return arrays


def load_weights(model: Model, weights: Arrays, source: str) -> None:
    """Puts ``weights`` into the model: every parameter and running statistic; constant buffers if there are any.

    A tensor that the module has under two names may come under either. Raises WeightsError naming what is missing,
    unknown, of another shape or dtype, or not finite; the model is then as it was.
    """
    state = model.module.state_dict()
    tied = aliases(model.module, [spec.name for spec in model.specs])
    chosen: dict[str, npt.NDArray[Any]] = {}
    faults: list[str] = []
    for name in sorted(weights.keys() & state.keys()):
        array, wanted = weights[name], state[name]
        kind = str(wanted.dtype).removeprefix("torch.")
        if array.shape != tuple(wanted.shape) or str(array.dtype) != kind:
            faults.append(
                f"{name} is {array.dtype} of shape {array.shape}, the module has {kind} of {tuple(wanted.shape)}"
            )
        elif array.dtype.kind == "f" and not np.isfinite(array).all():
            faults.append(f"{name} is not finite")
        elif not np.array_equal(chosen.setdefault(tied.get(name, name), array), array):
            others = [other for other in weights if other != name and tied.get(other) == tied[name]]
            faults.append(f"{name} and {_list(others)} are one tensor of the module, but differ in the file")
    unknown = sorted(weights.keys() - state.keys())
    missing = [spec.name for spec in model.specs if spec.name not in {tied.get(n, n) for n in weights}]
    for what, names in (("missing", missing), ("unknown", unknown)):
        if names:
            faults.append(f"{what}: {_list(names)}")
    if faults:
        raise WeightsError(f"{source} does not fit the module: {'; '.join(faults[:8])}")
    with torch.no_grad():
        for name, array in chosen.items():
            state[name].copy_(torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape)))


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
