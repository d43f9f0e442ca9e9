"""AdamW that changes the weights in place: clip, set the schedule's rate, step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from flaxgpt.config import TrainConfig
from torch_ref.model import GPTModel


def make_optimizer(model: GPTModel, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW, with weight decay on all tensors or on matrices and embeddings only, as the config says."""
    groups = [{"params": [], "weight_decay": cfg.weight_decay}, {"params": [], "weight_decay": 0.0}]
    for parameter in model.parameters():
        decays = cfg.decay == "all" or parameter.ndim >= 2
        groups[0 if decays else 1]["params"].append(parameter)
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps)


def make_schedule(cfg: TrainConfig) -> Callable[[int], float]:
    """Learning rate of update s, counted from 0: linear warm-up, cosine to the minimum, constant after that."""

    def schedule(step: int) -> float:
        if step < cfg.warmup_steps:
            return cfg.learning_rate * (step + 1) / (cfg.warmup_steps + 1)
        done = min((step - cfg.warmup_steps) / (cfg.total_decay_steps - cfg.warmup_steps), 1.0)
        low = cfg.final_learning_rate
        return low + (cfg.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * done))

    return schedule


def clip_gradients_(model: GPTModel, cfg: TrainConfig) -> float:
    """Scale the gradients to the config's largest global norm, if they exceed it; returns the norm they had."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm or math.inf).item()


def apply_gradients_(optimizer: torch.optim.AdamW, step: int, cfg: TrainConfig) -> None:
    """Let the optimizer make update `step`, counted from 0, at the schedule's rate."""
    rate = make_schedule(cfg)(step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
