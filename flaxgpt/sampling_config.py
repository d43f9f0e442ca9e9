"""How a token is chosen: one frozen dataclass. No framework here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from flaxgpt.config import _Config
from flaxgpt.errors import InputError


@dataclass(frozen=True)
class SamplingConfig(_Config):
    """Settings in the order in which they act: the first five always, the others when drawing (temperature above 0)."""

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> what is added to its logit."""
    repetition_penalty: float | None = None
    """Divides positive logits of the tokens in the prompt and in the new text, multiplies negative ones (Keskar et al. 2019)."""
    presence_penalty: float | None = None
    """Subtracted from the logits of the tokens in the new text."""
    frequency_penalty: float | None = None
    """Subtracted from them once for each time they occur there."""
    banned: tuple[int, ...] = ()
    """Token ids that are never chosen."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token (the first of equal ones)."""
    top_k: int | None = None
    """Draw among the k largest logits, and those equal to the k-th; more than V means all."""
    top_p: float | None = None
    """Draw among the fewest likeliest tokens that have this probability together, in (0, 1] (Holtzman et al. 2020)."""
    min_p: float | None = None
    """Draw among the tokens at least this many times as likely as the likeliest, in [0, 1]."""

    def __post_init__(self) -> None:
        self._check_types()
        # Logits divided by less would no longer be finite in float32.
        self._require("temperature", lambda v: v == 0 or 1e-6 <= v < math.inf, "0 (greedy) or a positive number, at least 1e-6")
        self._require("top_k", lambda v: v >= 1, "at least 1, or none at all")
        self._require("top_p", lambda v: 0 < v <= 1, "a value in (0, 1]")
        self._require("min_p", lambda v: 0 <= v <= 1, "a value in [0, 1]")
        self._require("repetition_penalty", lambda v: 0 < v < math.inf, "a positive number (1 changes nothing)")
        self._require("presence_penalty frequency_penalty", math.isfinite, "a finite number")
        self._require("logit_bias", lambda bias: all(math.isfinite(v) for v in bias.values()), "finite numbers; to exclude a token, ban it")

    def check_vocabulary(self, vocab_size: int) -> None:
        """InputError if a token id is outside the vocabulary, or none is left to choose."""
        for name in ("logit_bias", "banned"):
            if outside := [i for i in getattr(self, name) if not 0 <= i < vocab_size]:
                raise InputError(f"{name} names token ids {outside[:5]}, outside the vocabulary of {vocab_size}")
        if len(set(self.banned)) == vocab_size:
            raise InputError("banned names every token of the vocabulary: there is none left to choose")

    @property
    def penalises(self) -> bool:
        """Whether what has been written so far matters."""
        return any(penalty is not None for penalty in (self.repetition_penalty, self.presence_penalty, self.frequency_penalty))
