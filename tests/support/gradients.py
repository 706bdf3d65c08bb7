"""One operator, its gradient by our rule in the runtime (float32), and torch's (float64) to compare with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

from model_export.autodiff import add_gradients
from model_export.autodiff.builder import Builder
from model_export.graph import Graph, ValueType, infer_types, to_bytes
from model_export.passes import tidy

Array = npt.NDArray[Any]
Write = Callable[..., str]  # (builder, *input names) -> output name
Torch = Callable[..., torch.Tensor]

_FLOAT = np.dtype(np.float32)


def check_gradients(
    write: Write,
    function: Torch,
    arrays: Sequence[Array],
    *,
    batch: Sequence[int] = (),
    tolerance: float = 2e-5,
) -> None:
    """d sum(c * f(arrays)) / d each float32 array, for a random c, equals torch's.

    ``batch``: positions of the arrays whose first dimension is the symbol "batch" in the graph.
    """
    expected_output, cotangent, expected = _torch_gradients(function, arrays)
    names = [f"x{i}" for i in range(len(arrays))]
    differentiable = [name for name, array in zip(names, arrays, strict=True) if array.dtype == _FLOAT]
    model = to_bytes(_gradient_graph(write, names, arrays, differentiable, batch, cotangent))
    feeds = {**dict(zip(names, arrays, strict=True)), "cotangent": cotangent}
    measured = run(model, feeds)
    np.testing.assert_allclose(measured.pop("output"), expected_output, rtol=1e-4, atol=1e-4)
    assert list(measured) == [f"gradient_{name}" for name in differentiable]
    for ours, theirs in zip(measured.values(), expected, strict=True):
        assert ours.shape == theirs.shape
        scale = max(1.0, float(np.abs(theirs).max(initial=0.0)))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale)


def run(model: bytes, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs by name, on one thread of stock onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    results = session.run(None, {name: value for name, value in feeds.items() if name in wanted})
    return dict(zip([value.name for value in session.get_outputs()], results, strict=True))


def _torch_gradients(function: Torch, arrays: Sequence[Array]) -> tuple[Array, Array, list[Array]]:
    tensors = [
        torch.from_numpy(array).double().requires_grad_()
        if array.dtype == _FLOAT
        else torch.from_numpy(array)
        for array in arrays
    ]
    output = function(*tensors)
    cotangent = np.random.default_rng(0).standard_normal(tuple(output.shape)).astype(np.float32)
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    gradients = torch.autograd.grad(output, leaves, torch.from_numpy(cotangent).double())
    return output.detach().numpy(), cotangent, [gradient.numpy() for gradient in gradients]


def _gradient_graph(
    write: Write,
    names: Sequence[str],
    arrays: Sequence[Array],
    differentiable: Sequence[str],
    batch: Sequence[int],
    cotangent: Array,
) -> Graph:
    inputs = {
        name: ValueType(array.dtype, ("batch", *array.shape[1:]) if i in batch else array.shape)
        for i, (name, array) in enumerate(zip(names, arrays, strict=True))
    }
    shape = ("batch", *cotangent.shape[1:]) if batch and cotangent.ndim else cotangent.shape
    inputs["cotangent"] = ValueType(_FLOAT, shape)
    graph = Graph(inputs, {"loss": ValueType(_FLOAT, ())}, types=dict(inputs))
    builder = Builder(graph)
    output = builder.named("output", "Identity", write(builder, *names))
    builder.named("loss", "ReduceSum", builder.op("Mul", output, "cotangent"), keepdims=0)
    infer_types(graph)
    gradients = add_gradients(graph, "loss", differentiable)
    graph.outputs = {"output": ValueType(_FLOAT, shape)}
    for name in differentiable:
        Builder(graph).named(f"gradient_{name}", "Identity", gradients[name])
        graph.outputs[f"gradient_{name}"] = inputs[name]
    return tidy(graph)
