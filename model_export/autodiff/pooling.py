"""Gradient rules of pooling; spatial sizes are known at export."""

from __future__ import annotations

import numpy as np

from model_export.autodiff.builder import Builder
from model_export.autodiff.elementwise import Gradients
from model_export.errors import MissingRule
from model_export.graph import Node


def max_pool(b: Builder, n: Node, dy: str) -> Gradients:
    """MaxPool: dy is added where the operator says the maximum was (the first of equal ones, as in torch)."""
    kernel = n.attributes["kernel_shape"]
    strides = n.attributes.get("strides", [1] * len(kernel))
    if n.attributes.get("storage_order", 0):
        raise MissingRule("has a gradient rule for row-major indices only")
    x = n.inputs[0]
    dilations = n.attributes.get("dilations", [1] * len(kernel))
    _refuse_empty_windows(b, n, kernel, strides, dilations)
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    overlapping = any(stride < size for stride, size in zip(strides, reach, strict=True))
    zeros = b.zeros(b.op("Reshape", b.op("Size", x), b.ints(1)))
    where = b.op("Reshape", b.extra_output(n, 1), b.ints(-1))
    flat = b.op("Reshape", dy, b.ints(-1))
    mode = {"reduction": "add"} if overlapping else {}  # a plain store is faster
    return [b.reshape_like(b.op("ScatterElements", zeros, where, flat, axis=0, **mode), x)]


def _refuse_empty_windows(
    b: Builder, n: Node, kernel: list[int], strides: list[int], dilations: list[int]
) -> None:
    """The runtime gives a window that lies wholly in the padding an index that is no element's."""
    spatial = range(2, 2 + len(kernel))
    before = n.attributes.get("pads", [0] * len(kernel))
    sizes = zip(b.static(n.inputs[0], *spatial), b.static(n.outputs[0], *spatial), strict=True)
    for axis, (size_in, size_out) in enumerate(sizes):
        taps = np.arange(kernel[axis]) * dilations[axis] - before[axis]
        positions = np.arange(size_out)[:, None] * strides[axis] + taps
        if not ((positions >= 0) & (positions < size_in)).any(axis=1).all():
            raise MissingRule("has a window that lies wholly in the padding")


def average_pool(b: Builder, n: Node, dy: str) -> Gradients:
    """AveragePool: dy over the elements of its window, spread back by a transposed convolution with ones."""
    kernel = list(n.attributes["kernel_shape"])
    axes = len(kernel)
    strides = list(n.attributes.get("strides", [1] * axes))
    pads = list(n.attributes.get("pads", [0] * (2 * axes)))
    if n.attributes.get("auto_pad", "NOTSET") != "NOTSET" or any(
        d != 1 for d in n.attributes.get("dilations", [1])
    ):
        raise MissingRule("has a gradient rule for explicit padding and without dilation only")
    x = n.inputs[0]
    spatial = range(2, 2 + axes)
    size_in, size_out = b.static(x, *spatial), b.static(n.outputs[0], *spatial)
    counts = [
        _window_lengths(
            i, o, k, s, pads[axis], pads[axes + axis], bool(n.attributes.get("count_include_pad", 0))
        )
        for axis, (i, o, k, s) in enumerate(zip(size_in, size_out, kernel, strides, strict=True))
    ]
    divisor = np.ones((1, 1, *[1] * axes), np.float32)
    for axis, lengths in enumerate(counts):
        divisor = divisor * lengths.reshape([-1 if other == axis + 2 else 1 for other in range(2 + axes)])
    share = b.op("Mul", dy, b.constant((1.0 / divisor).astype(np.float32)))
    share = b.op("Reshape", share, b.ints(-1, 1, *size_out))  # every channel of every sample alike
    ones = b.constant(np.ones((1, 1, *kernel), np.float32))
    spread = b.op("ConvTranspose", share, ones, strides=strides)
    covered = [(o - 1) * s + k for o, k, s in zip(size_out, kernel, strides, strict=True)]
    before = [-pad for pad in pads[:axes]]
    after = [i + pad - c for i, pad, c in zip(size_in, pads[:axes], covered, strict=True)]
    if any(before) or any(after):
        spread = b.op("Pad", spread, b.ints(0, 0, *before, 0, 0, *after))
    return [b.reshape_like(spread, x)]


def _window_lengths(
    size_in: int, size_out: int, kernel: int, stride: int, before: int, after: int, count_padding: bool
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """How many elements each window averages along one axis, float32 (size_out,)."""
    low, high = (-before, size_in + after) if count_padding else (0, size_in)
    starts = np.arange(size_out) * stride - before
    return (np.minimum(starts + kernel, high) - np.maximum(starts, low)).astype(np.float32)
