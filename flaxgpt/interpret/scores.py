"""What logits say: log-probabilities, entropy, ranks and the likeliest tokens. NumPy alone."""

from __future__ import annotations

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural log-probabilities over the last axis, in the dtype of the logits; sums are in float64. -inf stays -inf."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)).astype(logits.dtype)


def entropy(log_probs: np.ndarray) -> np.ndarray:
    """Over the last axis, in nats: 0 if one token has all probability, log V if all have the same."""
    probs = np.exp(log_probs)
    return -(probs * np.where(probs > 0, log_probs, 0)).sum(-1, dtype=np.float64)


def rank(logits: np.ndarray, ids: np.ndarray | int) -> np.ndarray:
    """The rank of one token for each row, int32, counted from 1: one more than there are likelier tokens, so equal ones share theirs.

    Args:
        logits: (..., V).
        ids: (...), token ids.
    """
    of_id = np.take_along_axis(logits, np.asarray(ids)[..., None], axis=-1)
    return (1 + (logits > of_id).sum(-1)).astype(np.int32)


def top_ids(logits_V: np.ndarray, k: int) -> np.ndarray:
    """Ids of the k likeliest tokens (of all, if there are fewer), likeliest first; equal ones in the order of their ids."""
    return np.argsort(-logits_V, kind="stable")[:k]
