"""A long text as windows of what the model can see, each of its tokens scored in one of them."""

from __future__ import annotations

import numpy as np

from flaxgpt.data.token_files import Tokens
from flaxgpt.errors import InputError
from flaxgpt.types import Batch

UNSCORED = -1
"""The target where a window scores nothing: the token was scored before, or there is none."""


class SlidingWindows:
    """The batches of a text, all of one shape: a sequence of (inputs_BT, targets_BT), int32.

    Window i shows the model `context` tokens from token `i * stride` on, and asks it for the token after each of them. Those that the
    window before has scored are UNSCORED. So every token but the first is scored once, in the order of the text, with at least
    `context - stride + 1` tokens before it, or all that there are.

    It is the sliding window of Hugging Face's guide (https://huggingface.co/docs/transformers/perplexity), but for one token: the guide
    asks a window only for tokens that it shows, so that its windows of C tokens are those of `context = C - 1` here. In return, windows
    that don't overlap (`stride = context`, as in training) leave no token out.
    """

    def __init__(self, tokens: Tokens, *, context: int, stride: int, batch_size: int, multiple: int = 1) -> None:
        """Nothing is read before a batch is asked for.

        Args:
            tokens: (number of tokens,), of any integer type; it may be memory-mapped.
            context: the most tokens to predict one from.
            stride: tokens between the starts of neighbouring windows, 1 to `context`.
            batch_size: the most windows in a batch. The last batch is filled up with windows that score nothing.
            multiple: T is rounded up to a multiple of it; what is added scores nothing.

        Raises:
            InputError: a value is out of range, or there are fewer than two tokens.
        """
        if not 1 <= stride <= context:
            raise InputError(f"stride={stride}: expected 1 to the context, {context}; a larger one would leave tokens out")
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: expected at least 1")
        if len(tokens) < 2:
            raise InputError(f"the text has {len(tokens)} tokens: expected at least 2, since the first one is predicted from nothing")
        self.n_scored = len(tokens) - 1
        self.context, self.stride = min(context, self.n_scored), stride
        self.n_windows = 1 + max(0, -(-(self.n_scored - context) // stride))
        self._tokens = tokens
        self._shape = min(batch_size, self.n_windows), -(-self.context // multiple) * multiple

    def __len__(self) -> int:
        return -(-self.n_windows // self._shape[0])

    def __getitem__(self, i: int) -> Batch:
        if not 0 <= i < len(self):
            raise IndexError(i)
        B = self._shape[0]
        inputs_BT, targets_BT = np.zeros(self._shape, np.int32), np.full(self._shape, UNSCORED, np.int32)
        for b, window in enumerate(range(i * B, min(i * B + B, self.n_windows))):
            start = window * self.stride
            tokens = self._tokens[start : start + self.context + 1]
            seen = self.context - self.stride if window else 0  # targets that the window before has scored
            inputs_BT[b, : len(tokens) - 1] = tokens[:-1]
            targets_BT[b, seen : len(tokens) - 1] = tokens[1 + seen :]
        return inputs_BT, targets_BT
