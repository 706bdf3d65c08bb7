"""Data that is bundled with scikit-learn, split over devices as unevenly as real fleets are."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split

ALPHA = 0.3
HELD_OUT = 0.2
LEAST_SAMPLES = 10
DIAGNOSES = ("benign", "malignant")
_PIXEL_MAX = 16.0
_MAX_DRAWS = 10_000

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Rows = npt.NDArray[np.intp]


class Samples(NamedTuple):
    """``x``: float32, a row for each sample, C-contiguous; ``y``: the target as the model takes it, a row each."""

    x: Features
    y: npt.NDArray[Any]

    @property
    def labels(self) -> Labels:
        """Classes, int64 (n,)."""
        return self.y.reshape(-1).astype(np.int64)

    def take(self, rows: Rows) -> Samples:
        return Samples(np.ascontiguousarray(self.x[rows]), self.y[rows])


class Split(NamedTuple):
    """``held_out``: seen by nobody; ``pooled``: all the devices' samples; ``devices``: the parts of ``pooled``."""

    held_out: Samples
    pooled: Samples
    devices: tuple[Samples, ...]


def load_digits_split(devices: int, seed: int) -> Split:
    """1,797 digits, x (n, 1, 8, 8) in [0, 1], y int64 (n,); see ``split``."""
    digits: Any = load_digits()
    images = (digits.images / _PIXEL_MAX).astype(np.float32)[:, np.newaxis]
    return split(Samples(images, digits.target.astype(np.int64)), devices, seed)


def load_breast_cancer_split(devices: int, seed: int) -> Split:
    """569 patients, x (n, 30) in the units of the measurements, y float32 (n, 1), 1 is malignant; see ``split``."""
    cancer: Any = load_breast_cancer()
    malignant = (cancer.target == 0).astype(np.float32)[:, np.newaxis]
    return split(Samples(cancer.data.astype(np.float32), malignant), devices, seed)


def split(everything: Samples, devices: int, seed: int) -> Split:
    """20 % held out, stratified by class; the rest by ``dirichlet_parts``. The seed decides all."""
    labels = everything.labels
    train, test = train_test_split(
        np.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=seed
    )
    pooled = everything.take(train)
    parts = dirichlet_parts(pooled.labels, devices, np.random.default_rng(seed))
    return Split(everything.take(test), pooled, tuple(pooled.take(rows) for rows in parts))


def dirichlet_parts(
    labels: Labels, parts: int, rng: np.random.Generator, *, alpha: float = ALPHA, least: int = LEAST_SAMPLES
) -> list[Rows]:
    """Every row to exactly one part, sorted; ``parts`` arrays of at least ``least`` rows each.

    The rows of each class are cut by a Dirichlet(alpha) draw over the parts (Hsu et al. 2019, arXiv 1909.06335). A
    split with a smaller part is drawn again as a whole, so the one kept is Dirichlet, conditioned on that size.
    Raises ValueError when no draw is large enough: too many parts for the rows.
    """
    for _ in range(_MAX_DRAWS if parts * least <= len(labels) else 0):
        pieces: list[list[Rows]] = [[] for _ in range(parts)]
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            shares = np.cumsum(rng.dirichlet([alpha] * parts))[:-1]
            for piece, cut in zip(
                pieces, np.split(rows, np.rint(shares * len(rows)).astype(int)), strict=True
            ):
                piece.append(cut)
        joined = [np.sort(np.concatenate(piece)) for piece in pieces]
        if min(map(len, joined)) >= least:
            return joined
    raise ValueError(
        f"{len(labels)} rows cannot be split over {parts} parts of at least {least}: use fewer parts"
    )


def write_npz(path: Path, samples: Samples) -> None:
    """Arrays ``x`` and ``y``."""
    np.savez(path, allow_pickle=False, x=samples.x, y=samples.y)


def write_images(folder: Path, samples: Samples) -> str:
    """``train.npz``; returns the [data] section of the device that reads it."""
    write_npz(folder / "train.npz", samples)
    return '[data]\nsource = "train.npz"\n'


def write_patients(folder: Path, samples: Samples) -> str:
    """``patients.csv``, as a hospital exports it; returns the [data.csv] section of the device that reads it."""
    cancer: Any = load_breast_cancer()
    names = [str(name).replace(" ", "_") for name in cancer.feature_names]
    with (folder / "patients.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow([*names, "diagnosis"])
        for row, label in zip(samples.x, samples.labels, strict=True):
            table.writerow([*(f"{value:.9g}" for value in row), DIAGNOSES[label]])
    words = {"inputs": [names], "target": "diagnosis", "labels": list(DIAGNOSES)}
    settings = "".join(f"{key} = {json.dumps(value)}\n" for key, value in words.items())
    return f'[data.csv]\nfile = "patients.csv"\n{settings}'
