"""Masks of dropout: the same in the runtime and in numpy, fresh with each seed, and without a pattern."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody does
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edge_runtime.backends.base import Hyperparameters
from edge_runtime.backends.ort import OrtBackend
from model_export.autodiff.builder import Builder
from model_export.build import Result, build_artifact
from model_export.dropout import SEED, keep_mask, write_mask
from model_export.graph import Graph, ValueType, to_bytes
from model_export.passes import tidy
from tests.support.gradients import run

N = 1 << 16
INT64 = np.dtype(np.int64)


def masks_in_the_runtime(seed: int, salt: int, probability: float, shape: tuple[int, ...]) -> np.ndarray:
    inputs = {SEED: ValueType(INT64, ()), "shape": ValueType(INT64, (len(shape),))}
    graph = Graph(inputs, {"mask": ValueType(np.dtype(np.float32), (None,) * len(shape))})
    b = Builder(graph)
    b.named("mask", "Identity", write_mask(b, salt, probability, "shape"))
    return run(to_bytes(tidy(graph)), {SEED: np.array(seed), "shape": np.array(shape, np.int64)})["mask"]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.integers(0, (1 << 31) - 1),
    st.floats(1 / 64, 63 / 64, width=32),
    st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
)
def test_the_runtime_and_numpy_make_the_same_mask(
    seed: int, salt: int, probability: float, shape: tuple[int, ...]
) -> None:
    ours = masks_in_the_runtime(seed, salt, probability, shape)
    kept = keep_mask(seed, salt, probability, shape)
    np.testing.assert_array_equal(ours != 0, kept)
    np.testing.assert_allclose(ours[kept], 1 / (1 - probability), rtol=1e-6)


def test_a_mask_is_what_it_was_in_every_version() -> None:
    """A change here would make every past step irreproducible."""
    assert np.packbits(keep_mask(0, 0, 0.5, (64,))).tobytes().hex() == "3706fd97083796c9"
    assert np.packbits(keep_mask(1 << 40 | 7, 18, 0.5, (64,))).tobytes().hex() == "41b55bad6a0e0cc8"


SEEDS = [0, 1, 2, 3, 1 << 31, 1 << 32, (1 << 32) + 1, 1 << 62, -1]


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.8])
def test_the_right_share_is_dropped(probability: float) -> None:
    deviation = (probability * (1 - probability) / N) ** 0.5
    for seed, salt in itertools.product(SEEDS, (4, 18, 34)):
        share = 1 - keep_mask(seed, salt, probability, (N,)).mean()
        assert abs(share - probability) < 5 * deviation, (seed, salt)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """In standard deviations of what independent masks have."""
    return float(abs(np.mean((a - a.mean()) * (b - b.mean()))) / (a.std() * b.std()) * a.size**0.5)


def test_masks_of_other_steps_and_of_other_nodes_are_independent() -> None:
    drawn = [
        keep_mask(seed, salt, 0.5, (N,)).astype(float) for seed in SEEDS for salt in (4, 20, 36, 18, 1 << 20)
    ]
    worst = max(correlation(a, b) for a, b in itertools.combinations(drawn, 2))
    assert worst < 5  # of 990 pairs, at 4.4 one would be expected in a hundred runs


def test_the_elements_of_a_mask_are_independent() -> None:
    for seed in SEEDS:
        mask = keep_mask(seed, 4, 0.5, (N,)).astype(float)
        for lag in (1, 2, 3, 4, 7, 8, 16, 32, 64, 100, 256, 1024, 4096):
            assert correlation(mask[:-lag], mask[lag:]) < 5, (seed, lag)
        # all of 8 neighbours: each of the 256 patterns is as frequent as another (chi squared, 255 degrees)
        counts = np.bincount(np.packbits(mask.astype(bool)), minlength=256)
        chi = float(((counts - N / 8 / 256) ** 2 / (N / 8 / 256)).sum())
        assert 255 - 5 * 510**0.5 < chi < 255 + 5 * 510**0.5, seed


def test_a_mask_of_a_later_step_is_no_shifted_mask() -> None:
    first = keep_mask(1, 4, 0.5, (2048,)).astype(float)
    second = keep_mask(2, 4, 0.5, (2048,)).astype(float)
    spectrum = np.fft.ifft(np.fft.fft(first - 0.5) * np.conj(np.fft.fft(second - 0.5))).real
    assert np.abs(spectrum).max() / (0.25 * 2048**0.5) < 6


# ---- in a model -------------------------------------------------------------------------------------


class Drops(nn.Module):
    """All kinds: of elements, of channels of one and two axes, by function, in attention; one module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 4, 3)
        self.channels = nn.Dropout2d(0.25)
        self.sequence = nn.Dropout1d(0.25)
        self.drop = nn.Dropout(0.3)
        self.frozen = nn.Dropout(0.9).eval()
        self.out = nn.Linear(16, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.sequence(self.channels(self.embed(image)).flatten(2))
        x = F.scaled_dot_product_attention(x, x, x, dropout_p=0.1 if self.training else 0.0)
        x = self.drop(F.dropout(self.frozen(x), 0.2, self.training))
        return self.out(self.drop(x.mean(1)))


def export(module: nn.Module, inputs: Any = None, target: Any = None) -> Result:
    inputs = inputs or (torch.randn(3, 4),)
    target = torch.arange(3) if target is None else target
    return build_artifact(lambda: (module, inputs, target, "cross_entropy"), name="model", seed=0)


def test_every_kind_of_dropout_agrees_with_torch_under_the_same_masks() -> None:
    torch.manual_seed(0)
    result = export(Drops(), (torch.randn(4, 1, 6, 6),), torch.arange(4) % 3)
    assert result.artifact.manifest.dropout
    assert max(check.error for check in result.checks) < 1e-4
    session = OrtBackend().load(result.artifact)
    random = np.random.default_rng(0)
    inputs, target = [random.standard_normal((8, 1, 6, 6), dtype=np.float32)], np.arange(8) % 3
    hyper = Hyperparameters(learning_rate=0.1)
    losses, thetas = [], []
    for seed in (1, 1, 2):
        session.start(result.model.theta())
        losses.append(session.step(inputs, target, hyper, dropout_seed=seed).loss)
        thetas.append(session.theta().tobytes())
    assert (losses[0], thetas[0]) == (losses[1], thetas[1])
    assert losses[0] != losses[2]


@pytest.mark.parametrize(("probability", "drops"), [(0.0, False), (1.0, False), (0.5, True)])
def test_dropping_nothing_or_everything_needs_no_seed(probability: float, drops: bool) -> None:
    result = export(nn.Sequential(nn.Linear(4, 4), nn.Dropout(probability), nn.Linear(4, 4)))
    assert result.artifact.manifest.dropout is drops


def test_dropout_twice_on_one_value_has_two_masks() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.linear(x)
            F.dropout(h, 0.7)  # a call that nothing uses is counted all the same
            return F.dropout(h, 0.5, self.training) * F.dropout(h, 0.5, self.training)

    assert max(check.error for check in export(Twice()).checks) < 1e-4
