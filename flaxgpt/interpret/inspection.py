"""What a model makes of a text, as arrays on the host: everything that tables, pictures and the page are made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
