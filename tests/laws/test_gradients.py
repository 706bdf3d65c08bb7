"""Every rule of the table gives torch's gradient, on shapes, strides and paddings drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody does
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from model_export.autodiff.builder import Builder
from model_export.autodiff.rules import MULTI_OUTPUT_RULES, RULES
from model_export.errors import MissingRule
from tests.support.gradients import check_gradients

few = settings(max_examples=12, deadline=None, derandomize=True)
COVERED: set[str] = set()
Test = TypeVar("Test", bound=Callable[..., None])


def covers(*operators: str) -> Callable[[Test], Test]:
    COVERED.update(operators)
    return lambda test: test


def normal(*shape: int, seed: int = 0, away_from: tuple[float, ...] = ()) -> np.ndarray:
    """float32; values near a kink (``away_from``) are moved off it, where float32 and float64 might disagree."""
    values = np.random.default_rng([seed, *shape]).standard_normal(shape) * 1.5
    for kink in away_from:
        values = np.where(np.abs(values - kink) < 1e-3, kink + 0.1, values)
    return np.asarray(values, np.float32)


def op(operator: str, **attributes: Any) -> Callable[..., str]:
    return lambda b, *names: b.op(operator, *names, **attributes)


# ---- element by element -----------------------------------------------------------------------------

KINKS = (-3.0, -1.0, 0.0, 1.0, 3.0)
UNARY: dict[str, tuple[Callable[..., str], Callable[..., torch.Tensor]]] = {
    "Abs": (op("Abs"), torch.abs),
    "Celu": (op("Celu", alpha=0.7), lambda x: F.celu(x, 0.7)),
    "Clip": (lambda b, x: b.op("Clip", x, -1.0, 1.0), lambda x: x.clamp(-1, 1)),
    "Cos": (op("Cos"), torch.cos),
    "Elu": (op("Elu", alpha=0.7), lambda x: F.elu(x, 0.7)),
    "Erf": (op("Erf"), torch.erf),
    "Exp": (op("Exp"), torch.exp),
    "HardSigmoid": (op("HardSigmoid", alpha=1 / 6, beta=0.5), F.hardsigmoid),
    "HardSwish": (op("HardSwish"), F.hardswish),
    "Identity": (op("Identity"), lambda x: x.clone()),
    "LeakyRelu": (op("LeakyRelu", alpha=0.2), lambda x: F.leaky_relu(x, 0.2)),
    "Mish": (op("Mish"), F.mish),
    "Neg": (op("Neg"), torch.neg),
    "Relu": (op("Relu"), torch.relu),
    "Selu": (op("Selu"), F.selu),
    "Sigmoid": (op("Sigmoid"), torch.sigmoid),
    "Sin": (op("Sin"), torch.sin),
    "Softplus": (op("Softplus"), F.softplus),
    "Tanh": (op("Tanh"), torch.tanh),
    # positive arguments
    "Log": (lambda b, x: b.op("Log", b.op("Exp", x)), lambda x: x.exp().log()),
    "Reciprocal": (lambda b, x: b.op("Reciprocal", b.op("Exp", x)), lambda x: 1 / x.exp()),
    "Sqrt": (lambda b, x: b.op("Sqrt", b.op("Exp", x)), lambda x: x.exp().sqrt()),
    # constant almost everywhere: only the other way counts
    **{
        name: (lambda b, x, name=name: b.op("Mul", x, b.op(name, x)), lambda x, f=f: x * f(x))
        for name, f in {
            "Sign": torch.sign,
            "Floor": torch.floor,
            "Ceil": torch.ceil,
            "Round": torch.round,
        }.items()
    },
}
COVERED.update(UNARY)


@pytest.mark.parametrize("name", UNARY)
def test_the_gradient_of_an_elementwise_operator_is_that_of_torch(name: str) -> None:
    write, function = UNARY[name]
    check_gradients(write, function, [normal(3, 7, away_from=KINKS)], batch=[0])


@covers("Pow")
@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5, 2.0, 3.0, -1.0])
def test_the_gradient_of_a_power_is_that_of_torch(exponent: float) -> None:
    x = np.abs(normal(3, 4)) + 0.1
    if exponent in (0.0, 1.0, 2.0):
        x[0, 0] = 0.0
    check_gradients(lambda b, x: b.op("Pow", x, exponent), lambda x: x**exponent, [x.astype(np.float32)])


def test_a_clamp_passes_the_gradient_on_at_its_bounds_and_a_relu6_does_not() -> None:
    x = np.array([-1.0, 0.0, 3.0, 6.0, 7.0], np.float32)

    def clip(torch_op: str) -> Callable[..., str]:
        def write(b: Builder, x: str) -> str:
            y = b.op("Clip", x, 0.0, 6.0)
            b.nodes[-1].torch_op = torch_op
            return y

        return write

    check_gradients(clip("aten.clamp.default"), lambda x: x.clamp(0, 6), [x])
    check_gradients(clip("aten.hardtanh.default"), F.relu6, [x])


BINARY: dict[str, Callable[..., torch.Tensor]] = {
    "Add": torch.add,
    "Div": torch.div,
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Mul": torch.mul,
    "Sub": torch.sub,
    "Sum": torch.add,
}
COVERED.update(BINARY)


@st.composite
def broadcast_shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    full = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    keep = draw(st.lists(st.booleans(), min_size=len(full), max_size=len(full)))
    other = [size if kept else 1 for size, kept in zip(full, keep, strict=True)]
    return tuple(full), tuple(other[draw(st.integers(0, len(other))) :])


@pytest.mark.parametrize("name", BINARY)
@settings(few, max_examples=6)
@given(shapes=broadcast_shapes(), swapped=st.booleans())
def test_a_broadcast_operand_gets_the_sum_of_its_gradients(name: str, shapes: Any, swapped: bool) -> None:
    x, y = normal(*shapes[0]), normal(*shapes[1], seed=1)
    y = np.where(np.abs(y) < 0.3, np.float32(0.5), y)  # a divisor
    check_gradients(op(name), BINARY[name], [y, x] if swapped else [x, y])


def test_equal_operands_of_a_maximum_share_the_gradient() -> None:
    x = normal(5)
    check_gradients(op("Max"), torch.maximum, [x, x.copy()])


@covers("Where", "Cast", "PRelu")
def test_choice_gives_the_gradient_to_the_chosen_operand() -> None:
    condition = np.array([[True], [False], [True]])
    check_gradients(op("Where"), torch.where, [condition, normal(3, 4), normal(4, seed=1)])
    check_gradients(op("PRelu"), lambda x, a: torch.where(x > 0, x, a * x), [normal(3, 4), normal(4, seed=1)])
    check_gradients(op("Cast", to=1), lambda x: x.clone(), [normal(3)])


# ---- matrix products --------------------------------------------------------------------------------


@covers("Gemm")
@few
@given(
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, (1, 4), (4,), (3, 1), ()]),
    st.sampled_from([1.0, 0.5]),
)
def test_gemm(transposed_a: bool, transposed_b: bool, bias: tuple[int, ...] | None, factor: float) -> None:
    a, b = (
        normal(*((2, 3) if transposed_a else (3, 2))),
        normal(*((4, 2) if transposed_b else (2, 4)), seed=1),
    )
    extra = [] if bias is None else [normal(*bias, seed=2)]

    def function(a: torch.Tensor, b: torch.Tensor, *c: torch.Tensor) -> torch.Tensor:
        product = factor * ((a.T if transposed_a else a) @ (b.T if transposed_b else b))
        return product + 0.5 * c[0] if c else product

    write = op("Gemm", transA=int(transposed_a), transB=int(transposed_b), alpha=factor, beta=0.5)
    check_gradients(write, function, [a, b, *extra])


@covers("MatMul")
@pytest.mark.parametrize(
    ("left", "right", "batch"),
    [
        ((3, 2), (2, 4), [0]),
        ((5, 3, 2), (2, 4), [0]),
        ((5, 3, 2), (5, 2, 4), [0, 1]),
        ((5, 1, 3, 2), (6, 2, 4), [0]),
        ((3, 2), (5, 2, 4), []),
        ((2,), (2, 4), []),
        ((3, 2), (2,), [0]),
        ((5, 3, 2), (2,), [0]),
        ((2,), (5, 2, 4), []),
        ((2,), (2,), []),
    ],
)
def test_matmul(left: tuple[int, ...], right: tuple[int, ...], batch: list[int]) -> None:
    check_gradients(op("MatMul"), torch.matmul, [normal(*left), normal(*right, seed=1)], batch=batch)


# ---- shape, order, parts ----------------------------------------------------------------------------


@covers("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand")
def test_moving_elements_moves_the_gradient_back() -> None:
    x = normal(3, 1, 4)
    check_gradients(
        lambda b, x: b.op("Reshape", x, b.ints(-1, 2, 2)), lambda x: x.reshape(-1, 2, 2), [x], batch=[0]
    )
    check_gradients(op("Flatten", axis=1), lambda x: x.flatten(1), [x], batch=[0])
    check_gradients(lambda b, x: b.op("Squeeze", x, b.ints(1)), lambda x: x.squeeze(1), [x], batch=[0])
    check_gradients(lambda b, x: b.op("Unsqueeze", x, b.ints(-1)), lambda x: x.unsqueeze(-1), [x], batch=[0])
    check_gradients(op("Transpose", perm=[2, 0, 1]), lambda x: x.permute(2, 0, 1), [x])
    check_gradients(op("Transpose"), lambda x: x.permute(2, 1, 0), [x])
    check_gradients(lambda b, x: b.op("Expand", x, b.ints(2, 3, 5, 4)), lambda x: x.expand(2, 3, 5, 4), [x])


@covers("Concat", "Split")
def test_parts_that_are_joined_or_split_get_their_own_gradient() -> None:
    x, y = normal(3, 2), normal(3, 5, seed=1)
    check_gradients(op("Concat", axis=1), lambda *v: torch.cat(v, 1), [x, y], batch=[0, 1])
    check_gradients(op("Concat", axis=0), lambda *v: torch.cat(v, 0), [x, x + 1])

    def middle(b: Builder, x: str) -> str:  # the other parts are not used
        return b.ops("Split", x, b.ints(1, 3, 1), outputs=3, axis=1)[1]

    check_gradients(middle, lambda x: x[:, 1:4], [y], batch=[0])


@covers("Slice")
@few
@given(st.integers(-6, 6), st.integers(-6, 8), st.sampled_from([1, 2, 3, -1, -2]), st.integers(-2, -1))
def test_slice(start: int, end: int, step: int, axis: int) -> None:
    x = normal(2, 5, 6)
    size = x.shape[axis]
    taken = list(range(size))[start:end:step]
    assume(taken)
    check_gradients(
        lambda b, x: b.op("Slice", x, b.ints(start), b.ints(end), b.ints(axis), b.ints(step)),
        lambda x: x.index_select(axis, torch.tensor(taken)),
        [x],
        batch=[0],
    )


@covers("Pad")
@few
@given(st.lists(st.integers(-1, 2), min_size=4, max_size=4))
def test_pad_and_crop(pads: list[int]) -> None:
    top, left, bottom, right = pads
    check_gradients(
        lambda b, x: b.op("Pad", x, b.ints(0, top, left, 0, bottom, right)),
        lambda x: F.pad(x, (left, right, top, bottom)),
        [normal(2, 4, 5)],
        batch=[0],
    )


@covers("Gather", "GatherND", "GatherElements")
def test_elements_taken_by_index_several_times_get_the_sum() -> None:
    x, rows = normal(4, 5, 3), np.array([[2, 0], [2, 3]])
    check_gradients(op("Gather", axis=0), lambda x, i: x[i], [x, rows])
    check_gradients(op("Gather", axis=1), lambda x, i: x[:, i], [x, rows], batch=[0])
    check_gradients(op("Gather", axis=2), lambda x, i: x[:, :, i], [x, np.array([1, 1, 0])], batch=[0])
    for index in (1, -1):
        check_gradients(
            lambda b, x, index=index: b.op("Gather", x, b.constant(np.array(index)), axis=1),
            lambda x, index=index: x[:, index],
            [x],
            batch=[0],
        )
    check_gradients(op("GatherND"), lambda x, i: x[i[:, 0], i[:, 1]], [x, rows])
    columns = np.array([[0, 0, 2], [1, 1, 1], [4, 0, 3], [2, 2, 2]])[:, :, None]
    check_gradients(op("GatherElements", axis=1), lambda x, i: x.gather(1, i), [x, columns], batch=[0, 1])


# ---- reductions -------------------------------------------------------------------------------------

REDUCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep),
    "ReduceL2": lambda x, axes, keep: x.norm(2, axes, keep),
    "ReduceLogSumExp": lambda x, axes, keep: x.logsumexp(axes, keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keep),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep),
    "ReduceSumSquare": lambda x, axes, keep: (x**2).sum(axes, keep),
}
COVERED.update(REDUCTIONS)


@pytest.mark.parametrize("name", REDUCTIONS)
@settings(few, max_examples=4)
@given(axes=st.sets(st.integers(-2, -1) | st.just(0), min_size=1), keep=st.booleans())
def test_a_reduction_spreads_its_gradient(name: str, axes: set[int], keep: bool) -> None:
    x = normal(3, 4, 5, away_from=(0.0,))
    x[0, 0, :2] = 4.0  # a tie for the maximum
    chosen = sorted(axes)
    check_gradients(
        lambda b, x: b.op(name, x, b.ints(*chosen), keepdims=int(keep)),
        lambda x: REDUCTIONS[name](x, chosen, keep),
        [x],
        batch=[0] if 0 not in axes else [],
    )


@covers("Softmax", "LogSoftmax", "LayerNormalization")
@pytest.mark.parametrize("axis", [1, -1])
def test_normalisations(axis: int) -> None:
    x = normal(3, 4, 5)
    check_gradients(op("Softmax", axis=axis), lambda x: x.softmax(axis), [x], batch=[0])
    check_gradients(op("LogSoftmax", axis=axis), lambda x: x.log_softmax(axis), [x], batch=[0])
    shape = x.shape[axis:]
    check_gradients(
        op("LayerNormalization", axis=axis, epsilon=1e-5),
        lambda x, w, b: F.layer_norm(x, shape, w, b),
        [x, normal(*shape, seed=1), normal(*shape, seed=2)],
        batch=[0],
    )


@covers("BatchNormalization")
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (2, 3, 4, 5)])
def test_batch_normalisation_by_given_statistics(shape: tuple[int, ...]) -> None:
    channels = shape[1]
    mean, variance = normal(channels, seed=3), np.abs(normal(channels, seed=4)) + 0.1
    check_gradients(
        lambda b, *names: b.op(
            "BatchNormalization", *names, b.constant(mean), b.constant(variance), epsilon=1e-3
        ),
        lambda x, w, b: F.batch_norm(
            x, torch.from_numpy(mean).double(), torch.from_numpy(variance).double(), w, b, eps=1e-3
        ),
        [normal(*shape), normal(channels, seed=1), normal(channels, seed=2)],
        batch=[0],
    )


def test_batch_normalisation_in_training_mode_is_refused() -> None:
    def write(b: Builder, *names: str) -> str:
        x, w, bias = names
        return b.ops("BatchNormalization", x, w, bias, w, bias, outputs=3, training_mode=1)[0]

    with pytest.raises(MissingRule, match="given statistics only"):
        check_gradients(
            write,
            lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
            [normal(3, 4), normal(4, seed=1), normal(4, seed=2)],
        )


# ---- convolution and pooling ------------------------------------------------------------------------


@st.composite
def windows(draw: st.DrawFn, pooling: bool = False, max_dilation: int = 2) -> dict[str, Any]:
    """Kernel, dilation, padding, stride and image size of two axes, such that there is an output."""
    kernel = [draw(st.integers(1, 3)) for _ in range(2)]
    dilation = [draw(st.integers(1, max_dilation)) for _ in range(2)]
    padding = [draw(st.integers(0, size // 2 if pooling else 2)) for size in kernel]
    stride = [draw(st.integers(1, 3)) for _ in range(2)]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [draw(st.integers(max(r - 2 * p, 1), 8)) for r, p in zip(reach, padding, strict=True)]
    return {"kernel": kernel, "dilation": dilation, "padding": padding, "stride": stride, "size": size}


@covers("Conv")
@settings(few, max_examples=40)
@given(windows(), st.sampled_from([(1, 3, 2), (2, 4, 6), (4, 4, 4), (2, 2, 4), (1, 1, 1)]), st.booleans())
def test_convolution(window: dict[str, Any], channels: tuple[int, int, int], bias: bool) -> None:
    groups, ins, outs = channels
    x, w = normal(3, ins, *window["size"]), normal(outs, ins // groups, *window["kernel"], seed=1)
    check_gradients(
        op(
            "Conv",
            kernel_shape=window["kernel"],
            strides=window["stride"],
            pads=window["padding"] * 2,
            dilations=window["dilation"],
            group=groups,
        ),
        lambda x, w, *b: F.conv2d(
            x, w, *(b or [None]), window["stride"], window["padding"], window["dilation"], groups
        ),
        [x, w, *([normal(outs, seed=2)] if bias else [])],
        batch=[0],
    )


@settings(few, max_examples=6)
@given(st.integers(1, 3), st.integers(0, 2), st.integers(1, 2))
def test_convolution_of_one_axis(stride: int, padding: int, dilation: int) -> None:
    check_gradients(
        op("Conv", kernel_shape=[3], strides=[stride], pads=[padding] * 2, dilations=[dilation]),
        lambda x, w: F.conv1d(x, w, None, stride, padding, dilation),
        [normal(2, 3, 9), normal(4, 3, 3, seed=1)],
        batch=[0],
    )


def sees_the_image(window: dict[str, Any]) -> bool:
    """Every window, also the last one of ceil_mode, begins before the end and has a tap inside the image."""
    for kernel, dilation, padding, stride, size in zip(*window.values(), strict=True):
        taps = np.arange(kernel) * dilation - padding
        count = -(-(size + 2 * padding - (kernel - 1) * dilation - 1) // stride) + 1
        positions = np.arange(count)[:, None] * stride + taps
        if (count - 1) * stride >= size + padding or not ((positions >= 0) & (positions < size)).any(1).all():
            return False
    return True


@covers("MaxPool")
@few
@given(windows(pooling=True).filter(sees_the_image), st.booleans())
def test_max_pooling(window: dict[str, Any], ceil: bool) -> None:
    geometry = (window["kernel"], window["stride"], window["padding"], window["dilation"])
    check_gradients(
        op(
            "MaxPool",
            kernel_shape=window["kernel"],
            strides=window["stride"],
            pads=window["padding"] * 2,
            dilations=window["dilation"],
            ceil_mode=int(ceil),
        ),
        lambda x: F.max_pool2d(x, *geometry, ceil_mode=ceil),
        [normal(2, 3, *window["size"])],
        batch=[0],
    )


@covers("AveragePool", "GlobalAveragePool")
@few
@given(windows(pooling=True, max_dilation=1).filter(sees_the_image), st.booleans(), st.booleans())
def test_average_pooling(window: dict[str, Any], ceil: bool, count_padding: bool) -> None:
    kernel, stride, padding = window["kernel"], window["stride"], window["padding"]
    x = normal(2, 3, *window["size"])
    check_gradients(
        op(
            "AveragePool",
            kernel_shape=kernel,
            strides=stride,
            pads=padding * 2,
            ceil_mode=int(ceil),
            count_include_pad=int(count_padding),
        ),
        lambda x: F.avg_pool2d(x, kernel, stride, padding, ceil, count_padding),
        [x],
        batch=[0],
    )
    check_gradients(op("GlobalAveragePool"), lambda x: x.mean((2, 3), keepdim=True), [x], batch=[0])


def test_no_rule_goes_untested() -> None:
    assert {*RULES, *MULTI_OUTPUT_RULES} == COVERED


def test_a_pooling_window_in_the_padding_is_refused() -> None:
    write = op("MaxPool", kernel_shape=[2], strides=[1], pads=[1, 1], dilations=[2])
    with pytest.raises(MissingRule, match="wholly in the padding"):
        check_gradients(write, lambda x: F.max_pool1d(x, 2, 1, 1, 2), [normal(1, 1, 1)])
