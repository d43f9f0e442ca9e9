"""Activation patching with hooks: a forward pass for every layer and position, one after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flaxgpt.edits import replace
from torch_ref.interventions import edited
from torch_ref.model import GPTModel

Metric = Callable[[torch.Tensor], torch.Tensor]
"""logits_V of the token after the text -> a number."""


@torch.no_grad()
def patch_each(
    model: GPTModel, tokens_T: torch.Tensor, other_LTD: torch.Tensor, metric: Metric, *, site: str = "shortcut2"
) -> torch.Tensor:
    """A metric of the next token's logits, when one activation at one position of one block is that of another run.

    Arguments and result are those of `flaxgpt.interpret.patching.patch_each`.
    """
    L, T = other_LTD.shape[:2]
    metric_LT = torch.empty(L, T)
    for layer in range(L):
        for position in range(T):
            with edited(model, {f"trf_blocks.{layer}.{site}": replace(other_LTD[layer], positions=position)}):
                metric_LT[layer, position] = metric(model(tokens_T[None])[0, -1])
    return metric_LT
