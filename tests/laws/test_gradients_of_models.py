"""Whole models: the fused step follows torch's optimizer, and every kind of model passes the parity check."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody does
from torch import nn

from edge_runtime.backends.base import Hyperparameters
from edge_runtime.backends.ort import OrtBackend
from edge_runtime.protocol.tensors import flatten
from model_export.build import build_artifact


def export(module: nn.Module, inputs: tuple[torch.Tensor, ...], target: torch.Tensor, loss: Any) -> Any:
    return build_artifact(lambda: (module, inputs, target, loss), name="model", seed=0)


# Epsilon is large for what Adam's is for: a gradient next to nothing, divided by its own size, is all rounding.
OPTIMIZERS: dict[str, tuple[Hyperparameters, Callable[..., torch.optim.Optimizer]]] = {
    "sgd": (Hyperparameters(learning_rate=0.1), partial(torch.optim.SGD, lr=0.1)),
    "sgd, momentum, clipped": (
        Hyperparameters(learning_rate=0.1, momentum=0.9, max_grad_norm=0.25),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    ),
    "sgd, Nesterov, weight decay": (
        Hyperparameters(learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, max_grad_norm=5.0),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    ),
    "adam": (
        Hyperparameters(optimizer="adam", learning_rate=0.01, weight_decay=0.01, epsilon=1e-4),
        partial(torch.optim.Adam, lr=0.01, weight_decay=0.01, eps=1e-4),
    ),
    "adamw, clipped": (
        Hyperparameters(
            optimizer="adamw", learning_rate=0.01, weight_decay=0.1, epsilon=1e-4, max_grad_norm=0.25
        ),
        partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, eps=1e-4),
    ),
}


@pytest.fixture(scope="module")
def smooth() -> tuple[Any, nn.Module]:
    """An exported network without kinks, and its source."""
    torch.manual_seed(1)
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(64, 16),
        nn.Tanh(),
        nn.Linear(16, 5),
    )
    return export(module, (torch.randn(4, 1, 8, 8),), torch.arange(4), "cross_entropy"), module


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_steps_follow_torch(smooth: tuple[Any, nn.Module], name: str) -> None:
    hyper, make = OPTIMIZERS[name]
    result, module = smooth
    session = OrtBackend().load(result.artifact)
    session.start(result.model.theta())
    reference = copy.deepcopy(module).double()
    optimizer = make(reference.parameters())
    for step in range(50):
        random = np.random.default_rng(step)
        x = random.standard_normal((8, 1, 8, 8)).astype(np.float32)
        y = random.integers(0, 5, 8)
        optimizer.zero_grad()
        loss = F.cross_entropy(reference(torch.from_numpy(x).double()), torch.from_numpy(y))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), hyper.max_grad_norm or float("inf"))
        optimizer.step()
        ours = session.step([x], y, hyper)
        assert ours.loss == pytest.approx(loss.item(), rel=1e-4)
        assert ours.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    expected = {
        name: value.detach().numpy().astype(np.float32) for name, value in reference.named_parameters()
    }
    np.testing.assert_allclose(session.theta(), flatten(result.model.specs, expected), atol=2e-5)


class Residual(nn.Module):
    """Strided, depthwise and dilated convolutions, group normalisation, hard activations, pooling, a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.out = nn.Linear(8, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = F.hardswish(self.norm(self.stem(image)))
        x = x + F.relu6(self.grouped(F.silu(self.depthwise(x))))
        x = F.avg_pool2d(F.max_pool2d(x, 3, 1, 1), 2, 2, 1, count_include_pad=False)
        return self.out(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Mixed(nn.Module):
    """Two inputs, one of them indices; a shared layer, a shared weight, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.shared = nn.Linear(5, 5)
        self.decoder = nn.Linear(5, 7, bias=False)
        self.decoder.weight = self.embedding.weight
        self.norm = nn.LayerNorm(5)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, word: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.norm(self.shared(self.embedding(word)) + self.shared(x) * self.scale)
        return self.decoder(F.gelu(h)), F.normalize(h, dim=1)


def mixed_loss(outputs: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    # -100 is torch's label for "do not count"
    return F.cross_entropy(outputs[0], target) + 0.1 * outputs[1].square().sum(1).sqrt().mean()


class Pieces(nn.Module):
    """Slices, splits, joins, padding, reductions over axes, elementwise choices."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6) * 0.5)
        self.prelu = nn.PReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.prelu(x @ self.weight)
        left, right = h.chunk(2, 1)
        h = torch.cat([left * torch.sigmoid(right), h[:, ::2].flip(1), F.pad(right, (1, -1))], 1)
        h = torch.where(h > 0.5, h, 0.1 * h) + h.clamp(-1, 1) + torch.maximum(h, h * h) / (1 + h.abs())
        top = h.view(-1, 3, 3)
        return torch.stack(
            [top.amax(2).mean(1), top.logsumexp((1, 2)), top[:, 1, :].std(1), top[:, [2, 0]].sum((1, 2))], 1
        )


MODELS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(5, 8), nn.ELU(), nn.Linear(8, 8), nn.Softplus(), nn.Linear(8, 1)),
        (torch.randn(3, 5),),
        torch.randint(0, 2, (3, 1)).float(),
        "bce_with_logits",
    ),
    "residual network": lambda: (Residual(), (torch.randn(2, 3, 11, 10),), torch.arange(2), "cross_entropy"),
    "several inputs and outputs": lambda: (
        Mixed(),
        (torch.tensor([1, 2, 2, 6]), torch.randn(4, 5)),
        torch.tensor([0, 6, -100, 1]),
        mixed_loss,
    ),
    "pieces": lambda: (Pieces(), (torch.randn(5, 6),), torch.randn(5, 4), "mse"),
    "one sample": lambda: (
        nn.Sequential(nn.Flatten(), nn.Linear(4, 3)),
        (torch.randn(1, 2, 2),),
        torch.randn(1, 3),
        lambda output, target: F.smooth_l1_loss(output, target) + F.logsigmoid(output).mean(),
    ),
    "labels at every position": lambda: (
        nn.Conv2d(2, 3, 1),
        (torch.randn(2, 2, 4, 4),),
        torch.randint(0, 3, (2, 4, 4)),
        "cross_entropy",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_exported_and_agrees_with_torch(name: str) -> None:
    result = export(*MODELS[name]())
    assert max(check.error for check in result.checks) < 1e-4
    gradients = {(check.what, check.batch) for check in result.checks if check.what.startswith("gradient ")}
    for spec in result.artifact.manifest.parameters:
        assert len([1 for what, _ in gradients if what == f"gradient {spec.name}"]) == 3
