"""Passes over a graph, each a function that changes it in place and keeps what it computes."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from model_export.graph import Graph, Node

_RANDOM = ("Bernoulli", "Dropout", "Multinomial", "Random")


def tidy(graph: Graph, keep: Collection[str] = ()) -> Graph:
    """All passes, in the one order that makes them complete. ``keep``: values that hold their names."""
    drop_identities(graph, keep)
    merge_equal_constants(graph)
    merge_equal_nodes(graph, keep)
    remove_dead_code(graph)
    name_canonically(graph, keep)
    return graph


def drop_identities(graph: Graph, keep: Collection[str] = ()) -> None:
    """Identity nodes whose output is neither an output of the graph nor kept."""
    names: dict[str, str] = {}
    nodes = []
    for node in graph.nodes:
        node.inputs = [names.get(name, name) for name in node.inputs]
        if node.op == "Identity" and node.outputs[0] not in graph.outputs and node.outputs[0] not in keep:
            names[node.outputs[0]] = node.inputs[0]
        else:
            nodes.append(node)
    graph.nodes = nodes


def merge_equal_constants(graph: Graph) -> None:
    """One constant for each dtype, shape and value."""
    first: dict[tuple[str, tuple[int, ...], bytes], str] = {}
    names: dict[str, str] = {}
    for name, value in graph.constants.items():
        names[name] = first.setdefault((value.dtype.str, value.shape, value.tobytes()), name)
    for node in graph.nodes:
        node.inputs = [names.get(name, name) for name in node.inputs]
    graph.constants = {name: value for name, value in graph.constants.items() if names[name] == name}


def merge_equal_nodes(graph: Graph, keep: Collection[str] = ()) -> None:
    """Common subexpressions: nodes of one operator, inputs and attributes become the first of them."""
    first: dict[tuple[object, ...], Node] = {}
    names: dict[str, str] = {}
    nodes = []
    for node in graph.nodes:
        node.inputs = [names.get(name, name) for name in node.inputs]
        attributes = tuple(
            (name, value.tobytes() if isinstance(value, np.ndarray) else repr(value))
            for name, value in sorted(node.attributes.items())
        )
        key = (node.op, tuple(node.inputs), attributes, tuple(bool(name) for name in node.outputs))
        fixed = node.op.startswith(_RANDOM) or any(
            name in graph.outputs or name in keep for name in node.outputs
        )
        if not fixed and key in first:
            names.update(zip(node.outputs, first[key].outputs, strict=True))
        else:
            first.setdefault(key, node)
            nodes.append(node)
    graph.nodes = nodes


def remove_dead_code(graph: Graph) -> None:
    """Nodes, optional outputs and constants that no output of the graph depends on."""
    used = set(graph.outputs)
    nodes = []
    for node in reversed(graph.nodes):
        if not any(name in used for name in node.outputs):
            continue
        if node.op not in ("Split",):  # all parts of a split must be named
            node.outputs = [name if name in used else "" for name in node.outputs]
            while not node.outputs[-1]:
                node.outputs.pop()
        used.update(name for name in node.inputs if name)
        nodes.append(node)
    graph.nodes = nodes[::-1]
    graph.constants = {name: value for name, value in graph.constants.items() if name in used}


def name_canonically(graph: Graph, keep: Collection[str] = ()) -> None:
    """Numbers values v0, v1, ... and constants c0, c1, ... in the order of the nodes; sorts the constants so."""
    fixed = {*graph.inputs, *graph.outputs, *keep, ""}
    names: dict[str, str] = {name: name for name in fixed}
    counters = {"c": 0, "v": 0}

    def number(name: str, letter: str) -> None:
        while name not in names:
            candidate = f"{letter}{counters[letter]}"
            counters[letter] += 1
            if candidate not in fixed:
                names[name] = candidate

    order: list[str] = []
    for node in graph.nodes:
        for name in node.inputs:
            if name in graph.constants and name not in order:
                order.append(name)
            number(name, "c" if name in graph.constants else "v")
        for name in node.outputs:
            number(name, "v")
    graph.constants = {name: graph.constants[name] for name in order}
    graph.rename(names)
