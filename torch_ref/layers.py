"""What GPT-2 is built from: norm, GELU by tanh, how parameters are drawn. `flaxgpt/layers.py` is the functional twin."""

from __future__ import annotations

import math

import torch
from torch import nn


class LayerNorm(nn.Module):
    """Zero mean and unit (biased) variance over the last axis, eps 1e-5; then scaled and, on request, shifted."""

    def __init__(self, emb_dim: int, use_shift: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim)) if use_shift else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(dim=-1, keepdim=True)
        variance = x.var(dim=-1, keepdim=True, unbiased=False)
        return self.scale * ((x - mean) / torch.sqrt(variance + 1e-5)) + self.shift


class TanhGELU(nn.Module):
    """The tanh approximation of GELU (Hendrycks & Gimpel 2016), as GPT-2 was trained."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def init_gpt2_(model: nn.Module, n_layers: int) -> None:
    """Draw the weights again as GPT-2 did: normal(0.02), residual projections normal(0.02 / sqrt(2 L)), biases zero."""
    residual_std = 0.02 * (2 * n_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif name.endswith("weight"):
            nn.init.normal_(parameter, std=residual_std if name.endswith(("out_proj.weight", "layers.2.weight")) else 0.02)
