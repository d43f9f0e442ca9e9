"""Logits -> token ids: the processors, in the order of Hugging Face's `generate`, and the draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike

from flaxgpt.config import SamplingConfig

Noise: TypeAlias = Callable[[int], ArrayLike]
"""t -> (B, V) Gumbel noise that decides new token number t, in place of torch's generator."""


def process_logits(logits_BV: torch.Tensor, prompt_BT: torch.Tensor, new_BT: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    """The logits to choose by, given the prompt and the new tokens so far."""
    logits_BV = logits_BV.clone()
    for i, bias in sampling.logit_bias.items():
        logits_BV[:, i] += bias
    counts_BV = torch.zeros_like(logits_BV).scatter_add(1, new_BT, torch.ones_like(new_BT, dtype=logits_BV.dtype))
    if sampling.repetition_penalty is not None:
        idx = torch.cat([prompt_BT, new_BT], dim=1)
        seen = logits_BV.gather(1, idx)
        seen = torch.where(seen < 0, seen * sampling.repetition_penalty, seen / sampling.repetition_penalty)
        logits_BV = logits_BV.scatter(1, idx, seen)
    if sampling.presence_penalty is not None:
        logits_BV = logits_BV - sampling.presence_penalty * (counts_BV > 0)
    if sampling.frequency_penalty is not None:
        logits_BV = logits_BV - sampling.frequency_penalty * counts_BV
    logits_BV[:, list(sampling.banned)] = -torch.inf
    if sampling.temperature == 0:
        return logits_BV
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None:
        kth_B1 = torch.topk(logits_BV, min(sampling.top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_BV = logits_BV.sort(dim=-1, descending=True).values
        probs_BV = sorted_BV.softmax(dim=-1)
        goes_BV = probs_BV.cumsum(dim=-1) - probs_BV >= sampling.top_p  # the likelier ones have that much already
        least_B1 = sorted_BV.masked_fill(goes_BV, torch.inf).amin(dim=-1, keepdim=True)
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)  # so that equals stay or go together
    if sampling.min_p is not None:
        probs_BV = logits_BV.softmax(dim=-1)
        logits_BV = logits_BV.masked_fill(probs_BV < sampling.min_p * probs_BV.amax(dim=-1, keepdim=True), -torch.inf)
    return logits_BV


def choose(logits_BV: torch.Tensor, sampling: SamplingConfig, noise: Noise | None, t: int) -> torch.Tensor:
    """Token ids from processed logits, for new token number t: the likeliest at temperature 0, else a draw."""
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    if noise is None:
        return torch.multinomial(torch.softmax(logits_BV, dim=-1), num_samples=1)[:, 0]
    return (logits_BV + torch.tensor(np.asarray(noise(t)), device=logits_BV.device)).argmax(dim=-1)
