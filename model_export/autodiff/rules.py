"""The table of gradient rules: ONNX operator -> rule. Whatever is not here is refused at export, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from model_export.autodiff import convolution, elementwise, linear, pooling, reduction, shape
from model_export.autodiff.builder import Builder
from model_export.autodiff.elementwise import Gradients
from model_export.graph import Node

# (builder, forward node, gradient of its first output) -> gradient of each input, None: no gradient
Rule = Callable[[Builder, Node, str], Gradients]
MultiOutputRule = Callable[[Builder, Node, Sequence[str | None]], Gradients]

RULES: Mapping[str, Rule] = {
    # arithmetic
    "Abs": elementwise.abs_,
    "Add": elementwise.add,
    "Cos": elementwise.cos,
    "Div": elementwise.div,
    "Erf": elementwise.erf,
    "Exp": elementwise.exp,
    "Log": elementwise.log,
    "Max": elementwise.extremum,
    "Min": elementwise.extremum,
    "Mul": elementwise.mul,
    "Neg": elementwise.neg,
    "Pow": elementwise.pow_,
    "Reciprocal": elementwise.reciprocal,
    "Sin": elementwise.sin,
    "Sqrt": elementwise.sqrt,
    "Sub": elementwise.sub,
    "Sum": elementwise.add,
    # choice
    "Cast": elementwise.cast,
    "Ceil": elementwise.flat,
    "Clip": elementwise.clip,
    "Floor": elementwise.flat,
    "Identity": elementwise.identity,
    "Round": elementwise.flat,
    "Sign": elementwise.flat,
    "Where": elementwise.where,
    # activations
    "Celu": elementwise.celu,
    "Elu": elementwise.elu,
    "HardSigmoid": elementwise.hard_sigmoid,
    "HardSwish": elementwise.hard_swish,
    "LeakyRelu": elementwise.leaky_relu,
    "Mish": elementwise.mish,
    "PRelu": elementwise.prelu,
    "Relu": elementwise.relu,
    "Selu": elementwise.selu,
    "Sigmoid": elementwise.sigmoid,
    "Softplus": elementwise.softplus,
    "Tanh": elementwise.tanh,
    # matrix products
    "Gemm": linear.gemm,
    "MatMul": linear.matmul,
    # shape, order, parts
    "Concat": shape.concat,
    "Expand": shape.expand,
    "Flatten": shape.reshape,
    "Gather": shape.gather,
    "GatherElements": shape.gather_elements,
    "GatherND": shape.gather_nd,
    "Pad": shape.pad,
    "Reshape": shape.reshape,
    "Slice": shape.slice_,
    "Squeeze": shape.reshape,
    "Transpose": shape.transpose,
    "Unsqueeze": shape.reshape,
    # reductions
    "BatchNormalization": reduction.batch_normalization,
    "LayerNormalization": reduction.layer_normalization,
    "LogSoftmax": reduction.log_softmax,
    "ReduceL1": reduction.reduce_l1,
    "ReduceL2": reduction.reduce_l2,
    "ReduceLogSumExp": reduction.reduce_log_sum_exp,
    "ReduceMax": reduction.reduce_extremum,
    "ReduceMean": reduction.reduce_mean,
    "ReduceMin": reduction.reduce_extremum,
    "ReduceSum": reduction.reduce_sum,
    "ReduceSumSquare": reduction.reduce_sum_square,
    "Softmax": reduction.softmax,
    # convolution and pooling
    "AveragePool": pooling.average_pool,
    "Conv": convolution.conv,
    "GlobalAveragePool": reduction.reduce_mean,
    "MaxPool": pooling.max_pool,
}

MULTI_OUTPUT_RULES: Mapping[str, MultiOutputRule] = {
    "Split": shape.split,
}
