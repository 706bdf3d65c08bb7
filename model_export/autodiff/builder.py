"""Writes nodes into a graph: what gradient rules, decompositions and training graphs are made with."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from model_export.errors import MissingRule
from model_export.graph import Array, Dimension, Graph, Node, Shape

Operand = str | float


class Builder:
    """Appends to ``nodes``, the graph's own unless a pass rewrites into another list.

    An operand is the name of a value, or a Python float, which becomes a float32 constant.
    """

    def __init__(self, graph: Graph, nodes: list[Node] | None = None) -> None:
        self.graph = graph
        self.nodes = graph.nodes if nodes is None else nodes
        self._taken = set(graph.names())
        self._counter = itertools.count()

    # ---- nodes --------------------------------------------------------------------------------------

    def op(self, op: str, *inputs: Operand, **attributes: Any) -> str:
        """A node with one output; returns the output's name."""
        return self.ops(op, *inputs, outputs=1, **attributes)[0]

    def ops(self, op: str, *inputs: Operand, outputs: int, **attributes: Any) -> list[str]:
        """A node with several outputs."""
        names = [self._fresh() for _ in range(outputs)]
        operands = [operand if isinstance(operand, str) else self.scalar(operand) for operand in inputs]
        self.nodes.append(Node(op, operands, list(names), attributes))
        return names

    def named(self, output: str, op: str, *inputs: Operand, **attributes: Any) -> str:
        """A node whose output has a given name."""
        self.op(op, *inputs, **attributes)
        self.nodes[-1].outputs = [output]
        return output

    def extra_output(self, node: Node, index: int) -> str:
        """The name of an optional output of a node that is already there; switched on if it was not."""
        while len(node.outputs) <= index:
            node.outputs.append("")
        node.outputs[index] = node.outputs[index] or self._fresh()
        return node.outputs[index]

    # ---- constants ----------------------------------------------------------------------------------

    def constant(self, value: Array) -> str:
        """A constant of the array's dtype and shape. Equal ones become one later (passes)."""
        name = self._fresh()
        self.graph.constants[name] = value
        return name

    def scalar(self, value: float) -> str:
        """float32 of shape ()."""
        return self.constant(np.array(value, np.float32))

    def ints(self, *values: int) -> str:
        """int64 of shape (n,)."""
        return self.constant(np.array(values, np.int64))

    # ---- what is known ------------------------------------------------------------------------------

    def value(self, name: str) -> Array | None:
        """A constant's value; None if the value is computed."""
        return self.graph.constants.get(name)

    def shape(self, name: str) -> Shape:
        """The shape shape inference found. Raises MissingRule if it found none."""
        if name in self.graph.constants:
            return self.graph.constants[name].shape
        kind = self.graph.types.get(name)
        if kind is None:
            raise MissingRule("needs a value whose rank is not known when the model is exported")
        return kind.shape

    def rank(self, name: str) -> int:
        """Number of dimensions."""
        return len(self.shape(name))

    def static(self, name: str, *axes: int) -> list[int]:
        """Dimensions that must be known at export: all but the batch usually are. Raises MissingRule."""
        shape = self.shape(name)
        known = [size for axis in axes if isinstance(size := shape[axis], int)]
        if len(known) != len(axes):
            raise MissingRule(f"needs fixed sizes on axes {list(axes)}, but the shape is {shape}")
        return known

    # ---- shapes of gradients ------------------------------------------------------------------------

    def zeros(self, shape: str) -> str:
        """float32 zeros of a shape that is a value, int64 (rank,)."""
        return self.op("ConstantOfShape", shape, value=np.zeros(1, np.float32))

    def reshape(self, value: str, shape: Shape, like: str) -> str:
        """``value`` in ``shape``, which is that of ``like``: from the graph where it is not known now."""
        unknown = sum(not isinstance(size, int) for size in shape)
        if unknown <= 1 and 0 not in shape:
            return self.op(
                "Reshape", value, self.ints(*(size if isinstance(size, int) else -1 for size in shape))
            )
        return self.op("Reshape", value, self.op("Shape", like))

    def reshape_like(self, value: str, like: str) -> str:
        """``value`` in the shape of ``like``."""
        return self.reshape(value, self.shape(like), like)

    def sum_to(self, value: str, shape: Shape, target: Shape) -> str:
        """Undoes broadcasting: sums ``value`` of ``shape`` over the axes along which ``target`` was repeated."""
        extra = len(shape) - len(target)
        repeated = [
            axis
            for axis, size in enumerate(shape)
            if axis < extra
            or (target[axis - extra] == 1 and size != 1)
            or _differ(size, target[axis - extra])
        ]
        if any(_differ(shape[axis], target[axis - extra]) for axis in repeated if axis >= extra):
            raise MissingRule(f"cannot tell how {target} was broadcast to {shape}")
        if not repeated:
            return value
        only_extra = repeated == list(range(extra))
        value = self.op("ReduceSum", value, self.ints(*repeated), keepdims=0 if only_extra else 1)
        if extra and not only_extra:
            value = self.op("Squeeze", value, self.ints(*range(extra)))
        return value

    def _fresh(self) -> str:
        name = next(name for i in self._counter if (name := f"%{i}") not in self._taken)
        self._taken.add(name)
        return name


def _differ(size: Dimension, target: Dimension) -> bool:
    """A fixed size against a symbol: the symbol might be 1 when the graph runs."""
    return isinstance(size, int) and size != 1 and isinstance(target, str)
