"""Stock ONNX Runtime, CPU, through IO binding. The only module that imports onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edge_runtime.backends.base import (
    Array,
    BackendError,
    Evaluation,
    StepResult,
    TrainingSession,
    check_batch,
)
from edge_runtime.protocol.artifact import Artifact
from edge_runtime.protocol.tensors import Vector, check_vector

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
    """Graphs are loaded on first use: a device that only trains never holds the inference graph.

    Two sets of vectors take turns as a step's inputs and outputs, so nothing of size d is copied.
    """

    def __init__(self, runtime: Any, artifact: Artifact, threads: int) -> None:
        self._ort = runtime
        self._artifact = artifact
        self._threads = threads
        self._graphs: dict[str, _Graph] = {}
        d = artifact.manifest.parameter_count
        self._theta, self._momentum, self._accumulator = (_Pair(runtime, d) for _ in range(3))

    def start(self, theta: Vector) -> None:
        check_vector(self._artifact.manifest.parameter_count, theta)
        self._theta.now[:] = theta
        self._momentum.now[:] = 0.0
        self._accumulator.now[:] = 0.0

    def step(
        self,
        inputs: Sequence[Array],
        target: Array,
        *,
        learning_rate: float,
        momentum: float,
        max_grad_norm: float,
    ) -> StepResult:
        scalars = _rates(learning_rate, momentum, max_grad_norm)
        graph = self._graph("step_sgd.onnx")
        feeds = {**self._feeds(inputs, target), **scalars}
        loss, norm = graph.run(
            feeds, {"theta": self._theta, "momentum": self._momentum}, ("loss", "grad_norm")
        )
        self._theta.swap()
        self._momentum.swap()
        return StepResult(float(loss), float(norm))

    def accumulate(self, inputs: Sequence[Array], target: Array, *, scale: float) -> float:
        feeds = {**self._feeds(inputs, target), "scale": np.array(scale, np.float32)}
        (loss,) = self._graph("grad.onnx").run(
            feeds, {"accumulator": self._accumulator}, ("loss",), constants={"theta": self._theta}
        )
        self._accumulator.swap()
        return float(loss)

    def gradient(self) -> Vector:
        return np.array(self._accumulator.now)

    def apply(self, *, learning_rate: float, momentum: float, max_grad_norm: float) -> float:
        (norm,) = self._graph("apply_sgd.onnx").run(
            _rates(learning_rate, momentum, max_grad_norm),
            {"theta": self._theta, "momentum": self._momentum},
            ("grad_norm",),
            constants={"gradient": self._accumulator},
        )
        self._theta.swap()
        self._momentum.swap()
        self._accumulator.now[:] = 0.0
        return float(norm)

    def theta(self) -> Vector:
        return np.array(self._theta.now)

    def evaluate(self, theta: Vector, inputs: Sequence[Array], target: Array) -> Evaluation:
        check_vector(self._artifact.manifest.parameter_count, theta)
        names = [spec.name for spec in self._artifact.manifest.outputs]
        feeds = {"theta": np.ascontiguousarray(theta), **self._feeds(inputs, target)}
        loss, *outputs = self._graph("eval.onnx").run(feeds, {}, ("loss", *names))
        return Evaluation(float(loss), tuple(outputs))

    def infer(self, theta: Vector, inputs: Sequence[Array]) -> tuple[Array, ...]:
        check_vector(self._artifact.manifest.parameter_count, theta)
        names = [spec.name for spec in self._artifact.manifest.outputs]
        feeds = {"theta": np.ascontiguousarray(theta), **self._feeds(inputs, None)}
        return tuple(self._graph("infer.onnx").run(feeds, {}, names))

    def _feeds(self, inputs: Sequence[Array], target: Array | None) -> dict[str, Array]:
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


def _rates(learning_rate: float, momentum: float, max_grad_norm: float) -> dict[str, Array]:
    return {
        "learning_rate": np.array(learning_rate, np.float32),
        "momentum_coefficient": np.array(momentum, np.float32),
        "max_grad_norm": np.array(max_grad_norm, np.float32),
    }


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
