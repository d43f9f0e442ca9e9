"""Windows -> batches. A batch is a function of (seed, step) alone, so a resumed run sees the same ones."""

from __future__ import annotations

import grain
import numpy as np

from flaxgpt.config import TrainConfig
from flaxgpt.data.token_files import Tokens
from flaxgpt.data.windows import Split, split_windows
from flaxgpt.types import Batch


def train_batches(tokens: Tokens, cfg: TrainConfig) -> grain.MapDataset:
    """An endless dataset whose element `[step]` is the batch of that update, shuffled anew each epoch.

    Args:
        tokens: (number of tokens,) of the training split.
        cfg: the run.

    Raises:
        InputError: there are fewer tokens than one window, or fewer windows than one batch.
    """
    return _batched(grain.MapDataset.source(split_windows(tokens, cfg, "training")), cfg)


def batch_windows(tokens: np.ndarray, cfg: TrainConfig, step: int) -> list[int]:
    """The numbers of the windows that the batch of an update is made of; number i starts at token i * stride of the training split."""
    return _batched(grain.MapDataset.range(len(split_windows(tokens, cfg, "training"))), cfg)[step].tolist()


def _batched(windows: grain.MapDataset, cfg: TrainConfig) -> grain.MapDataset:
    dataset = windows.seed(cfg.seed)
    if cfg.shuffle:
        dataset = dataset.shuffle()
    if cfg.drop_last:
        return dataset.batch(cfg.batch_size, drop_remainder=True).repeat()
    return dataset.repeat().batch(cfg.batch_size)  # the windows left over begin the next epoch's first batch


def eval_batches(tokens: Tokens, cfg: TrainConfig, split: Split) -> list[Batch]:
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
    parts = (zip(*(windows[i] for i in order[k * size : (k + 1) * size]), strict=True) for k in range(count))
    return [(np.stack(inputs), np.stack(targets)) for inputs, targets in parts]
