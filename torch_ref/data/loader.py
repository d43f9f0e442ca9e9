"""Windows of tokens as a torch Dataset, and the DataLoader that shuffles them from the global generator."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from flaxgpt.config import TrainConfig
from flaxgpt.data.corpora import count_windows

Batch = tuple[torch.Tensor, torch.Tensor]
"""inputs_BT and targets_BT, int64; the targets are the inputs one token later."""


class WindowDataset(Dataset[Batch]):
    """Windows of `context_length` tokens, their starts `stride` tokens apart, each with its targets."""

    def __init__(self, tokens: np.ndarray, context_length: int, stride: int) -> None:
        self.tokens, self.context_length = tokens, context_length
        self.starts = range(0, len(tokens) - context_length, stride)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> Batch:
        window = torch.from_numpy(self.tokens[self.starts[i] : self.starts[i] + self.context_length + 1].astype(np.int64))
        return window[:-1], window[1:]


def create_dataloaders(train_tokens: np.ndarray, val_tokens: np.ndarray, cfg: TrainConfig) -> tuple[DataLoader[Batch], DataLoader[Batch]]:
    """The training loader (shuffled, without the last incomplete batch) and the validation loader (neither).

    Iterating either draws from torch's global generator, and so changes what dropout draws next.

    Raises:
        InputError: a split has less than one window, or the training split less than one batch.
    """
    T = cfg.model.context_length
    count_windows(len(train_tokens), cfg, "training")
    count_windows(len(val_tokens), cfg, "validation")
    train = DataLoader(WindowDataset(train_tokens, T, cfg.window_stride), cfg.batch_size, shuffle=cfg.shuffle, drop_last=cfg.drop_last)
    val = DataLoader(WindowDataset(val_tokens, T, T), cfg.batch_size, shuffle=False, drop_last=False)
    return train, val
