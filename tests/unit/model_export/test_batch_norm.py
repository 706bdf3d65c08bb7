"""Running statistics: in the vector, moved as torch moves them, used by eval, published with the model."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody does
from torch import nn

from aggregator.versions.model_files import parameters_npz, publish_model
from edge_runtime.backends.artifact_folder import initial_parameters
from edge_runtime.backends.base import Hyperparameters
from edge_runtime.backends.ort import OrtBackend
from edge_runtime.protocol.tensors import unflatten
from model_export.build import Result, build_artifact
from tests.support.gradients import run


def export(module: nn.Module, *inputs: torch.Tensor) -> Result:
    target = torch.arange(len(inputs[0])) % 3
    return build_artifact(lambda: (module, inputs, target, "cross_entropy"), name="model", seed=0)


def convolutional() -> nn.Module:
    """Smooth, so that long runs can be compared closely."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, groups=4, bias=False),
        nn.BatchNorm2d(4, affine=False),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.BatchNorm1d(6, eps=1e-3),
        nn.Linear(6, 3),
    )


@pytest.fixture(scope="module")
def exported() -> Result:
    torch.manual_seed(0)
    return export(convolutional(), torch.randn(4, 1, 6, 6))


def batches(count: int, size: int = 8) -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(3)
    return [
        (random.standard_normal((size, 1, 6, 6), dtype=np.float32) * 2 + 1, random.integers(0, 3, size))
        for _ in range(count)
    ]


def test_the_statistics_are_the_end_of_the_vector(exported: Result) -> None:
    manifest = exported.artifact.manifest
    assert [spec.name for spec in manifest.parameters[-manifest.buffers :]] == [
        f"{layer}.running_{kind}" for layer in (1, 4, 7) for kind in ("mean", "var")
    ]
    assert manifest.buffer_count == 2 * (4 + 4 + 6)
    start = unflatten(manifest.parameters, initial_parameters(exported.artifact))
    np.testing.assert_array_equal(start["1.running_var"], 1.0)  # building does not move them
    assert {c.what for c in exported.checks} >= {
        "buffer 1.running_var",
        "running statistics after 2 fused steps of Adam",
    }


def test_thirty_steps_move_the_statistics_as_torch_does(exported: Result) -> None:
    session = OrtBackend().load(exported.artifact)
    session.start(exported.model.theta())
    torch.manual_seed(0)
    reference = build_copy(exported)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    hyper = Hyperparameters(learning_rate=0.05, momentum=0.9)
    for x, y in batches(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(reference(torch.from_numpy(x).double()), torch.from_numpy(y))
        loss.backward()
        optimizer.step()
        assert session.step([x], y, hyper).loss == pytest.approx(loss.item(), rel=1e-4)
    ours = unflatten(exported.model.specs, session.theta())
    for name, value in exported.model.tensors(reference).items():
        np.testing.assert_allclose(ours[name], value.numpy(), atol=5e-5, err_msg=name)
    # and then as eval() uses them, one sample at a time too
    x, y = batches(1)[0]
    expected = reference.eval()(torch.from_numpy(x).double()).detach().numpy()
    np.testing.assert_allclose(session.infer(session.theta(), [x])[0], expected, atol=1e-4)
    np.testing.assert_allclose(session.infer(session.theta(), [x[:1]])[0], expected[:1], atol=1e-4)
    assert session.evaluate(session.theta(), [x], y).loss == pytest.approx(
        F.cross_entropy(torch.from_numpy(expected), torch.from_numpy(y)).item(), rel=1e-4
    )


def build_copy(result: Result) -> nn.Module:
    module = convolutional().double()
    module.load_state_dict(result.model.module.state_dict())
    return module.train()


def test_micro_batches_average_the_change_of_the_statistics(exported: Result) -> None:
    session = OrtBackend().load(exported.artifact)
    theta = exported.model.theta()
    b = exported.artifact.manifest.buffer_count
    ((x, y),) = batches(1)
    halves = []
    for part in (slice(4), slice(4, 8)):
        session.start(theta)
        session.accumulate([x[part]], y[part], scale=1.0)
        halves.append(session.gradient())
    session.start(theta)
    for part in (slice(4), slice(4, 8)):
        session.accumulate([x[part]], y[part], scale=0.5)
    np.testing.assert_allclose(session.gradient(), (halves[0] + halves[1]) / 2, atol=1e-5)
    session.apply(Hyperparameters(learning_rate=0.1, max_grad_norm=1e-6))
    # clipping is for the gradient: the statistics move as far as they moved
    np.testing.assert_allclose(session.theta()[-b:], theta[-b:] + (halves[0] + halves[1])[-b:] / 2, atol=1e-5)
    np.testing.assert_allclose(session.theta()[:-b], theta[:-b], atol=1e-6)


def test_a_batch_of_one_value_per_channel_is_finite_and_leaves_the_variance_alone() -> None:
    result = export(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), torch.randn(3, 4))
    session = OrtBackend().load(result.artifact)
    session.start(result.model.theta())
    done = session.step([np.ones((1, 4), np.float32)], np.array([0]), Hyperparameters(learning_rate=0.1))
    after = unflatten(result.model.specs, session.theta())
    assert np.isfinite(done.loss)
    assert all(np.isfinite(value).all() for value in after.values())
    np.testing.assert_array_equal(after["1.running_var"], 1.0)


