"""Each optimiser's graph against torch.optim in float64: fifty steps on a badly scaled, never satisfied problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from edge_runtime.protocol.artifact import OPTIMIZERS
from model_export.autodiff.builder import Builder
from model_export.graph import Graph, ValueType, to_bytes
from model_export.optimizers import SCALARS, optimizer_inputs, update
from model_export.passes import tidy
from tests.support.gradients import run

P = 40
VECTOR = ValueType(np.dtype(np.float32), (P,))
SGD = {"learning_rate": 0.05, "momentum_coefficient": 0.0, "nesterov": 0.0, "weight_decay": 0.0}
ADAM = {"learning_rate": 0.02, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.0}
Torch = Callable[[list[torch.Tensor]], torch.optim.Optimizer]
CASES: dict[str, tuple[str, dict[str, float], Torch]] = {
    "sgd": ("sgd", SGD, lambda p: torch.optim.SGD(p, lr=0.05)),
    "sgd with momentum": (
        "sgd",
        {**SGD, "momentum_coefficient": 0.9},
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    ),
    "sgd with Nesterov's momentum": (
        "sgd",
        {**SGD, "momentum_coefficient": 0.9, "nesterov": 1.0},
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    ),
    "sgd with momentum and weight decay": (
        "sgd",
        {**SGD, "momentum_coefficient": 0.8, "weight_decay": 0.1},
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, weight_decay=0.1),
    ),
    "sgd with Nesterov's momentum and weight decay": (
        "sgd",
        {**SGD, "momentum_coefficient": 0.8, "nesterov": 1.0, "weight_decay": 0.1},
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.1),
    ),
    "adam": ("adam", ADAM, lambda p: torch.optim.Adam(p, lr=0.02)),
    "adam with other moments": (
        "adam",
        {**ADAM, "beta1": 0.5, "beta2": 0.9, "epsilon": 0.1},
        lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.5, 0.9), eps=0.1),
    ),
    "adam with weight decay": (
        "adam",
        {**ADAM, "weight_decay": 0.1},
        lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1),
    ),
    "adamw": (
        "adam",
        {**ADAM, "decoupled_weight_decay": 0.1},
        lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    ),
}


def model(optimizer: str) -> bytes:
    graph = Graph({"theta": VECTOR, "gradient": VECTOR, **optimizer_inputs(optimizer, VECTOR)}, {})
    builder = Builder(graph)
    made = update(builder, optimizer, "theta", "gradient", VECTOR)
    builder.named("new_theta", "Identity", made.parameters)
    graph.outputs = {"new_theta": VECTOR, **made.outputs}
    return to_bytes(tidy(graph))


def gradient_at(theta: Any, step: int, target: Any, scale: Any) -> Any:
    """Of a quadratic whose optimum wanders, so that no optimiser ever comes to rest."""
    return scale * (theta - target * np.cos(0.3 * step))


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
@pytest.mark.parametrize("name", CASES)
def test_fifty_steps_follow_torch(name: str, max_grad_norm: float) -> None:
    optimizer, scalars, make = CASES[name]
    random = np.random.default_rng(3)
    target, scale = random.standard_normal(P), 10.0 ** random.uniform(-3, 0.5, P)
    theta = random.standard_normal(P).astype(np.float32)
    state = {key: np.zeros(P, np.float32) for key in OPTIMIZERS[optimizer]}
    reference = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    theirs = make([reference])
    graph = model(optimizer)
    for step in range(1, 51):
        reference.grad = torch.from_numpy(gradient_at(reference.detach().numpy(), step, target, scale))
        norm = torch.nn.utils.clip_grad_norm_([reference], max_grad_norm or float("inf"))
        theirs.step()
        fed = {**scalars, "max_grad_norm": max_grad_norm}
        if optimizer == "adam":
            # as the backend does it: of the betas that float32 holds
            beta1, beta2 = (float(np.float32(scalars[beta])) for beta in ("beta1", "beta2"))
            fed |= {"bias_correction1": 1 - beta1**step, "bias_correction2": 1 - beta2**step}
            fed = {"decoupled_weight_decay": 0.0, **fed}
        assert fed.keys() == set(SCALARS[optimizer])
        feeds = {key: np.array(value, np.float32) for key, value in fed.items()}
        gradient = gradient_at(theta.astype(np.float64), step, target, scale).astype(np.float32)
        ours = run(graph, {**feeds, **state, "theta": theta, "gradient": gradient})
        assert ours["grad_norm"] == pytest.approx(norm.item(), rel=2e-5)
        theta = ours["new_theta"]
        state = {key: ours[f"new_{key}"] for key in state}
    np.testing.assert_allclose(theta, reference.detach().numpy(), atol=3e-6)


def test_a_first_step_of_adam_moves_every_coordinate_by_the_rate_however_small_its_gradient() -> None:
    feeds = {
        **{key: np.array(value, np.float32) for key, value in ADAM.items()},
        "decoupled_weight_decay": np.array(0, np.float32),
        "bias_correction1": np.array(1 - float(np.float32(0.9)), np.float32),
        "bias_correction2": np.array(1 - float(np.float32(0.999)), np.float32),
        "max_grad_norm": np.array(0, np.float32),
        **{key: np.zeros(P, np.float32) for key in OPTIMIZERS["adam"]},
    }
    gradient = np.geomspace(1e-3, 1e3, P, dtype=np.float32)
    ours = run(model("adam"), {**feeds, "theta": np.zeros(P, np.float32), "gradient": gradient})
    np.testing.assert_allclose(ours["new_theta"], np.full(P, -0.02), rtol=2e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gradient_of_zero_without_decay_moves_nothing(optimizer: str) -> None:
    feeds = {key: np.array(0.5, np.float32) for key in SCALARS[optimizer]}
    feeds |= {key: np.zeros((), np.float32) for key in ("weight_decay", "decoupled_weight_decay")}
    zeros = np.zeros(P, np.float32)
    theta = np.linspace(-1, 1, P, dtype=np.float32)
    ours = run(
        model(optimizer),
        {**feeds, **dict.fromkeys(OPTIMIZERS[optimizer], zeros), "theta": theta, "gradient": zeros},
    )
    np.testing.assert_array_equal(ours["new_theta"], theta)
    assert ours["grad_norm"] == 0
