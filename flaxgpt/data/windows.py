"""Tokens cut into windows, the inputs and the targets of one row of a batch. Both sides train on these."""

from __future__ import annotations

from typing import Literal

import numpy as np

from flaxgpt.config import TrainConfig
from flaxgpt.data.token_files import Tokens
from flaxgpt.errors import InputError

Split = Literal["training", "validation"]

Window = tuple[np.ndarray, np.ndarray]
"""inputs_T and targets_T, int32; the targets are the inputs one token later."""


def split_windows(tokens: Tokens, cfg: TrainConfig, split: Split) -> Windows:
    """The windows of a split: training windows start `cfg.window_stride` tokens apart, validation windows do not overlap.

    Args:
        tokens: (number of tokens,) of the split.
        cfg: the run.
        split: which one it is.

    Raises:
        InputError: there is not one window, or not one batch to train on.
    """
    T = cfg.model.context_length
    windows = Windows(tokens, T, cfg.window_stride if split == "training" else T)
    if not windows:
        raise InputError(
            f"the {split} split has {len(tokens)} tokens, fewer than one window of context_length + 1 = {T + 1}; "
            "use a longer text, a smaller context_length or another train_ratio"
        )
    if split == "training" and cfg.drop_last and len(windows) < cfg.batch_size:
        raise InputError(
            f"the training split has {len(windows)} windows, fewer than batch_size={cfg.batch_size}; "
            "lower batch_size, context_length or stride, or pass --no-drop-last"
        )
    return windows


class Windows:
    """Random access to the windows of a token array: window i starts at token i * stride."""

    def __init__(self, tokens: Tokens, context_length: int, stride: int) -> None:
        self._tokens, self._context_length = tokens, context_length
        self._starts = range(0, len(tokens) - context_length, stride)  # a window needs the token after it too

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Window:
        start = self._starts[i]
        tokens = np.asarray(self._tokens[start : start + self._context_length + 1], np.int32)
        return tokens[:-1], tokens[1:]
