"""Gradient rules of operators that move elements without computing: shape, order, parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from model_export.autodiff.builder import Builder
from model_export.autodiff.elementwise import Gradients
from model_export.errors import MissingRule
from model_export.graph import Node


def reshape(b: Builder, n: Node, dy: str) -> Gradients:
    """Reshape, Flatten, Squeeze, Unsqueeze."""
    return [b.reshape_like(dy, n.inputs[0])]


def transpose(b: Builder, n: Node, dy: str) -> Gradients:
    """Transpose."""
    order = n.attributes.get("perm") or list(range(b.rank(n.inputs[0])))[::-1]
    return [b.op("Transpose", dy, perm=[int(axis) for axis in np.argsort(order)])]


def expand(b: Builder, n: Node, dy: str) -> Gradients:
    """Expand."""
    return [b.sum_to(dy, b.shape(n.outputs[0]), b.shape(n.inputs[0]))]


def concat(b: Builder, n: Node, dy: str) -> Gradients:
    """Concat."""
    axis = n.attributes["axis"]
    if len(n.inputs) == 1:
        return [dy]
    sizes = [b.shape(name)[axis] for name in n.inputs]
    if all(isinstance(size, int) for size in sizes):
        parts = b.ints(*(size for size in sizes if isinstance(size, int)))
    else:
        lengths = [b.op("Gather", b.op("Shape", name), b.ints(axis)) for name in n.inputs]
        parts = b.op("Concat", *lengths, axis=0)
    return b.ops("Split", dy, parts, outputs=len(n.inputs), axis=axis)


def split(b: Builder, n: Node, dys: Sequence[str | None]) -> Gradients:
    """Split: parts that the loss does not use have gradient zero."""
    parts = [
        dy if dy is not None else b.zeros(b.op("Shape", output))
        for dy, output in zip(dys, n.outputs, strict=True)
    ]
    return [b.op("Concat", *parts, axis=n.attributes.get("axis", 0))]


def pad(b: Builder, n: Node, dy: str) -> Gradients:
    """Pad with a constant: negative padding takes off what padding put on."""
    if n.attributes.get("mode", "constant") != "constant":
        raise MissingRule("has a gradient rule for the mode 'constant' only")
    pads = b.value(n.inputs[1])
    if pads is None:
        raise MissingRule("has a gradient rule for padding that is known at export only")
    axes = [n.inputs[3]] if len(n.inputs) > 3 and n.inputs[3] else []
    return [b.op("Pad", dy, b.ints(*(-int(size) for size in pads)), *([""] if axes else []), *axes)]


def slice_(b: Builder, n: Node, dy: str) -> Gradients:
    """Slice with constant bounds, any step: dy is spread out by the step and padded to the old size."""
    x = n.inputs[0]
    rank = b.rank(x)
    values = [b.value(name) if name else None for name in n.inputs[1:]]
    if any(value is None and name for value, name in zip(values, n.inputs[1:], strict=True)):
        raise MissingRule("has a gradient rule for bounds that are known at export only")
    starts, ends = (value.tolist() for value in values[:2] if value is not None)
    axes = values[2].tolist() if len(values) > 2 and values[2] is not None else list(range(len(starts)))
    steps = values[3].tolist() if len(values) > 3 and values[3] is not None else [1] * len(starts)
    shape = list(b.shape(n.outputs[0]))
    pads = [0] * (2 * rank)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= rank
        (size,) = b.static(x, axis)
        taken = range(size)[start:end:step]
        first, stride = (taken.start, step) if step > 0 else (taken[-1] if taken else 0, -step)
        if step < 0:
            dy = b.op("Slice", dy, b.ints(-1), b.ints(-(size + 1)), b.ints(axis), b.ints(-1))
        if stride > 1:
            dy = _spread(b, dy, shape, axis, len(taken), stride)
            shape[axis] = len(taken) * stride
        pads[axis], pads[rank + axis] = first, size - first - len(taken) * stride
    return [b.op("Pad", dy, b.ints(*pads)) if any(pads) else dy]


def _spread(
    b: Builder, value: str, shape: list[int | str | None], axis: int, length: int, stride: int
) -> str:
    """Inserts stride - 1 zeros after each element along the axis."""
    rank = len(shape)
    gaps = [0] * (2 * (rank + 1))
    gaps[rank + 1 + axis + 1] = stride - 1
    spread = b.op("Pad", b.op("Unsqueeze", value, b.ints(axis + 1)), b.ints(*gaps))
    merged = [
        size if isinstance(size, int) else -1 for size in (*shape[:axis], length * stride, *shape[axis + 1 :])
    ]
    if merged.count(-1) > 1:
        raise MissingRule(f"needs fixed sizes, but the shape is {tuple(shape)}")
    return b.op("Reshape", spread, b.ints(*merged))


# ---- by index ---------------------------------------------------------------------------------------


def gather(b: Builder, n: Node, dy: str) -> Gradients:
    """Gather: one constant index pads; any others are added into zeros along the axis brought to the front."""
    x, indices = n.inputs
    rank, index_rank = b.rank(x), b.rank(indices)
    axis = n.attributes.get("axis", 0) % rank
    known = b.value(indices)
    if known is not None and known.ndim == 0 and isinstance(size := b.shape(x)[axis], int):
        pads = [0] * (2 * rank)
        pads[axis], pads[rank + axis] = int(known) % size, size - 1 - int(known) % size
        return [b.op("Pad", b.op("Unsqueeze", dy, b.ints(axis)), b.ints(*pads))]
    shape = b.op("Shape", x)
    if axis:
        front = [axis, *(other for other in range(rank) if other != axis)]
        shape = b.op("Gather", shape, b.ints(*front))
        dy_order = [
            *range(axis, axis + index_rank),
            *range(axis),
            *range(axis + index_rank, rank + index_rank - 1),
        ]
        dy = b.op("Transpose", dy, perm=dy_order)
    scattered = b.op("ScatterND", b.zeros(shape), b.op("Unsqueeze", indices, b.ints(-1)), dy, reduction="add")
    if axis:
        scattered = b.op("Transpose", scattered, perm=[int(position) for position in np.argsort(front)])
    return [scattered]


def gather_nd(b: Builder, n: Node, dy: str) -> Gradients:
    """GatherND without batch dimensions."""
    if n.attributes.get("batch_dims", 0):
        raise MissingRule("has a gradient rule for batch_dims = 0 only")
    x, indices = n.inputs
    return [b.op("ScatterND", b.zeros(b.op("Shape", x)), indices, dy, reduction="add")]


def gather_elements(b: Builder, n: Node, dy: str) -> Gradients:
    """GatherElements; the same element may have been taken several times."""
    x, indices = n.inputs
    axis = n.attributes.get("axis", 0)
    return [b.op("ScatterElements", b.zeros(b.op("Shape", x)), indices, dy, axis=axis, reduction="add")]
