"""Text generation by a module, one token at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torch_ref.model import GPTModel


def generate_text_simple(model: GPTModel, idx: torch.Tensor, max_new_tokens: int, context_size: int) -> torch.Tensor:
    """Greedy continuation of (B, T) token ids by `max_new_tokens`, seeing the last `context_size` tokens each time."""
    return generate(model, idx, max_new_tokens, context_size)


@torch.no_grad()
def generate(
    model: GPTModel,
    idx: torch.Tensor,
    max_new_tokens: int,
    context_size: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | None = None,
    noise: Callable[[int], Any] | None = None,
) -> torch.Tensor:
    """Continue each row of token ids.

    Args:
        model: in `eval()` mode, unless dropout is wanted.
        idx: (B, T) int64.
        max_new_tokens: tokens to add to each row.
        context_size: tokens that the model sees at most; positions count from the first of them.
        temperature: divides the logits; 0 is greedy.
        top_k: draw among the k largest logits, ties with the k-th included; more than V means all.
        eos_id: a row that has produced this token is filled with it; generation stops when all rows have.
        noise: Gumbel noise of new token t, (B, V), to draw with in place of torch's generator: the largest of logits plus
            noise is a draw from the softmax. So draws of another implementation can be replayed.

    Returns:
        (B, T + max_new_tokens), or fewer columns if every row ended before.
    """
    ended_B = torch.zeros(idx.shape[0], dtype=torch.bool, device=idx.device)
    for t in range(max_new_tokens):
        logits_BV = model(idx[:, -context_size:])[:, -1]
        if top_k is not None:
            kth_B1 = torch.topk(logits_BV, min(top_k, logits_BV.shape[-1])).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
        if temperature > 0 and noise is not None:
            next_B = (logits_BV / temperature + torch.tensor(noise(t))).argmax(dim=-1)
        elif temperature > 0:
            next_B = torch.multinomial(torch.softmax(logits_BV / temperature, dim=-1), num_samples=1)[:, 0]
        else:
            next_B = logits_BV.argmax(dim=-1)
        if eos_id is not None:
            next_B = next_B.masked_fill(ended_B, eos_id)
            ended_B |= next_B == eos_id
        idx = torch.cat([idx, next_B[:, None]], dim=1)
        if ended_B.all():
            break
    return idx
