"""Tokens -> windows -> batches. A batch is a function of (seed, step) alone, so a resumed run sees the same ones."""

from __future__ import annotations

from typing import Literal

import grain
import numpy as np

from flaxgpt.config import TrainConfig
from flaxgpt.data.corpora import count_windows

Batch = tuple[np.ndarray, np.ndarray]
"""inputs_BT and targets_BT, uint16; the targets are the inputs one token later."""


class Windows:
    """Random access to the (input, target) windows of a token array: window i starts at token i * stride."""

    def __init__(self, tokens: np.ndarray, context_length: int, stride: int) -> None:
        self.tokens, self.context_length, self.stride = tokens, context_length, stride

    def __len__(self) -> int:
        return max(0, -(-(len(self.tokens) - self.context_length) // self.stride))

    def __getitem__(self, i: int) -> Batch:
        window = np.asarray(self.tokens[i * self.stride : i * self.stride + self.context_length + 1])
        return window[:-1], window[1:]


def train_batches(tokens: np.ndarray, cfg: TrainConfig) -> grain.MapDataset:
    """An endless dataset whose element `[step]` is the batch of that update, shuffled anew each epoch.

    Args:
        tokens: (number of tokens,) of the training split.
        cfg: the run.

    Raises:
        InputError: there are fewer tokens than one window, or fewer windows than one batch.
    """
    count_windows(len(tokens), cfg, "training")
    windows = Windows(tokens, cfg.model.context_length, cfg.window_stride)
    dataset = grain.MapDataset.source(windows).seed(cfg.seed)
    if cfg.shuffle:
        dataset = dataset.shuffle()
    if cfg.drop_last:
        return dataset.batch(cfg.batch_size, drop_remainder=True).repeat()
    return dataset.repeat().batch(cfg.batch_size)  # the windows left over begin the next epoch's first batch


def eval_batches(tokens: np.ndarray, cfg: TrainConfig, split: Literal["training", "validation"]) -> list[Batch]:
    """The microbatches that every evaluation of a split uses: those of `eval_batches` batches, or all there are.

    Training windows are drawn by the seed; validation windows do not overlap and are spread evenly over the text.
    A split with less than one microbatch gives one smaller one.

    Raises:
        InputError: the split has fewer tokens than one window.
    """
    available = count_windows(len(tokens), cfg, split)
    size = min(cfg.microbatch_size, available)
    count = min(cfg.eval_batches * cfg.grad_accum_steps, available // size)
    T = cfg.model.context_length
    if split == "training":
        windows = Windows(tokens, T, cfg.window_stride)
        order = np.random.default_rng(cfg.seed).choice(available, count * size, replace=False)
    else:
        windows = Windows(tokens, T, T)
        order = np.arange(count * size) * available // (count * size)
    return [
        tuple(np.stack(side) for side in zip(*(windows[i] for i in order[k * size : (k + 1) * size]), strict=True)) for k in range(count)
    ]
