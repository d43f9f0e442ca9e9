"""What an inspection says, in plain values: what the tables show and the JSON holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from flaxgpt.interpret.inspection import Inspection
from flaxgpt.interpret.scores import log_softmax, rank, top_ids

RAISE = 10
"""How far above the largest logit a token is promoted."""


@dataclass(frozen=True)
class Report:
    """All that was asked about a text; `dataclasses.asdict` is ready for `json.dumps`."""

    model: str
    seed: int
    text: str
    shape: tuple[int, int]
    """Of the logits: tokens of the text, tokens of the vocabulary."""
    places: list[Place]
    position: int
    """The one that all of the following is about, counted from 0; steps go on from the end of the text."""
    tokens: list[Candidate]
    """Those that were asked for by name."""
    draws: Draws | None = None
    steps: list[Step] | None = None
    promotion: Promotion | None = None
    lens: list[list[LayerPrediction]] | None = None
    """For each position, what each layer predicts."""
    attention: list[list[list[list[float]]]] | None = None
    """Weight by layer, head, position, and position that is attended to."""


@dataclass(frozen=True)
class Candidate:
    """A token that could come next."""

    id: int
    token: str
    """Its label."""
    logit: float | None
    """None: -inf."""
    probability: float
    rank: int


@dataclass(frozen=True)
class Place:
    """A position of a text: the token there, and what the model expects after it."""

    position: int
    id: int
    token: str
    surprise: float | None
    """-log p of the token itself, in nats; None: the first token, which nothing predicts."""
    entropy: float
    """Of the prediction, in nats."""
    next: Candidate | None
    """The token that does come; None: the text ends here."""
    top: list[Candidate]


@dataclass(frozen=True)
class Choice:
    """A token and the model's probability of it."""

    id: int
    token: str
    probability: float


@dataclass(frozen=True)
class Step:
    """A new token, and what the model expected in its place."""

    chosen: Choice
    top: list[Choice]


@dataclass(frozen=True)
class Draws:
    """Tokens in the order in which they were drawn, as the processed logits have them."""

    without_replacement: list[Candidate]
    with_replacement: list[Candidate]


@dataclass(frozen=True)
class LayerPrediction:
    """What the logit lens reads at one position of one layer."""

    layer: int
    """Blocks that the residual stream has been through."""
    top: list[Choice]
    next_probability: float | None
    next_rank: int | None
    """Of the true next token; None: the text ends here."""


@dataclass(frozen=True)
class Promotion:
    """The prediction at one position before, while and after a token's logit is raised."""

    token: Candidate
    """As it is before."""
    before: list[Candidate]
    promoted: list[Candidate]
    after: list[Candidate]
    identical: bool
    """Whether all logits of the text are, after, bit for bit what they were before."""


@dataclass(frozen=True)
class Word:
    """A word of a small vocabulary."""

    id: int
    word: str
    logit: float
    probabilities: list[float]
    """At each of the temperatures."""
    left_logit: float | None
    """After the processors; None: -inf."""
    left_probability: float
    draws: int
    """How often it was drawn with that probability."""


@dataclass(frozen=True)
class Words:
    """A vocabulary given by hand, and how its tokens are chosen."""

    argmax: str
    temperatures: list[float]
    count: int
    words: list[Word]


def candidates(logits_V: np.ndarray, labels_V: Sequence[str], ids: Iterable[int]) -> list[Candidate]:
    """These tokens, in this order, as these logits have them; equal logits share a rank."""
    ids = np.asarray([*ids], int)
    probs = np.exp(log_softmax(logits_V)[ids])
    ranks = [int(rank(logits_V, i)) for i in ids]
    rows = zip(ids.tolist(), logits_V[ids].tolist(), probs.tolist(), ranks, strict=True)
    return [Candidate(i, labels_V[i], logit if np.isfinite(logit) else None, prob, rank) for i, logit, prob, rank in rows]


def top_candidates(logits_V: np.ndarray, labels_V: Sequence[str], k: int) -> list[Candidate]:
    """The k likeliest tokens."""
    return candidates(logits_V, labels_V, top_ids(logits_V, k))


def places(inspection: Inspection, k: int) -> list[Place]:
    """Every position of the text, with its k likeliest next tokens."""
    ids, labels_V = inspection.ids_T.tolist(), inspection.labels_V
    return [
        Place(
            position=t,
            id=ids[t],
            token=labels_V[ids[t]],
            surprise=float(inspection.surprises_T[t]) if t else None,
            entropy=float(inspection.entropies_T[t]),
            next=candidates(logits_V, labels_V, ids[t + 1 : t + 2])[0] if t + 1 < len(ids) else None,
            top=top_candidates(logits_V, labels_V, k),
        )
        for t, logits_V in enumerate(inspection.logits_TV)
    ]


def layer_predictions(inspection: Inspection, position: int) -> list[LayerPrediction]:
    """What each layer predicts at a position, counted from 0. The inspection has a lens."""
    lens, last = inspection.lens, len(inspection.ids_T) - 1
    return [
        LayerPrediction(
            layer=m,
            top=choices(zip(lens.top_ids_MTK[m, position], lens.top_log_probs_MTK[m, position], strict=True), inspection.labels_V),
            next_probability=None if position == last else float(np.exp(lens.next_log_probs_MT[m, position])),
            next_rank=None if position == last else int(lens.next_ranks_MT[m, position]),
        )
        for m in range(len(lens.top_ids_MTK))
    ]


def choices(scored: Iterable[tuple[int, float]], labels_V: Sequence[str]) -> list[Choice]:
    """Pairs of id and log-probability."""
    return [Choice(int(i), labels_V[i], float(np.exp(log_prob))) for i, log_prob in scored]


def promotion(
    before_TV: np.ndarray, promoted_TV: np.ndarray, after_TV: np.ndarray, labels_V: Sequence[str], position: int, token: int, k: int
) -> Promotion:
    """What raising a token's logit has changed, in the k likeliest tokens of that position."""
    tops = [top_candidates(logits_TV[position], labels_V, k) for logits_TV in (before_TV, promoted_TV, after_TV)]
    (of_token,) = candidates(before_TV[position], labels_V, [token])
    return Promotion(of_token, *tops, identical=before_TV.tobytes() == after_TV.tobytes())


def words(names: Sequence[str], logits_V: np.ndarray, left_V: np.ndarray, draws: np.ndarray, temperatures: Sequence[float]) -> Words:
    """A vocabulary with its logits, what the processors left of them, and the ids that were drawn."""
    left = candidates(left_V, names, range(len(names)))
    at_temperature = np.exp([log_softmax(logits_V / temperature) for temperature in temperatures]).T.tolist()
    counts = np.bincount(draws, minlength=len(names)).tolist()
    rows = zip(left, logits_V.tolist(), at_temperature, counts, strict=True)
    each = [Word(row.id, row.token, logit, probs, row.logit, row.probability, count) for row, logit, probs, count in rows]
    return Words(names[int(logits_V.argmax())], [*temperatures], len(draws), each)
