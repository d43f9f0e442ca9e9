"""Tokens -> windows -> batches. A batch is a function of (seed, step) alone, so a resumed run sees the same ones."""

from __future__ import annotations

import grain
import numpy as np

from flaxgpt.config import TrainConfig
from flaxgpt.errors import InputError

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


def train_batches(tokens: np.ndarray, cfg: TrainConfig, seed: int | None = None) -> grain.MapDataset:
    """An endless dataset whose element `[step]` is the batch of that update, shuffled anew each epoch.

    Args:
        tokens: (number of tokens,) of the training split.
        cfg: the run.
        seed: in place of the run's own.

    Raises:
        InputError: there are fewer tokens than one window, or fewer windows than one batch.
    """
    windows = _windows(tokens, cfg.model.context_length, cfg.window_stride, "training")
    if cfg.drop_last and len(windows) < cfg.batch_size:
        raise InputError(
            f"the training split has {len(windows)} windows, fewer than batch_size={cfg.batch_size}; lower batch_size, "
            f"context_length or stride, or pass --no-drop-last"
        )
    dataset = grain.MapDataset.source(windows).seed(cfg.seed if seed is None else seed)
    if cfg.shuffle:
        dataset = dataset.shuffle()
    if cfg.drop_last:
        return dataset.batch(cfg.batch_size, drop_remainder=True).repeat()
    return dataset.repeat().batch(cfg.batch_size)  # the windows left over begin the next epoch's first batch


def eval_batches(tokens: np.ndarray, cfg: TrainConfig, split: str) -> list[Batch]:
    """The batches that every evaluation of a split uses: `eval_batches` of them, or all there are.

    Training windows are drawn by the seed; validation windows do not overlap and are spread evenly over the text.
    A split with less than one batch gives one smaller batch. (A list of a few hundred kilobytes.)

    Raises:
        InputError: the split has fewer tokens than one window.
    """
    stride = cfg.window_stride if split == "training" else cfg.model.context_length
    windows = _windows(tokens, cfg.model.context_length, stride, split)
    size = min(cfg.batch_size, len(windows))
    count = min(cfg.eval_batches, len(windows) // size)
    if split == "training":
        order = np.random.default_rng(cfg.seed).choice(len(windows), count * size, replace=False)
    else:
        order = np.arange(count * size) * len(windows) // (count * size)
    return [
        tuple(np.stack(side) for side in zip(*(windows[i] for i in order[k * size : (k + 1) * size]), strict=True)) for k in range(count)
    ]


def _windows(tokens: np.ndarray, context_length: int, stride: int, split: str) -> Windows:
    windows = Windows(tokens, context_length, stride)
    if not len(windows):
        raise InputError(
            f"the {split} split has {len(tokens)} tokens, fewer than one window of context_length + 1 = "
            f"{context_length + 1}; use a longer text, a smaller context_length or another train_ratio"
        )
    return windows
