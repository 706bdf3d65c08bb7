"""Stock ONNX Runtime, CPU, through IO binding. The only module that imports onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edge_runtime.backends.base import (
    Array,
    BackendError,
    Evaluation,
    Hyperparameters,
    StepResult,
    TrainingSession,
    TrainingState,
    check_batch,
)
from edge_runtime.protocol.artifact import Artifact
from edge_runtime.protocol.plan import OPTIMIZERS
from edge_runtime.protocol.tensors import TensorError, Vector, check_vector

MIN_VERSION = (1, 22)  # 1.21 dies with SIGILL on a Raspberry Pi 4
MAX_OPSET = 18


class OrtBackend:
    """The backend every device can install."""

    name = "onnxruntime"

    def load(self, artifact: Artifact, *, threads: int = 1) -> TrainingSession:
        """A session on ``threads`` CPU threads. Raises BackendError."""
        runtime = _import_runtime()
        if artifact.manifest.opset > MAX_OPSET:
            raise BackendError(
                f"the artifact uses ONNX opset {artifact.manifest.opset}, this software runs up to {MAX_OPSET}: "
                "update fleetgrad on this device"
            )
        return OrtSession(runtime, artifact, threads)

    def runtime(self) -> str:
        """Name and version of the runtime, such as "onnxruntime 1.22.0". Raises BackendError."""
        return f"{self.name} {_import_runtime().__version__}"


def run_model(model: bytes, inputs: Sequence[Array], *, threads: int = 1) -> tuple[Array, ...]:
    """All outputs of a standalone ONNX model, such as a published ``model.onnx``, for inputs in its own order.

    Raises BackendError: the model cannot be loaded, takes another number of inputs, or fails on these.
    """
    graph = _Graph(_import_runtime(), "the model", model, threads)
    if len(graph.inputs) != len(inputs):
        raise BackendError(
            f"the model takes {len(graph.inputs)} inputs ({', '.join(graph.inputs)}), {len(inputs)} were given"
        )
    return tuple(graph.run(dict(zip(graph.inputs, inputs, strict=True)), {}, graph.outputs))


class OrtSession:
    """Graphs and vectors are made on first use: a device that only trains never holds the inference graph.

    Two sets of vectors take turns as a step's inputs and outputs, so nothing of size d is copied.
    """

    def __init__(self, runtime: Any, artifact: Artifact, threads: int) -> None:
        self._ort = runtime
        self._artifact = artifact
        self._threads = threads
        self._graphs: dict[str, _Graph] = {}
        self._theta = _Pair(runtime, artifact.manifest.parameter_count)
        self._accumulator: _Pair | None = None
        self._optimizer = ""
        self._vectors: dict[str, _Pair] = {}
        self._steps = 0

    def start(self, theta: Vector) -> None:
        self.resume(TrainingState(theta))

    def step(
        self, inputs: Sequence[Array], target: Array, hyper: Hyperparameters, *, dropout_seed: int = 0
    ) -> StepResult:
        batch = self._feeds(inputs, target, dropout_seed)
        optimizer = self._use(hyper.optimizer)
        loss, norm = self._graph(f"step_{optimizer}.onnx").run(
            {**batch, **_scalars(hyper, self._steps + 1)}, self._state(), ("loss", "grad_norm")
        )
        self._stepped()
        return StepResult(float(loss), float(norm))

    def accumulate(
        self, inputs: Sequence[Array], target: Array, *, scale: float, dropout_seed: int = 0
    ) -> float:
        feeds = {**self._feeds(inputs, target, dropout_seed), "scale": np.array(scale, np.float32)}
        accumulator = self._accumulated()
        (loss,) = self._graph("grad.onnx").run(
            feeds, {"accumulator": accumulator}, ("loss",), constants={"theta": self._theta}
        )
        accumulator.swap()
        return float(loss)

    def gradient(self) -> Vector:
        return np.array(self._accumulated().now)

    def apply(self, hyper: Hyperparameters) -> float:
        optimizer = self._use(hyper.optimizer)
        accumulator = self._accumulated()
        (norm,) = self._graph(f"apply_{optimizer}.onnx").run(
            _scalars(hyper, self._steps + 1),
            self._state(),
            ("grad_norm",),
            constants={"gradient": accumulator},
        )
        self._stepped()
        accumulator.now[:] = 0.0
        return float(norm)

    def state(self) -> TrainingState:
        vectors = tuple(np.array(pair.now) for pair in self._vectors.values())
        return TrainingState(self.theta(), self._optimizer, vectors, self._steps)

    def resume(self, state: TrainingState) -> None:
        manifest = self._artifact.manifest
        check_vector(manifest.parameter_count, state.theta)
        names = manifest.optimizers.get(state.optimizer, ())
        if len(names) != len(state.vectors) or (state.optimizer and not names):
            raise TensorError(
                f"the state has {len(state.vectors)} vectors of the optimizer {state.optimizer!r}, which the "
                f"artifact does not have: {', '.join(manifest.optimizers)}"
            )
        for vector in state.vectors:
            check_vector(manifest.trainable_count, vector)
        self._theta.now[:] = state.theta
        self._begin_with(state.optimizer)
        for pair, vector in zip(self._vectors.values(), state.vectors, strict=True):
            pair.now[:] = vector
        self._steps = state.steps
        if self._accumulator is not None:
            self._accumulator.now[:] = 0.0

    def theta(self) -> Vector:
        return np.array(self._theta.now)

    def evaluate(self, theta: Vector, inputs: Sequence[Array], target: Array) -> Evaluation:
        check_vector(self._artifact.manifest.parameter_count, theta)
        names = [spec.name for spec in self._artifact.manifest.outputs]
        feeds = {"theta": np.ascontiguousarray(theta), **self._batch(inputs, target)}
        loss, *outputs = self._graph("eval.onnx").run(feeds, {}, ("loss", *names))
        return Evaluation(float(loss), tuple(outputs))

    def infer(self, theta: Vector, inputs: Sequence[Array]) -> tuple[Array, ...]:
        check_vector(self._artifact.manifest.parameter_count, theta)
        names = [spec.name for spec in self._artifact.manifest.outputs]
        feeds = {"theta": np.ascontiguousarray(theta), **self._batch(inputs, None)}
        return tuple(self._graph("infer.onnx").run(feeds, {}, names))

    def _use(self, optimizer: str) -> str:
        """The name of the graphs of a plan's optimizer; its state begins at zero if it was another's before."""
        graphs = OPTIMIZERS[optimizer]
        if graphs not in self._artifact.manifest.optimizers:
            raise BackendError(
                f"the artifact has no optimizer {optimizer!r}, it has "
                f"{', '.join(self._artifact.manifest.optimizers)}: build it again, or change the plan"
            )
        if graphs != self._optimizer:
            self._begin_with(graphs)
        return graphs

    def _begin_with(self, graphs: str) -> None:
        manifest = self._artifact.manifest
        names = manifest.optimizers.get(graphs, ())
        self._vectors = {name: _Pair(self._ort, manifest.trainable_count) for name in names}
        self._optimizer, self._steps = graphs, 0

    def _state(self) -> dict[str, _Pair]:
        return {"theta": self._theta, **self._vectors}

    def _stepped(self) -> None:
        for pair in self._state().values():
            pair.swap()
        self._steps += 1

    def _accumulated(self) -> _Pair:
        if self._accumulator is None:
            self._accumulator = _Pair(self._ort, self._artifact.manifest.parameter_count)
        return self._accumulator

    def _feeds(self, inputs: Sequence[Array], target: Array, dropout_seed: int) -> dict[str, Array]:
        """What a graph that trains takes besides state and scalars."""
        feeds = self._batch(inputs, target)
        if self._artifact.manifest.dropout:
            feeds["dropout_seed"] = np.array(dropout_seed, np.int64)
        return feeds

    def _batch(self, inputs: Sequence[Array], target: Array | None) -> dict[str, Array]:
        check_batch(self._artifact, inputs, target)
        manifest = self._artifact.manifest
        feeds = {spec.name: array for spec, array in zip(manifest.inputs, inputs, strict=True)}
        if target is not None:
            feeds[manifest.target.name] = target
        return feeds

    def _graph(self, name: str) -> _Graph:
        if name not in self._graphs:
            self._graphs[name] = _Graph(self._ort, name, self._artifact.files[name], self._threads)
        return self._graphs[name]


class _Pair:
    """A vector of shape (d,) and its successor. On the CPU an OrtValue shares its memory with the numpy array."""

    def __init__(self, runtime: Any, d: int) -> None:
        self._arrays: list[Vector] = [np.zeros(d, np.float32), np.zeros(d, np.float32)]
        self._values = [runtime.OrtValue.ortvalue_from_numpy(array) for array in self._arrays]

    @property
    def now(self) -> Vector:
        """The current array."""
        return self._arrays[0]

    @property
    def current(self) -> Any:
        return self._values[0]

    @property
    def successor(self) -> Any:
        return self._values[1]

    def swap(self) -> None:
        self._arrays.reverse()
        self._values.reverse()


class _Graph:
    """One graph in the runtime."""

    def __init__(self, runtime: Any, name: str, model: bytes, threads: int) -> None:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.use_deterministic_compute = True
        options.log_severity_level = 3
        # The arena keeps the largest batch ever seen; a device gives memory back instead.
        options.enable_cpu_mem_arena = False
        # Idle threads must sleep: the device has other work, and a battery.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._name = name
        try:
            self._session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's errors share no public base class
            raise BackendError(
                f"onnxruntime {runtime.__version__} cannot load {name}: {_first_line(error)}"
            ) from error

    @property
    def inputs(self) -> list[str]:
        return [value.name for value in self._session.get_inputs()]

    @property
    def outputs(self) -> list[str]:
        return [value.name for value in self._session.get_outputs()]

    def run(
        self,
        feeds: dict[str, Array],
        state: dict[str, _Pair],
        fetch: Sequence[str],
        constants: dict[str, _Pair] | None = None,
    ) -> list[Array]:
        """Runs with the state read from ``<name>`` and written to ``new_<name>``; returns the fetched outputs."""
        binding = self._session.io_binding()
        try:
            for name, array in feeds.items():
                binding.bind_cpu_input(name, array)
            for name, pair in (constants or {}).items():
                binding.bind_ortvalue_input(name, pair.current)
            for name in fetch:
                binding.bind_output(name, "cpu")
            for name, pair in state.items():
                binding.bind_ortvalue_input(name, pair.current)
                binding.bind_ortvalue_output(f"new_{name}", pair.successor)
            self._session.run_with_iobinding(binding)
            results: list[Array] = binding.copy_outputs_to_cpu()[: len(fetch)]
        except Exception as error:  # the runtime's errors share no public base class
            raise BackendError(f"onnxruntime failed in {self._name}: {_first_line(error)}") from error
        return results


def _scalars(hyper: Hyperparameters, step: int) -> dict[str, Array]:
    """The inputs of the optimiser's graph (model_export.optimizers.SCALARS) for the ``step``-th step, from 1."""
    if OPTIMIZERS[hyper.optimizer] == "sgd":
        values = {
            "momentum_coefficient": hyper.momentum,
            "nesterov": float(hyper.nesterov),
            "weight_decay": hyper.weight_decay,
        }
    else:
        # The graph has the betas in float32; corrections of others would not cancel the start from zero.
        beta1, beta2 = float(np.float32(hyper.beta1)), float(np.float32(hyper.beta2))
        decoupled = hyper.optimizer == "adamw"
        values = {
            "beta1": beta1,
            "beta2": beta2,
            "epsilon": hyper.epsilon,
            "weight_decay": 0.0 if decoupled else hyper.weight_decay,
            "decoupled_weight_decay": hyper.weight_decay if decoupled else 0.0,
            "bias_correction1": 1 - beta1**step,
            "bias_correction2": 1 - beta2**step,
        }
    values |= {"learning_rate": hyper.learning_rate, "max_grad_norm": hyper.max_grad_norm}
    return {name: np.array(value, np.float32) for name, value in values.items()}


def _import_runtime() -> Any:
    install = "install it with: pip install 'fleetgrad[device]'"
    try:
        import onnxruntime  # loaded on use: the device library itself depends on no runtime
    except ImportError as error:
        raise BackendError(f"onnxruntime is not installed; {install}") from error
    version = str(onnxruntime.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_VERSION:
        needed = ".".join(map(str, MIN_VERSION))
        raise BackendError(f"onnxruntime {version} is too old, {needed} or newer is needed; {install}")
    return onnxruntime


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
