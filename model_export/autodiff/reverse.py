"""The backward walk: from the loss to the parameters, one rule per node, contributions summed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from model_export.autodiff.builder import Builder
from model_export.autodiff.rules import MULTI_OUTPUT_RULES, RULES
from model_export.errors import MissingRule
from model_export.graph import Graph, Node

DETACH = "aten.detach.default"  # the torch operator behind an Identity at which gradients end


def add_gradients(graph: Graph, loss: str, parameters: Sequence[str]) -> dict[str, str]:
    """Appends the backward nodes of a scalar float32 ``loss``; returns {parameter: name of its gradient}.

    A parameter that the loss does not depend on is left out. Raises MissingRule, naming operator and module.
    """
    builder = Builder(graph)
    wanted = set(parameters)
    differentiable = _depends_on(graph, parameters)
    contributions: dict[str, list[str]] = {loss: [builder.scalar(1.0)]} if loss in differentiable else {}

    def total(name: str) -> str | None:
        parts = contributions.get(name)
        if not parts:
            return None
        if len(parts) > 1:
            parts[:] = [builder.op("Sum", *parts)]
        return parts[0]

    for node in reversed(list(graph.nodes)):
        if any(name in wanted for name in node.outputs):
            continue  # what a parameter is itself made of lies beyond it
        gradients = [total(name) if name in differentiable else None for name in node.outputs]
        if all(gradient is None for gradient in gradients):
            continue
        for name, gradient in zip(node.inputs, _apply_rule(builder, node, gradients), strict=False):
            if gradient is not None and name in differentiable:
                contributions.setdefault(name, []).append(gradient)
    totals = {name: total(name) for name in parameters}
    return {name: gradient for name, gradient in totals.items() if gradient is not None}


def _depends_on(graph: Graph, parameters: Sequence[str]) -> set[str]:
    """Floating-point values computed from the parameters: the rest has no gradient."""
    reached = set(parameters)
    for node in graph.nodes:
        if node.torch_op != DETACH and any(name in reached for name in node.inputs):
            reached.update(
                name
                for name in node.outputs
                if name and (name not in graph.types or np.issubdtype(graph.types[name].dtype, np.floating))
            )
    return reached


def _apply_rule(builder: Builder, node: Node, gradients: Sequence[str | None]) -> Sequence[str | None]:
    try:
        if multi := MULTI_OUTPUT_RULES.get(node.op):
            return multi(builder, node, gradients)
        rule = RULES.get(node.op)
        if rule is None:
            raise MissingRule("has no gradient rule")
        if gradients[0] is None:
            raise MissingRule(
                "has a gradient rule for its first output only, and the loss depends on another"
            )
        return rule(builder, node, gradients[0])
    except MissingRule as error:
        where = f"in {node.module}" if node.module else "in the model"
        origin = f" (torch: {node.torch_op})" if node.torch_op else ""
        raise MissingRule(
            f"Operator {node.op}{origin} {where} {error}. What can be done: replace it by other torch operators, "
            "keep it out of the way from the parameters to the loss (detach), or add a rule to "
            "model_export/autodiff/rules.py."
        ) from error
