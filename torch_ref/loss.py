"""The training loss."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from torch_ref.model import GPTModel


def calc_loss_batch(model: GPTModel, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the targets, in nats per token.

    It runs the model, where `flaxgpt.loss.next_token_loss` takes its logits.

    Args:
        model: in `train()` mode for a loss with dropout.
        inputs_BT: token ids, int64.
        targets_BT: the same one token later.

    Returns:
        (), with the graph that `backward()` needs.
    """
    logits_BTV = model(inputs_BT)
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
