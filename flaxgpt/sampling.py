"""Logits -> token ids."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from flaxgpt.errors import InputError


def sample(logits_BV: jax.Array, key: jax.Array | None, temperature: float = 1.0, top_k: int | None = None) -> jax.Array:
    """Draw one token id for each row: int32 ids_B.

    Args:
        logits_BV: float32.
        key: a typed PRNG key; None will do at temperature 0.
        temperature: divides the logits; 0 takes the likeliest token (the first of equal ones).
        top_k: draw among the k largest logits, and those equal to the k-th; more than V means all.

    Raises:
        InputError: temperature is negative or not finite, top_k is below 1, or there is no key to draw with.
    """
    check_sampling(temperature, top_k, key)
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, keep_top_k(logits_BV, top_k) / temperature).astype(jnp.int32)


def gumbel_noise(key: jax.Array, t: int, shape_BV: tuple[int, int]) -> jax.Array:
    """What `generate` adds to the processed logits of new token t (from 0) before it takes the largest: a draw, by the Gumbel-max trick."""
    return jax.random.gumbel(jax.random.fold_in(key, t), shape_BV)


def keep_top_k(logits_BV: jax.Array, top_k: int | None) -> jax.Array:
    """The logits with those below the k-th largest of their row set to -inf; ties with it stay."""
    if top_k is None:
        return logits_BV
    kth_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
    return jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)


def check_sampling(temperature: float, top_k: int | None, key: jax.Array | None) -> None:
    """Raise InputError for settings that `sample` can't follow."""
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise InputError(f"temperature={temperature}: expected 0 (greedy) or a positive number")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k={top_k}: expected at least 1, or none at all")
    if temperature > 0 and key is None:
        raise InputError(f"temperature={temperature} draws at random: pass a key, or temperature 0 for greedy decoding")
