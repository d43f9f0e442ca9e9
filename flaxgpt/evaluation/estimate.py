"""The numbers of an evaluation with their standard errors, from sums over blocks of the text. Knows no framework."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

BLOCKS = 30
"""Stretches of equal length that a text is cut into. Schmeiser (1982, "Batch size effects in the analysis of simulation output", Operations
Research 30(3)) finds 10 to 30 to be enough: with more the blocks get shorter, and the dependence between neighbours larger."""


@dataclass(frozen=True)
class Estimate:
    """A number, and how far it would vary from one text of the same kind and length to another."""

    value: float | None
    """None: it is not defined (bits per byte of a text without bytes, or a perplexity too large for a float)."""
    standard_error: float | None
    """None: the value is, or there is less than a token in each block."""


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text. About 95 % of texts are within two standard errors."""

    loss: Estimate
    """Nats per token."""
    perplexity: Estimate
    """exp of the loss."""
    bits_per_byte: Estimate
    """The information of all scored tokens, in bits, for each byte of their text in UTF-8. It compares models of different tokenizers."""
    tokens: int
    """How many were scored: all but the first one."""
    bytes: int
    """Of the text of those tokens. The end-of-text token is no text; its loss counts, its name doesn't."""
    context: int
    """The most tokens that one was predicted from."""
    stride: int
    """Tokens between the starts of neighbouring windows."""


class BlockSums:
    """Nats, tokens and bytes, added up over BLOCKS stretches of the text, which come in order."""

    def __init__(self, n_tokens: int) -> None:
        """For so many scored tokens."""
        self._n_tokens, self._n_added = n_tokens, 0
        self._nats_K, self._tokens_K, self._bytes_K = np.zeros((3, BLOCKS))

    def add(self, nats_N: np.ndarray, bytes_N: np.ndarray) -> None:
        """The next tokens: the loss of each, and the bytes of its text."""
        block_N = (self._n_added + np.arange(len(nats_N))) * BLOCKS // self._n_tokens
        self._n_added += len(nats_N)
        for sums_K, values_N in ((self._nats_K, nats_N), (self._tokens_K, None), (self._bytes_K, bytes_N)):
            sums_K += np.bincount(block_N, values_N, minlength=BLOCKS)

    def evaluation(self, context: int, stride: int) -> Evaluation:
        """The numbers, once all tokens were added."""
        loss = ratio(self._nats_K, self._tokens_K)
        perplexity = float(np.exp(np.float64(loss.value))) if loss.value < 700 else None
        error = None if None in (perplexity, loss.standard_error) else perplexity * loss.standard_error  # the derivative of exp is exp
        n_bytes = int(self._bytes_K.sum())
        bits_per_byte = ratio(self._nats_K / math.log(2), self._bytes_K)
        return Evaluation(loss, Estimate(perplexity, error), bits_per_byte, self._n_added, n_bytes, context, stride)


def ratio(above_K: np.ndarray, below_K: np.ndarray) -> Estimate:
    """sum(above) / sum(below), and its standard error from how the K blocks differ.

    Tokens of one text are not independent: a hard passage is hard for many tokens, so the standard deviation of single losses over the
    root of their number would be far too small, and that of windows of a few hundred tokens still is. Blocks of a thirtieth of the text are
    nearly independent where dependence does not reach that far (the method of batch means; Schmeiser 1982), which can't be hoped for in a
    text of less than some thousand tokens: there the true error is larger. The error itself is known to about 13 %, 1 / sqrt(2 (K - 1)).
    Being a ratio of two sums, it is linearised (Cochran 1977, Sampling Techniques, chapter 6).

    Args:
        above_K: sums of each block.
        below_K: likewise.
    """
    K, above, below = len(above_K), float(above_K.sum()), float(below_K.sum())
    if not below:
        return Estimate(None, None)
    value = above / below
    if not below_K.all():
        return Estimate(value, None)
    residuals_K = above_K - value * below_K
    return Estimate(value, math.sqrt(K / (K - 1) * float(residuals_K @ residuals_K)) / below)
