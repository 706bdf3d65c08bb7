"""Gradient rules of convolutions with any number of spatial axes; sizes but the batch are known at export."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model_export.autodiff.builder import Builder
from model_export.autodiff.elementwise import Gradients
from model_export.errors import MissingRule
from model_export.graph import Node


@dataclass(frozen=True)
class _Geometry:
    """A convolution from (batch, channels_in, *size_in) to (batch, channels_out, *size_out)."""

    groups: int
    channels_in: int
    channels_out: int
    kernel: list[int]
    stride: list[int]
    dilation: list[int]
    before: list[int]  # padding
    after: list[int]
    size_in: list[int]
    size_out: list[int]

    @property
    def spatial(self) -> list[int]:
        return list(range(2, 2 + len(self.kernel)))

    @property
    def reach(self) -> list[int]:
        """How far the kernel extends beyond its first tap."""
        return [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]


def _geometry(b: Builder, n: Node) -> _Geometry:
    if n.attributes.get("auto_pad", "NOTSET") != "NOTSET":
        raise MissingRule("has a gradient rule for explicit padding only")
    x, weight = n.inputs[:2]
    channels_out, per_group, *kernel = b.static(weight, *range(b.rank(weight)))
    axes = len(kernel)
    spatial = range(2, 2 + axes)
    groups = n.attributes.get("group", 1)
    pads = n.attributes.get("pads", [0] * (2 * axes))
    return _Geometry(
        groups,
        per_group * groups,
        channels_out,
        kernel,
        list(n.attributes.get("strides", [1] * axes)),
        list(n.attributes.get("dilations", [1] * axes)),
        list(pads[:axes]),
        list(pads[axes:]),
        b.static(x, *spatial),
        b.static(n.outputs[0], *spatial),
    )


def conv(b: Builder, n: Node, dy: str) -> Gradients:
    """Conv, with strides, padding, dilation and groups."""
    x, weight = n.inputs[:2]
    geometry = _geometry(b, n)
    gradients = [_input_gradient(b, geometry, dy, weight), _weight_gradient(b, geometry, x, dy)]
    if len(n.inputs) > 2:
        gradients.append(b.op("ReduceSum", dy, b.ints(0, *geometry.spatial), keepdims=0))
    return gradients


def _input_gradient(b: Builder, g: _Geometry, dy: str, weight: str) -> str:
    before = [reach - pad for reach, pad in zip(g.reach, g.before, strict=True)]
    after = [reach - pad for reach, pad in zip(g.reach, g.after, strict=True)]
    if all(stride == 1 for stride in g.stride) and min(before + after) >= 0:
        # stride 1: a convolution with the turned kernel, which the runtime does faster than ConvTranspose
        return b.op(
            "Conv", dy, _turned(b, g, weight), group=g.groups, dilations=g.dilation, pads=before + after
        )
    reached = [
        (out - 1) * stride + reach + 1 - pads
        for out, stride, reach, pads in zip(
            g.size_out,
            g.stride,
            g.reach,
            [i + j for i, j in zip(g.before, g.after, strict=True)],
            strict=True,
        )
    ]
    missing = [size - covered for size, covered in zip(g.size_in, reached, strict=True)]
    return b.op(
        "ConvTranspose",
        dy,
        weight,
        group=g.groups,
        strides=g.stride,
        dilations=g.dilation,
        pads=g.before + g.after,
        output_padding=missing,
    )


def _turned(b: Builder, g: _Geometry, weight: str) -> str:
    """The kernel reversed along its spatial axes, inputs and outputs exchanged within each group."""
    axes = len(g.kernel)
    if any(size > 1 for size in g.kernel):
        last = [-1] * axes
        weight = b.op(
            "Slice", weight, b.ints(*last), b.ints(*[-(2**31)] * axes), b.ints(*g.spatial), b.ints(*last)
        )
    if g.groups == 1:
        return b.op("Transpose", weight, perm=[1, 0, *g.spatial])
    ins, outs = g.channels_in // g.groups, g.channels_out // g.groups
    if ins == outs == 1:
        return weight
    grouped = b.op("Reshape", weight, b.ints(g.groups, outs, ins, *g.kernel))
    exchanged = b.op("Transpose", grouped, perm=[0, 2, 1, *(axis + 1 for axis in g.spatial)])
    return b.op("Reshape", exchanged, b.ints(g.groups * ins, outs, *g.kernel))


def _weight_gradient(b: Builder, g: _Geometry, x: str, dy: str) -> str:
    """One strided slice of the padded input per kernel tap, then one matrix product over batch and positions."""
    ins, outs = g.channels_in // g.groups, g.channels_out // g.groups
    depthwise = ins == outs == 1
    if any(g.before) or any(g.after):
        x = b.op("Pad", x, b.ints(0, 0, *g.before, 0, 0, *g.after))
    if not depthwise:
        x = b.op("Transpose", x, perm=[1, 0, *g.spatial])
    taps = [_tap(b, g, x, offset) for offset in np.ndindex(*g.kernel)]
    if depthwise:  # a product and a sum per tap
        sums = [b.op("ReduceSum", b.op("Mul", tap, dy), b.ints(0, *g.spatial), keepdims=0) for tap in taps]
        stacked = b.op("Concat", *(b.op("Unsqueeze", total, b.ints(1)) for total in sums), axis=1)
        return b.op("Reshape", stacked, b.ints(g.channels_out, 1, *g.kernel))
    # rows (outs, batch * positions) times columns (taps * ins, batch * positions) transposed, in each group
    columns = [b.op("Reshape", tap, b.ints(g.groups, ins, -1)) for tap in taps]
    joined = columns[0] if len(columns) == 1 else b.op("Concat", *columns, axis=1)
    rows = b.op("Transpose", dy, perm=[1, 0, *g.spatial])
    if g.groups == 1:
        joined = b.op("Reshape", joined, b.ints(len(taps) * ins, -1))
        product = b.op("Gemm", b.op("Reshape", rows, b.ints(outs, -1)), joined, transB=1)
    else:
        rows = b.op("Reshape", rows, b.ints(g.groups, outs, -1))
        product = b.op("MatMul", rows, b.op("Transpose", joined, perm=[0, 2, 1]))
    product = b.op("Reshape", product, b.ints(g.channels_out, len(taps), ins))
    return b.op("Reshape", b.op("Transpose", product, perm=[0, 2, 1]), b.ints(g.channels_out, ins, *g.kernel))


def _tap(b: Builder, g: _Geometry, padded: str, offset: tuple[int, ...]) -> str:
    """What one kernel tap sees at every output position: (., ., *size_out)."""
    starts = [index * d for index, d in zip(offset, g.dilation, strict=True)]
    ends = [start + (out - 1) * s + 1 for start, out, s in zip(starts, g.size_out, g.stride, strict=True)]
    return b.op("Slice", padded, b.ints(*starts), b.ints(*ends), b.ints(*g.spatial), b.ints(*g.stride))
