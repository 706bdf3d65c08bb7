"""The comparison with torch: what would pass a careless one is refused, and what is right is accepted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody does
from torch import nn

from model_export.build import Result, build_artifact, import_build
from model_export.errors import ExportError, ParityError, UnsupportedModel
from model_export.parity import batch_sizes

X, Y = torch.randn(3, 4), torch.arange(3)
WEIGHT = torch.tensor([1.0, 2.0, 3.0, 4.0])


def export(module: nn.Module, inputs: Any = (X,), target: Any = Y, loss: Any = "cross_entropy") -> Result:
    return build_artifact(lambda: (module, inputs, target, loss), name="model", seed=0)


class Net(nn.Module):
    """A linear layer, then ``function(module, logits, x)``."""

    def __init__(self, function: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, self.linear(x), x)


class Scaled(nn.Module):
    """All that is float32 beside the parameters: a converted input, a plain tensor, a named dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.mixing = torch.randn(4, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = image.float() / 255 + image.to(torch.float32)
        return self.linear(x @ self.mixing + torch.zeros(4, dtype=torch.float32))


BRANCHES: dict[str, Callable[[int], bool]] = {
    "a threshold above what is compared": lambda size: size > 500,
    "parity of the size": lambda size: size % 3 == 0,
    "one size": lambda size: size == 30,
}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_on_the_batch_size_is_refused(name: str) -> None:
    branch = BRANCHES[name]
    with pytest.raises(UnsupportedModel, match="something else at other batch sizes"):
        export(Net(lambda self, h, x: h * 2 if branch(x.shape[0]) else h))


def test_a_branch_on_a_batch_of_one_is_refused() -> None:
    with pytest.raises(ParityError, match="loss at batch 1: "):
        export(Net(lambda self, h, x: h * 2 if x.shape[0] == 1 else h))


@pytest.mark.parametrize(
    "function",
    [
        lambda self, h, x: h if self.training else h.softmax(1),
        lambda self, h, x: h if self.training else self.missing,
    ],
)
def test_a_module_with_another_eval_is_refused(function: Any) -> None:
    with pytest.raises(UnsupportedModel, match=r"the module computes something else in eval\(\): "):
        export(Net(function))


def test_integers_plain_constants_and_class_weights_are_compared_in_float64_at_three_sizes() -> None:
    image = torch.randint(0, 256, (3, 4), dtype=torch.uint8)
    result = export(
        Scaled(), (image,), loss=lambda output, target: F.cross_entropy(output, target, weight=WEIGHT)
    )
    assert {check.reference for check in result.checks} == {"float64"}
    assert batch_sizes(result.model) == (3, 1, 61)
    for what in ("loss", "gradient linear.weight", "inference output"):
        assert {check.batch for check in result.checks if check.what == what} == {1, 3, 61}


def test_a_model_that_cannot_compute_in_float64_is_compared_in_float32() -> None:
    def only_float32(self: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if h.dtype == torch.float64:
            raise TypeError("float32 only")
        return torch.tanh(h)

    checks = export(Net(only_float32)).checks
    assert {(check.reference, check.tolerance) for check in checks} == {("float32", 1e-3)}


def test_a_model_that_fails_at_another_batch_size_is_no_traceback() -> None:
    def only_small(self: Net, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_exporting() and h.shape[0] > 50:
            raise ValueError("too many")
        return h

    with pytest.raises(
        ExportError, match=r"does not train in torch at batch size 61: ValueError: too many \(.*py:"
    ):
        export(Net(only_small))


def test_a_bias_whose_true_gradient_is_zero_is_measured_by_the_others() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    nn.init.zeros_(module[0].bias)  # type: ignore[arg-type]
    export(module, (torch.randn(2, 1, 96, 96),), torch.arange(2))


def test_noise_is_not_taken_for_rounding() -> None:
    with pytest.raises(ParityError):
        export(Net(lambda self, h, x: h + 1e-3 * torch.randn_like(x)))


LOSSES: dict[str, Any] = {
    "sum": lambda output, target: F.cross_entropy(output, target, reduction="sum"),
    "sum over the example's size": lambda output, target: (output - target[:, None]).square().sum() / 3,
    "mean and sum": lambda output, target: F.cross_entropy(output, target) + 0.1 * output.square().sum(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_grows_with_the_batch_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="the loss grows with the batch: take the mean"):
        export(nn.Linear(4, 4), loss=LOSSES[name])


def test_a_contrastive_loss_is_no_sum() -> None:
    export(nn.Linear(4, 4), loss=lambda output, target: (output @ output.t()).logsumexp(1).mean())


def test_random_numbers_on_import_come_from_the_seed(tmp_path: Path) -> None:
    (tmp_path / "drawn.py").write_text(
        "import torch\nNET = torch.nn.Linear(2, 2)\n"
        "def build(): return NET, (torch.ones(2, 2),), torch.arange(2), 'cross_entropy'\n"
    )
    drawn = []
    for _ in range(2):
        sys.modules.pop("drawn", None)
        torch.rand(3)
        drawn.append(import_build("drawn:build", tmp_path, seed=7)()[0].weight)  # type: ignore[index]
    assert torch.equal(*drawn)
