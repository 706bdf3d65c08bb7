"""What a backend must do: run an artifact's graphs. A new one is one more parameter of the contract tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from edge_runtime.protocol.artifact import Artifact
from edge_runtime.protocol.errors import Fault, FleetgradError
from edge_runtime.protocol.tensors import Vector

Array = npt.NDArray[Any]


class BackendError(
    FleetgradError,
    fault=Fault.ENGINEER,
    remedy='install or update the runtime: pip install "fleetgrad[device]"',
):
    """The runtime is missing or too old, or cannot run this artifact."""


class BatchError(
    FleetgradError,
    fault=Fault.ENGINEER,
    remedy="bring the batch into the shape and dtype that the message names",
):
    """A batch whose names, shapes or dtypes are not those of the artifact's manifest."""


class StepResult(NamedTuple):
    """``loss``: mean over the batch before the step; ``grad_norm``: L2 norm before clipping."""

    loss: float
    grad_norm: float


class Evaluation(NamedTuple):
    """``loss``: mean over the batch; ``outputs``: one array per output of the manifest, batch first."""

    loss: float
    outputs: tuple[Array, ...]


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Of one step, finite and within ``protocol.plan``'s bounds. What another optimizer uses is ignored.

    optimizer: of ``protocol.plan.OPTIMIZERS``; sgd: momentum, nesterov; adam, adamw: beta1, beta2, epsilon.
    max_grad_norm: 0 does not clip.
    """

    optimizer: str = "sgd"
    learning_rate: float
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    max_grad_norm: float = 0.0


@dataclass(frozen=True, eq=False)
class TrainingState:
    """All that a session carries from one step to the next, as copies: float32 ``theta`` (d,), ``vectors`` (p,).

    optimizer: whose ``vectors`` these are, a key of the manifest's ``optimizers``, in its order; before the
        first step there are none, and it is "".
    steps: made with it so far; the bias corrections of Adam depend on them.
    """

    theta: Vector
    optimizer: str = ""
    vectors: tuple[Vector, ...] = ()
    steps: int = 0


class TrainingSession(Protocol):
    """One model in training: theta float32 (d,), the optimiser's vectors float32 (p,), the accumulator (d,).

    The first p of theta are trained; the others are buffers, which a forward pass in training moves.
    ``inputs`` and ``target`` are C-contiguous arrays, batch first, with the dtypes and shapes of the
    manifest; any batch size from 1. ``dropout_seed``, 0 to 2^63 - 1, decides the masks of the step, the same
    on every machine; a model without dropout ignores it.
    The optimiser may change between steps; the next one then begins with state of zero.
    Every method raises BatchError for a batch that does not fit, BackendError when the runtime fails.
    """

    def start(self, theta: Vector) -> None:
        """Begins at ``theta``, copied; the optimiser's state and the accumulator are zero. Raises TensorError."""

    def step(
        self, inputs: Sequence[Array], target: Array, hyper: Hyperparameters, *, dropout_seed: int = 0
    ) -> StepResult:
        """One step of the optimiser on one batch."""

    def accumulate(
        self, inputs: Sequence[Array], target: Array, *, scale: float, dropout_seed: int = 0
    ) -> float:
        """Adds ``scale`` times the gradient of one micro-batch to the accumulator; returns ``scale`` * loss.

        With scale = micro-batch size / batch size the sum over a batch is the batch's gradient and loss.
        The tail of the accumulator takes ``scale`` times the change of the buffers.
        """

    def gradient(self) -> Vector:
        """A copy of the accumulator."""

    def apply(self, hyper: Hyperparameters) -> float:
        """One step on the accumulated gradient, which is then zero; returns its norm before clipping."""

    def state(self) -> TrainingState:
        """What ``resume`` goes on from, to the same bytes. Between steps: the accumulator is not part of it."""

    def resume(self, state: TrainingState) -> None:
        """Begins at ``state``, copied; the accumulator is zero. Raises TensorError for a state of another model."""

    def theta(self) -> Vector:
        """A copy of the current parameters."""

    def evaluate(self, theta: Vector, inputs: Sequence[Array], target: Array) -> Evaluation:
        """Loss and outputs at ``theta``; the training state is not touched."""

    def infer(self, theta: Vector, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """Outputs at ``theta``."""


class Backend(Protocol):
    """A runtime by name."""

    name: str

    def load(self, artifact: Artifact, *, threads: int = 1) -> TrainingSession:
        """A session with its own state. One thread: the same bytes in give the same bytes out.

        Raises BackendError, saying what to install or update.
        """


def check_batch(artifact: Artifact, inputs: Sequence[Array], target: Array | None) -> None:
    """Raises BatchError unless the arrays have the manifest's dtypes, shapes and one common batch size."""
    manifest = artifact.manifest
    if len(inputs) != len(manifest.inputs):
        raise BatchError(f"the model takes {len(manifest.inputs)} inputs, not {len(inputs)}")
    pairs = list(zip(manifest.inputs, inputs, strict=True))
    batch = inputs[0].shape[0] if inputs[0].ndim else 0
    if target is not None:
        pairs.append((manifest.target, target))
    for spec, array in pairs:
        if array.dtype != np.dtype(spec.dtype) or array.shape != (batch, *spec.shape) or batch < 1:
            raise BatchError(
                f"{spec.name!r} is {array.dtype} of shape {array.shape}; the model takes {spec.dtype} of "
                f"({', '.join(['batch', *map(str, spec.shape)])}) with one batch size of at least 1 for all"
            )
        if not array.flags.c_contiguous:
            raise BatchError(f"{spec.name!r} is not C-contiguous; pass a copy in C order")
