"""What a model makes of a text, as arrays on the host: everything that tables, pictures and the page are made of."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from flaxgpt.interpret.scores import entropy, log_softmax, rank


@dataclass(frozen=True)
class Inspection:
    """A forward pass over the T tokens of one text.

    Logarithms are natural, so surprise and entropy are in nats. Ranks count from 1, the likeliest token. What belongs to position t is
    about the token after it: `next_ranks_T[t]` is the rank of the token at t + 1; of the last position there is no such token.
    """

    ids_T: np.ndarray
    """int32 token ids."""
    labels_V: tuple[str, ...]
    """What each token of the vocabulary is called where it is shown (see `flaxgpt.interpret.labels`)."""
    logits_TV: np.ndarray
    """float32."""
    lens: Lens | None = None
    """Each layer's prediction, if it was asked for."""
    weights_LNTS: np.ndarray | None = None
    """float32 attention weights of layer, head, query position T and key position S, if they were asked for."""

    @functools.cached_property
    def log_probs_TV(self) -> np.ndarray:
        """float32."""
        return log_softmax(self.logits_TV)

    @functools.cached_property
    def entropies_T(self) -> np.ndarray:
        """float64: how undecided each prediction is."""
        return entropy(self.log_probs_TV)

    @functools.cached_property
    def next_log_probs_T(self) -> np.ndarray:
        """float32, of the true next token; nan at the last position."""
        next_T1 = self.ids_T[1:, None]
        return np.append(np.take_along_axis(self.log_probs_TV[:-1], next_T1, axis=1)[:, 0], np.float32(np.nan))

    @functools.cached_property
    def next_ranks_T(self) -> np.ndarray:
        """int32, of the true next token; equal logits share a rank; 0 at the last position."""
        return np.append(rank(self.logits_TV[:-1], self.ids_T[1:]), np.int32(0))

    @functools.cached_property
    def surprises_T(self) -> np.ndarray:
        """float32: -log p of each token itself, given those before it; nan for the first, which nothing predicts."""
        return np.append(np.float32(np.nan), -self.next_log_probs_T[:-1])


@dataclass(frozen=True)
class Lens:
    """The logit lens (nostalgebraist 2020): what the final norm and the head make of the residual stream of each layer.

    It is read after the embedding and after each block, so there are M = L + 1 predictions for each position; the last is the model's own.
    """

    top_ids_MTK: np.ndarray
    """int32, likeliest first."""
    top_log_probs_MTK: np.ndarray
    next_log_probs_MT: np.ndarray
    """Of the true next token; nan at the last position."""
    next_ranks_MT: np.ndarray
    """int32; 0 at the last position."""
