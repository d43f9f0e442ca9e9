"""One update and one evaluation, of a model and an optimizer that change in place."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import torch

from flaxgpt.config import TrainConfig
from torch_ref.data.loader import Batch
from torch_ref.loss import calc_loss_batch
from torch_ref.model import GPTModel
from torch_ref.optim import apply_gradients_, clip_gradients_


def train_step(model: GPTModel, optimizer: torch.optim.AdamW, batch: Batch, step: int, cfg: TrainConfig) -> tuple[float, float]:
    """Update the model and the optimizer in place; returns the batch's loss, nats per token, and its gradient's norm before clipping."""
    model.train()
    optimizer.zero_grad()
    loss = 0.0
    for weight, inputs_BT, targets_BT in microbatches(batch, cfg.microbatch_size):
        part = weight * calc_loss_batch(model, inputs_BT, targets_BT)
        part.backward()
        loss += part.item()
    grad_norm = clip_gradients_(model, cfg)
    apply_gradients_(optimizer, step, cfg)
    return loss, grad_norm


def evaluate_model(model: GPTModel, train_loader: Iterable[Batch], val_loader: Iterable[Batch], cfg: TrainConfig) -> tuple[float, float]:
    """Training and validation loss over `cfg.eval_batches` batches each, dropout off; leaves the model in `eval()` mode.

    It moves the global generator, from which the loaders draw, where `flaxgpt.step.make_eval_step` only returns a number.
    """
    model.eval()
    train_loss, val_loss = (calc_loss_loader(model, loader, cfg.eval_batches, cfg.microbatch_size) for loader in (train_loader, val_loader))
    return train_loss, val_loss


@torch.no_grad()
def calc_loss_loader(model: GPTModel, loader: Iterable[Batch], num_batches: int | None = None, microbatch_size: int | None = None) -> float:
    """Mean loss over the first `num_batches` batches (all, if there are fewer); nan for a loader without any."""
    losses = []
    for batch in itertools.islice(loader, num_batches):
        parts = microbatches(batch, microbatch_size or len(batch[0]))
        losses.append(sum(weight * calc_loss_batch(model, inputs, targets).item() for weight, inputs, targets in parts))
    return sum(losses) / len(losses) if losses else math.nan


def microbatches(batch: Batch, size: int) -> list[tuple[float, torch.Tensor, torch.Tensor]]:
    """The batch in parts of at most `size` rows, each with its share of the batch: the weight of its mean in the batch's."""
    inputs_BT, targets_BT = batch
    parts = zip(inputs_BT.split(size), targets_BT.split(size), strict=True)
    return [(len(inputs) / len(inputs_BT), inputs, targets) for inputs, targets in parts]
