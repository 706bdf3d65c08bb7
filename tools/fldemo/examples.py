"""The examples the demo can train, one table: data, plan, what is measured and what is demanded of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_runtime.protocol.plan import Plan
from fldemo.data import (
    DIAGNOSES,
    Samples,
    Split,
    load_breast_cancer_split,
    load_digits_split,
    write_images,
    write_patients,
)

Outputs = npt.NDArray[np.float32]
Classes = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How good outputs, the model's (n, classes) or (n, 1) logits, are for int64 labels (n,).

    ``score``: in [0, 1], 1 is best. ``error``: standard error of a score on these labels. ``classes``: predictions.
    """

    name: str
    score: Callable[[Outputs, Classes], float]
    error: Callable[[float, Classes], float]
    classes: Callable[[Outputs], Classes]


@dataclass(frozen=True, kw_only=True)
class Example:
    """``name``: its folder under ``examples/``. ``rounds``: versions to make. ``sample``: what a row is, plural.

    ``limit_points``: hundredths by which the federated score may be below central training, and one standard error.
    ``load``: by count of devices and seed. ``write``: a device's data into its folder; returns its [data] settings.
    """

    name: str
    sample: str
    class_names: tuple[str, ...]
    metric: Metric
    plan: Plan
    rounds: int
    limit_points: float
    load: Callable[[int, int], Split]
    write: Callable[[Path, Samples], str]


def accuracy(outputs: Outputs, labels: Classes) -> float:
    """Share of rows whose largest logit is that of the label."""
    return float((outputs.argmax(axis=1) == labels).mean())


def area_under_curve(outputs: Outputs, labels: Classes) -> float:
    """Area under the ROC curve of logits (n, 1): the share of (positive, negative) pairs in the right order.

    The rank statistic of Mann and Whitney (1947), ties counted half.
    """
    scores = outputs.reshape(-1)
    positive, negative = scores[labels == 1], scores[labels == 0]
    above = (positive[:, None] > negative).sum() + 0.5 * (positive[:, None] == negative).sum()
    return float(above / (len(positive) * len(negative)))


def _accuracy_error(score: float, labels: Classes) -> float:
    return math.sqrt(score * (1 - score) / len(labels))


def _area_error(score: float, labels: Classes) -> float:
    """Hanley and McNeil, Radiology 143 (1982)."""
    positive = int((labels == 1).sum())
    negative = len(labels) - positive
    q1, q2 = score / (2 - score), 2 * score**2 / (1 + score)
    variance = (score * (1 - score) + (positive - 1) * (q1 - score**2) + (negative - 1) * (q2 - score**2)) / (
        positive * negative
    )
    return math.sqrt(max(variance, 0.0))


ACCURACY = Metric(
    name="accuracy", score=accuracy, error=_accuracy_error, classes=lambda outputs: outputs.argmax(axis=1)
)
AREA = Metric(
    name="AUC",
    score=area_under_curve,
    error=_area_error,
    classes=lambda outputs: (outputs.reshape(-1) > 0).astype(np.int64),
)

DIGITS = Example(
    name="digits",
    sample="digits",
    class_names=tuple("0123456789"),
    metric=ACCURACY,
    # Chosen over many seeds of the split. Equal steps on every device: with epochs the device with the most samples
    # is always the fifth of five, so what it knows never counts. 54 small batches are 3 passes over a mean share.
    # Weighing by the square root of the samples (beta -0.5) keeps one large, one-sided device from turning the
    # model its way each time it is drawn; 60 rounds settle the last point of accuracy.
    plan=Plan(
        epochs=0,
        steps=54,
        batch_size=8,
        learning_rate=0.05,
        momentum=0.9,
        max_grad_norm=2.0,
        beta=-0.5,
        sample_cap=2000,
    ),
    rounds=60,
    limit_points=2.0,
    load=load_digits_split,
    write=write_images,
)
BREAST_CANCER = Example(
    name="breast_cancer",
    sample="patients",
    class_names=DIAGNOSES,
    metric=AREA,
    # A mean share is 45 patients: 12 batches of 8 are 2 passes. Two classes split by Dirichlet(0.3) leave many
    # hospitals with one kind of patient almost only: few, small steps keep each from forgetting the other kind.
    plan=Plan(
        epochs=0,
        steps=12,
        batch_size=8,
        learning_rate=0.02,
        momentum=0.9,
        max_grad_norm=2.0,
        beta=-0.5,
        sample_cap=500,
    ),
    rounds=40,
    limit_points=1.0,
    load=load_breast_cancer_split,
    write=write_patients,
)

EXAMPLES: Mapping[str, Example] = {example.name: example for example in (DIGITS, BREAST_CANCER)}
