"""Windows -> batches. A batch is a function of (seed, step) alone, so a resumed run sees the same ones, and so does every host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import grain
import numpy as np

from flaxgpt.config import TrainConfig
from flaxgpt.data.token_files import Tokens
from flaxgpt.data.windows import Split, Windows, split_windows
from flaxgpt.types import Batch

Rows = Callable[[int], Iterable[int]]
"""How many rows a batch has -> which of them to read; `range`: all of them."""


class Batches(Sequence[Batch]):
    """Batches by number, of which no rows are read but those that are asked for: inputs and targets, each (rows, T) int32.

    Attributes:
        B: how many rows a batch has in all.
    """

    def __init__(self, windows: Windows, numbers: Sequence[np.ndarray], B: int, rows: Rows) -> None:
        """`numbers[i]` are the windows that batch i is made of."""
        self._windows, self._numbers, self.B, self._rows = windows, numbers, B, [*rows(B)]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> Batch:
        numbers_B = self._numbers[i]
        inputs, targets = zip(*(self._windows[int(numbers_B[row])] for row in self._rows), strict=True)
        return np.stack(inputs), np.stack(targets)


def train_batches(tokens: Tokens, cfg: TrainConfig, rows: Rows = range) -> Batches:
    """The endless sequence whose element `[step]` is the batch of that update, shuffled anew each epoch.

    Args:
        tokens: (number of tokens,) of the training split.
        cfg: the run.
        rows: what of a batch is read.

    Raises:
        InputError: there are fewer tokens than one window, or fewer windows than one batch.
    """
    windows = split_windows(tokens, cfg, "training")
    return Batches(windows, _numbers(len(windows), cfg), cfg.batch_size, rows)


def batch_windows(tokens: Tokens, cfg: TrainConfig, step: int) -> list[int]:
    """The numbers of the windows that the batch of an update is made of; number i starts at token i * stride of the training split."""
    return _numbers(len(split_windows(tokens, cfg, "training")), cfg)[step].tolist()


def _numbers(windows: int, cfg: TrainConfig) -> grain.MapDataset:
    dataset = grain.MapDataset.range(windows).seed(cfg.seed)
    if cfg.shuffle:
        dataset = dataset.shuffle()
    if cfg.drop_last:
        return dataset.batch(cfg.batch_size, drop_remainder=True).repeat()
    return dataset.repeat().batch(cfg.batch_size)  # the windows left over begin the next epoch's first batch


def eval_batches(tokens: Tokens, cfg: TrainConfig, split: Split, rows: Rows = range) -> Batches:
    """The microbatches that every evaluation of a split uses: those of `eval_batches` batches, or all there are.

    Training windows are drawn by the seed; validation windows are spread evenly over the text.
    A split with less than one batch gives as many whole microbatches as it has, or a smaller one.

    Raises:
        InputError: as `flaxgpt.data.windows.split_windows`.
    """
    windows = split_windows(tokens, cfg, split)
    whole = len(windows) // cfg.batch_size * cfg.batch_size or len(windows)  # so that microbatches don't decide what is evaluated
    size = min(cfg.microbatch_size, whole)
    count = min(cfg.eval_batches * cfg.batch_size, whole) // size
    if split == "training":
        order = np.random.default_rng(cfg.seed).choice(len(windows), count * size, replace=False)
    else:
        order = np.arange(count * size) * len(windows) // (count * size)
    return Batches(windows, order.reshape(count, size), size, rows)
