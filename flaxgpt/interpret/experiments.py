"""What can be tried at a position: draws, a token at a time, an intervention; and draws from logits given by hand."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flaxgpt.config import GPTConfig, SamplingConfig
from flaxgpt.data.tokenizer import Tokenizer
from flaxgpt.edits import apply
from flaxgpt.errors import InputError
from flaxgpt.generation.sampling import Chain, Seen, draw_without_replacement
from flaxgpt.generation.text import complete_text
from flaxgpt.interpret.inspection import Inspection
from flaxgpt.interpret.report import RAISE, Draws, Promotion, Step, Words, candidates, choices, promotion, words
from flaxgpt.model import forward
from flaxgpt.types import Params


def draw_tokens(inspection: Inspection, position: int, sampling: SamplingConfig, key: jax.Array, n: int) -> Draws:
    """Draw n tokens to follow a position, without replacement (or as many as the processors leave, if these are fewer) and with it.

    Args:
        inspection: the text and its logits.
        position: counted from 0; the penalties look at the text up to here.
        sampling: the processors; greedy choice has nothing to draw, so temperature 0 is 1 here.
        key: a typed PRNG key.
        n: at least 1.

    Raises:
        InputError: the processors name tokens outside the vocabulary, or what they leave is not finite.
    """
    processed_V = _process(inspection.logits_TV[position], sampling, inspection.ids_T[: position + 1])
    left = int(jnp.isfinite(processed_V).sum())
    without_key, with_key = jax.random.split(key)
    ids = draw_without_replacement(processed_V, without_key, min(n, left)), _draw(processed_V, with_key, n)
    return Draws(*(candidates(np.asarray(processed_V), inspection.labels_V, np.asarray(drawn)) for drawn in ids))


def go_on(
    params: Params,
    cfg: GPTConfig,
    tokenizer: Tokenizer,
    text: str,
    labels_V: Sequence[str],
    n: int,
    k: int,
    sampling: SamplingConfig,
    key: jax.Array,
) -> list[Step]:
    """Continue a text by n tokens, keeping the k likeliest at each step (the model's own probabilities, before any processor)."""
    k = min(k, cfg.vocab_size)
    (done,) = complete_text(params, cfg, tokenizer, [text], n, sampling, key=key, top_log_probs=k)
    chosen = choices(zip(done.ids, done.log_probs, strict=True), labels_V)
    return [Step(choice, choices(top, labels_V)) for choice, top in zip(chosen, done.top, strict=True)]


def promote(params: Params, cfg: GPTConfig, inspection: Inspection, position: int, token: int, k: int) -> Promotion:
    """Raise a token's logit at a position above all others by `RAISE`, then take the intervention away again."""

    def raised(logits_BTV: jax.Array) -> jax.Array:
        return logits_BTV.at[..., token].set(logits_BTV.max(-1) + RAISE)

    edits = {"logits": apply(raised, positions=position)}
    passes = [
        jax.jit(functools.partial(forward, cfg=cfg, edits=edits))(params, tokens_BT=inspection.ids_T[None])[0] for edits in ({}, edits, {})
    ]
    return promotion(*map(np.asarray, passes), inspection.labels_V, position, token, k)


def choose_among(logits: Mapping[str, float], sampling: SamplingConfig, temperatures: Sequence[float], count: int, key: jax.Array) -> Words:
    """A vocabulary of a few words: its probabilities at some temperatures, what the processors leave, and draws from that.

    Args:
        logits: by word.
        sampling: as in `draw_tokens`.
        temperatures: positive.
        count: how many to draw.
        key: a typed PRNG key.
    """
    logits_V = np.fromiter(logits.values(), np.float32)
    left_V = _process(logits_V, sampling, np.zeros(0, int))
    return words([*logits], logits_V, np.asarray(left_V), np.asarray(_draw(left_V, key, count)), temperatures)


def _process(logits_V: np.ndarray, sampling: SamplingConfig, seen_T: np.ndarray) -> jax.Array:
    V = len(logits_V)
    sampling.check_vocabulary(V)
    drawing = sampling if sampling.temperature else sampling.replace(temperature=1.0)
    seen = Seen(jnp.zeros((1, V), bool).at[0, seen_T].set(True), jnp.zeros((1, V), jnp.int32))
    left_V = Chain.of(drawing)(jnp.asarray(logits_V)[None], seen)[0]
    if not (left_V < jnp.inf).all():
        raise InputError("what the flags of sampling leave of the logits is not finite: choose less extreme values")
    return left_V


@functools.partial(jax.jit, static_argnames="n")
def _draw(logits_V: jax.Array, key: jax.Array, n: int) -> jax.Array:
    """With replacement; a few at a time, since each draw takes noise for the whole vocabulary."""
    return jax.lax.map(lambda key: jax.random.categorical(key, logits_V), jax.random.split(key, n), batch_size=64)
