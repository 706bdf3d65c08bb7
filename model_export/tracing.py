"""What torch's exporter assumed about the batch, and why it failed, in words for the model's author."""

from __future__ import annotations

import re
import traceback
from typing import Any

from torch.export import ExportedProgram
from torch.utils._sympy.numbers import int_oo

from model_export.errors import UnsupportedModel, explain

# a batch of 1 is not among them: tracing always sets it apart, and the parity check runs it
_SIZES = (*range(2, 600), 1000, 1024, 4096, 10_007, 1 << 16, 1 << 20)


def check_any_batch(program: ExportedProgram) -> None:
    """Raises UnsupportedModel if the traced program holds for some batch sizes only.

    ``if x.shape[0] > 16`` traces into one branch; what remains of it is an assertion or a range on the symbol.
    """
    for value in program.range_constraints.values():
        if value.upper != int_oo or value.lower > 2:
            raise _branches(f"between {value.lower} and {value.upper}")
    environments = {
        id(mode): mode.shape_env
        for node in program.graph.nodes
        if (mode := getattr(node.meta.get("val"), "fake_mode", None)) is not None
    }
    for environment in environments.values():
        if environment is None:
            continue
        for assertion in (a for group in environment.deferred_runtime_asserts.values() for a in group):
            if not all(_holds(assertion.expr, size) for size in _SIZES):
                raise _branches(f"where {assertion.expr}")


def _holds(condition: Any, batch: int) -> bool:
    """A sympy relation with every symbol at ``batch``: all of them stand for it."""
    return str(condition.subs(dict.fromkeys(condition.free_symbols, batch))) != "False"


def _branches(where: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the model does something else at other batch sizes (what was traced holds {where}): a branch or a size "
        "in forward() depends on x.shape[0]; devices use any batch size, so take that out"
    )


def _module_of_node(chain: list[BaseException]) -> str:
    """`` in <module>``: the exporter names only the node, but the node it was at is in its stack."""
    for error in chain:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            stack = getattr(frame.f_locals.get("node"), "meta", {}).get("nn_module_stack")
            if stack:
                path, kind = list(stack.values())[-1]
                kind = str(kind).rpartition(".")[2].removesuffix("'>")
                path = str(path).removeprefix("L['self'].").removeprefix("module").removeprefix(".")
                return (
                    " in the loss"
                    if kind == "_WithLoss"
                    else f" in {path} ({kind})"
                    if path
                    else f" in {kind}"
                )
    return ""


def export_failure(error: BaseException) -> str:
    """What failed, where in the user's code, and the remedy. The exporter wraps errors in pages of advice."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    cause = chain[-1]
    kind = type(cause).__name__
    if kind == "DispatchError":
        operator = re.search(r"op='([\w.]+)'", str(cause))
        where = _module_of_node(chain)
        return (
            f"torch has no ONNX form of the operator {operator[1] if operator else cause}{where}. What can be "
            "done: replace it by other torch operators"
        )
    if kind == "GuardOnDataDependentSymNode" or re.search(
        r"data-dependent|dynamic control flow", str(cause), re.I
    ):
        told = re.search(r'File "([^"]+)", line (\d+)', str(cause))
        place = f"{told[1]}:{told[2]}" if told else explain(cause)
        return (
            f"the model branches on the values of a tensor, or needs one as a Python number ({place}): only one "
            "branch can be exported. Use torch.where, or take the branch out"
        )
    return f"torch cannot export the model for any batch size: {explain(cause)}"
