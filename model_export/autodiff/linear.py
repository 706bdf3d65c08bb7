"""Gradient rules of matrix products."""

from __future__ import annotations

from model_export.autodiff.builder import Builder
from model_export.autodiff.elementwise import Gradients
from model_export.graph import Node, Shape


def gemm(b: Builder, n: Node, dy: str) -> Gradients:
    """Gemm: y = alpha op(A) op(B) + beta C."""
    a, w = n.inputs[:2]
    transposed_a, transposed_b = n.attributes.get("transA", 0), n.attributes.get("transB", 0)
    alpha, beta = n.attributes.get("alpha", 1.0), n.attributes.get("beta", 1.0)
    if transposed_a:
        da = b.op("Gemm", w, dy, transA=transposed_b, transB=1, alpha=alpha)
    else:
        da = b.op("Gemm", dy, w, transB=1 - transposed_b, alpha=alpha)
    if transposed_b:
        dw = b.op("Gemm", dy, a, transA=1, transB=transposed_a, alpha=alpha)
    else:
        dw = b.op("Gemm", a, dy, transA=1 - transposed_a, alpha=alpha)
    if len(n.inputs) < 3 or not n.inputs[2]:
        return [da, dw]
    dc = b.sum_to(dy, b.shape(n.outputs[0]), b.shape(n.inputs[2]))
    return [da, dw, dc if beta == 1.0 else b.op("Mul", dc, beta)]


def matmul(b: Builder, n: Node, dy: str) -> Gradients:
    """MatMul with NumPy's broadcasting: dA = dy B^T, dB = A^T dy, each summed over what was repeated."""
    a, w = n.inputs
    shape_a, shape_w = b.shape(a), b.shape(w)
    batch = (
        b.shape(n.outputs[0])[: max(len(shape_a), len(shape_w)) - 2]
        if min(len(shape_a), len(shape_w))
        else ()
    )
    matrix_a, matrix_w = a, w  # a vector is a row on the left, a column on the right
    if len(shape_a) == 1:
        matrix_a, dy = (
            b.op("Unsqueeze", a, b.ints(0)),
            b.op("Unsqueeze", dy, b.ints(-1 if len(shape_w) == 1 else -2)),
        )
    if len(shape_w) == 1:
        matrix_w, dy = b.op("Unsqueeze", w, b.ints(1)), b.op("Unsqueeze", dy, b.ints(-1))
    rows: Shape = (1, *shape_a) if len(shape_a) == 1 else shape_a
    columns: Shape = (*shape_w, 1) if len(shape_w) == 1 else shape_w

    da = b.op("MatMul", dy, _transposed(b, matrix_w, len(columns)))
    da = b.sum_to(da, (*batch, *rows[-2:]), rows)
    if len(columns) == 2 and len(rows) > 2 and isinstance(rows[-1], int) and isinstance(columns[-1], int):
        # one product over all rows instead of one per row block and a sum
        flat_a, flat_dy = (
            b.op("Reshape", value, b.ints(-1, size))
            for value, size in ((matrix_a, rows[-1]), (dy, columns[-1]))
        )
        dw = b.op("Gemm", flat_a, flat_dy, transA=1)
    else:
        dw = b.sum_to(
            b.op("MatMul", _transposed(b, matrix_a, len(rows)), dy), (*batch, *columns[-2:]), columns
        )
    return [
        b.reshape_like(da, a) if len(shape_a) == 1 else da,
        b.reshape_like(dw, w) if len(shape_w) == 1 else dw,
    ]


def _transposed(b: Builder, value: str, rank: int) -> str:
    order = list(range(rank))
    order[-1], order[-2] = order[-2], order[-1]
    return b.op("Transpose", value, perm=order)
