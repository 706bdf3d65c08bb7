"""Is a tumour malignant? A small network over the 30 measurements of scikit-learn's breast-cancer data.

model-export build model:build --name breast_cancer --out artifact/
"""

from __future__ import annotations

import torch
from torch import nn

# Typical value and spread of each measurement of cell nuclei (radius, texture, perimeter, area, smoothness,
# compactness, concavity, concave points, symmetry, fractal dimension: mean, standard error, worst), rounded, as a
# laboratory's handbook would have them. Fixed numbers in the model: no hospital has to tell the others what its own
# patients are like on average.
TYPICAL = (
    *(14.0, 19.0, 92.0, 650.0, 0.096, 0.10, 0.09, 0.05, 0.18, 0.063),
    *(0.4, 1.2, 2.9, 40.0, 0.007, 0.025, 0.03, 0.012, 0.02, 0.0038),
    *(16.0, 26.0, 107.0, 880.0, 0.13, 0.25, 0.27, 0.11, 0.29, 0.084),
)
SPREAD = (
    *(3.5, 4.3, 24.0, 350.0, 0.014, 0.05, 0.08, 0.04, 0.03, 0.007),
    *(0.3, 0.55, 2.0, 45.0, 0.003, 0.018, 0.03, 0.006, 0.008, 0.0026),
    *(4.8, 6.0, 34.0, 570.0, 0.023, 0.16, 0.2, 0.065, 0.06, 0.018),
)


class TumourNet(nn.Module):
    """float32 (batch, 30), measurements in their own units -> logit of malignancy, (batch, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(30, 16)
        self.out = nn.Linear(16, 1)

    def forward(self, measurements: torch.Tensor) -> torch.Tensor:
        scaled = (measurements - torch.tensor(TYPICAL)) / torch.tensor(SPREAD)
        return self.out(torch.relu(self.hidden(scaled)))


def build() -> tuple[nn.Module, tuple[torch.Tensor, ...], torch.Tensor, str]:
    """What ``model-export build`` asks for; the example batch only fixes shapes and serves the comparison."""
    inputs = torch.tensor(TYPICAL) + torch.randn(4, 30) * torch.tensor(SPREAD)
    return TumourNet(), (inputs,), torch.tensor([[0.0], [1.0], [0.0], [1.0]]), "bce_with_logits"
