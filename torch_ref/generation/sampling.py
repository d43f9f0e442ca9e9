"""Logits -> logits, in the order of Hugging Face's `generate`. `flaxgpt/processors.py` has the same as separate functions."""

from __future__ import annotations

import torch

from flaxgpt.config import SamplingConfig


def process_logits(logits_BV: torch.Tensor, prompt_BT: torch.Tensor, new_BT: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """The logits to choose by, given the prompt and the new tokens so far."""
    logits_BV = logits_BV.clone()
    for i, bias in config.logit_bias.items():
        logits_BV[:, i] += bias
    counts_BV = torch.zeros_like(logits_BV).scatter_add(1, new_BT, torch.ones_like(new_BT, dtype=logits_BV.dtype))
    if config.repetition_penalty is not None:
        idx = torch.cat([prompt_BT, new_BT], dim=1)
        seen = logits_BV.gather(1, idx)
        seen = torch.where(seen < 0, seen * config.repetition_penalty, seen / config.repetition_penalty)
        logits_BV = logits_BV.scatter(1, idx, seen)
    if config.presence_penalty is not None:
        logits_BV = logits_BV - config.presence_penalty * (counts_BV > 0)
    if config.frequency_penalty is not None:
        logits_BV = logits_BV - config.frequency_penalty * counts_BV
    logits_BV[:, list(config.banned)] = -torch.inf
    if config.temperature == 0:
        return logits_BV
    logits_BV = logits_BV / config.temperature
    if config.top_k is not None:
        kth_B1 = torch.topk(logits_BV, min(config.top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    if config.top_p is not None and config.top_p < 1:
        sorted_BV = logits_BV.sort(dim=-1, descending=True).values
        probs_BV = sorted_BV.softmax(dim=-1)
        goes_BV = probs_BV.cumsum(dim=-1) - probs_BV >= config.top_p  # the likelier ones have that much already
        least_B1 = sorted_BV.masked_fill(goes_BV, torch.inf).amin(dim=-1, keepdim=True)
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)  # so that equals stay or go together
    if config.min_p is not None:
        probs_BV = logits_BV.softmax(dim=-1)
        logits_BV = logits_BV.masked_fill(probs_BV < config.min_p * probs_BV.amax(dim=-1, keepdim=True), -torch.inf)
    return logits_BV
