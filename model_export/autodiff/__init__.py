"""Reverse mode on the ONNX graph: the gradient is a graph of standard operators too.

One rule per operator, grouped by family; ``rules.py`` is the table. Source of the method: Griewank and
Walther, Evaluating Derivatives, 2nd ed. 2008, chapter 3; the choice is in docs/decisions/0001.
"""

from model_export.autodiff.reverse import add_gradients

__all__ = ["add_gradients"]
