"""Windows -> batches, by the DataLoader that shuffles them from the global generator."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from flaxgpt.config import TrainConfig
from flaxgpt.data.token_files import Tokens
from flaxgpt.data.windows import Windows, split_windows

Batch = tuple[torch.Tensor, torch.Tensor]
"""inputs_BT and targets_BT, int64; the targets are the inputs one token later."""


def create_dataloaders(train_tokens: Tokens, val_tokens: Tokens, cfg: TrainConfig) -> tuple[DataLoader[Batch], DataLoader[Batch]]:
    """The training loader (shuffled, without the last incomplete batch, as the config says) and the validation loader (neither).

    Iterating either draws from torch's global generator, and so changes what dropout draws next.

    Raises:
        InputError: a split has less than one window, or the training split less than one batch.
    """
    train = WindowDataset(split_windows(train_tokens, cfg, "training"))
    val = WindowDataset(split_windows(val_tokens, cfg, "validation"))
    return (
        DataLoader(train, cfg.batch_size, shuffle=cfg.shuffle, drop_last=cfg.drop_last),
        DataLoader(val, cfg.batch_size, shuffle=False, drop_last=False),
    )


def endless(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """Epoch after epoch of batches, each epoch shuffled anew when it begins."""
    return itertools.chain.from_iterable(itertools.repeat(loader))


class WindowDataset(Dataset[Batch]):
    """The windows of a split as torch's Dataset: the same ones, in int64, which torch's losses expect."""

    def __init__(self, windows: Windows) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> Batch:
        inputs_T, targets_T = self.windows[i]
        return torch.from_numpy(inputs_T).long(), torch.from_numpy(targets_T).long()
