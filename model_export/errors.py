"""Why a model makes no artifact. Every text says what, where in the model, and what can be done."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

from edge_runtime.protocol.errors import Fault, FleetgradError


class ExportError(
    FleetgradError,
    fault=Fault.MODELLER,
    remedy="follow the message; `model-export build --help` says what the function must return",
):
    """The model cannot be exported."""


class UnsupportedModel(ExportError, fault=Fault.MODELLER, remedy="change the named part of the model"):
    """Something in the model (a module, dtype, buffer, shape) is not covered by this version."""


class MissingRule(ExportError, fault=Fault.MODELLER, remedy="replace the named operator"):
    """An operator on the way from a parameter to the loss has no gradient rule, or not in this form."""


class ParityError(
    ExportError,
    fault=Fault.MODELLER,
    remedy="report it with the model: the export must never differ from torch",
):
    """The exported graphs do not compute what torch computes; no artifact was written."""


def explain(error: BaseException) -> str:
    """``Type: first line (file:line)`` of an error in the user's code, at the innermost line that is the user's."""
    text = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
    installed = [
        *(sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib")),
        str(Path(__file__).parent),
    ]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((*installed, "<"))
    ]
    return f"{text} ({frames[-1].filename}:{frames[-1].lineno})" if frames else text
