"""Text generation: one compiled loop on the device, from a prompt to its continuation."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxgpt.config import GPTConfig
from flaxgpt.errors import InputError
from flaxgpt.model import GPT
from flaxgpt.sampling import check_sampling, sample

_BUCKET = 64  # Buffers are multiples of this many tokens, so that a prompt of another length seldom compiles anew.


def generate(
    params: Any,
    cfg: GPTConfig,
    prompt_ids: Any,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Continue each row of a prompt by `max_new_tokens` tokens.

    Past the context length the model sees the last `context_length` tokens, positions numbered from 0 again, as the
    reference does. Each token costs one pass over that window.

    Args:
        params: the model's parameters.
        cfg: the model's config.
        prompt_ids: (B, T) token ids, T at least 1; longer than the context length is allowed.
        max_new_tokens: tokens to add to each row.
        temperature: 0 is greedy.
        top_k: draw among the k likeliest tokens.
        eos_id: a row that has produced this token goes on with nothing else; the loop ends when all rows have.
        key: a typed PRNG key, needed unless the temperature is 0; token number t (from 0) is drawn with fold_in(key, t).

    Returns:
        (B, T + max_new_tokens) int32, the prompt included.

    Raises:
        InputError: an empty prompt, ids outside the vocabulary, or settings that make no sense.
    """
    prompt_BT = np.asarray(prompt_ids)
    if prompt_BT.ndim != 2 or not prompt_BT.size:
        raise InputError(f"prompt_ids has the shape {prompt_BT.shape}: expected (batch, tokens), at least one token each")
    for name, ids in (("prompt_ids", prompt_BT), ("eos_id", np.asarray(0 if eos_id is None else eos_id))):
        if ids.min() < 0 or ids.max() >= cfg.vocab_size:
            raise InputError(f"{name} has values from {ids.min()} to {ids.max()}, outside the vocabulary of {cfg.vocab_size}")
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens={max_new_tokens}: expected at least 0")
    check_sampling(temperature, top_k, key)

    B, T = prompt_BT.shape
    total = T + max_new_tokens
    buffer_BS = np.zeros((B, -(-total // _BUCKET) * _BUCKET), np.int32)
    buffer_BS[:, :T] = prompt_BT
    key = jax.random.key(0) if key is None else key  # greedy decoding never looks at it
    return _decode(params, cfg, buffer_BS, T, total, key, temperature, top_k, eos_id)[:, :total]


@functools.partial(jax.jit, static_argnames=("cfg", "temperature", "top_k", "eos_id"))
def _decode(
    params: Any,
    cfg: GPTConfig,
    buffer_BS: jax.Array,
    start: jax.Array,
    end: jax.Array,
    key: jax.Array,
    temperature: float,
    top_k: int | None,
    eos_id: int | None,
) -> jax.Array:
    """Fill columns start to end of the buffer, one pass of the model for each."""
    model = GPT(cfg)
    window = min(cfg.context_length, buffer_BS.shape[1])

    def unfinished(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        _, position, ended_B = carry
        return (position < end) & ~ended_B.all()

    def add_token(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        buffer_BS, position, ended_B = carry
        # The last `window` tokens before `position`, or the first of the buffer while there are fewer: what lies at
        # and after `position` is not seen, since attention is causal.
        first = jnp.maximum(position - window, 0)
        tokens_BT = jax.lax.dynamic_slice_in_dim(buffer_BS, first, window, axis=1)
        x_BTD = model.apply({"params": params}, tokens_BT, method="features")
        x_B1D = jax.lax.dynamic_slice_in_dim(x_BTD, position - first - 1, 1, axis=1)
        logits_BV = model.apply({"params": params}, x_B1D, method="logits")[:, 0]
        ids_B = sample(logits_BV, jax.random.fold_in(key, position - start), temperature, top_k)
        if eos_id is not None:
            ids_B = jnp.where(ended_B, eos_id, ids_B)
            ended_B = ended_B | (ids_B == eos_id)
        return buffer_BS.at[:, position].set(ids_B), position + 1, ended_B

    ended_B = jnp.zeros(buffer_BS.shape[0], bool)
    if eos_id is not None:  # an early end leaves the rest of each row at the end token
        buffer_BS = jnp.where(jnp.arange(buffer_BS.shape[1]) < start, buffer_BS, eos_id)
    return jax.lax.while_loop(unfinished, add_token, (buffer_BS, start, ended_B))[0]
