"""A small CNN for the 8x8 digits of scikit-learn.

model-export build model:build --name digits --out artifact/
"""

from __future__ import annotations

import torch
from torch import nn


class DigitsNet(nn.Module):
    """float32 (batch, 1, 8, 8) in [0, 1] -> logits (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.hidden = nn.Linear(32 * 4 * 4, 64)
        self.out = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.conv1(image))
        features = self.pool(torch.relu(self.conv2(features)))
        return self.out(torch.relu(self.hidden(features.flatten(1))))


def build() -> tuple[nn.Module, tuple[torch.Tensor, ...], torch.Tensor, str]:
    """What ``model-export build`` asks for; the example batch only fixes shapes and serves the comparison."""
    module = DigitsNet()
    return module, (torch.rand(4, 1, 8, 8),), torch.arange(4), "cross_entropy"