def test_a_variance_below_zero_counts_as_zero(exported: Result) -> None:
    session = OrtBackend().load(exported.artifact)
    theta = exported.model.theta()
    ((x, _),) = batches(1)
    unflatten(exported.model.specs, theta)["1.running_var"][:] = 0.0
    at_zero = session.infer(theta, [x])[0]
    unflatten(exported.model.specs, theta)["1.running_var"][:] = -1e-4
    np.testing.assert_array_equal(session.infer(theta, [x])[0], at_zero)


def test_a_published_model_has_the_statistics_and_loads_into_torch(exported: Result) -> None:
    theta, specs = exported.model.theta(), exported.artifact.manifest.parameters
    theta[-exported.artifact.manifest.buffer_count :] += 0.25
    ((x, _),) = batches(1)
    (ours,) = run(publish_model(exported.artifact.files["infer.onnx"], specs, theta), {"input": x}).values()
    arrays = np.load(io.BytesIO(parameters_npz(specs, theta)))
    module = convolutional()
    module.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})
    np.testing.assert_allclose(ours, module.eval()(torch.from_numpy(x)).detach().numpy(), atol=1e-4)


class Frozen(nn.Module):
    """One layer in eval(), one twice on other values, one without running statistics; a constant buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 3)
        self.frozen, self.shared = nn.BatchNorm1d(3).eval(), nn.BatchNorm1d(3)
        self.stateless = nn.BatchNorm1d(3, track_running_stats=False)
        self.register_buffer("shift", torch.arange(3.0))
        self.frozen.running_mean.uniform_()  # type: ignore[union-attr]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.frozen(self.first(x))
        return self.stateless(self.shared(h) + self.shared(self.second(h)) + self.shift)


def test_frozen_shared_and_stateless_layers_agree_with_torch() -> None:
    result = export(Frozen(), torch.randn(5, 4))
    assert max(check.error / check.tolerance for check in result.checks) < 1
    session = OrtBackend().load(result.artifact)
    session.start(result.model.theta())
    x, y = np.random.default_rng(0).standard_normal((6, 4), dtype=np.float32), np.arange(6) % 3
    session.step([x], y, Hyperparameters(learning_rate=0.1))
    before = unflatten(result.model.specs, result.model.theta())
    after = unflatten(result.model.specs, session.theta())
    assert not np.array_equal(after["shared.running_mean"], before["shared.running_mean"])
    np.testing.assert_array_equal(after["frozen.running_mean"], before["frozen.running_mean"])


def test_evaluation_under_self_training_is_still_refused() -> None:
    class Other(nn.Sequential):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x) * (1 if self.training else 2)

    with pytest.raises(Exception, match=r"something else in eval\(\)"):
        export(Other(nn.Linear(4, 3), nn.BatchNorm1d(3)), torch.randn(5, 4))
