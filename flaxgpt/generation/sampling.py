"""Logits -> token ids: the chain of processors, and the draw."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flaxgpt.config import SamplingConfig
from flaxgpt.errors import InputError
from flaxgpt.generation import processors

Function = Callable[[jax.Array], jax.Array]
"""A processor of the user's: logits_BV -> logits_BV, that can be traced."""


class Seen(NamedTuple):
    """What the penalties look at."""

    prompt_BV: jax.Array  # bool: occurs in the prompt
    counts_BV: jax.Array  # int32: how often in the new text


@functools.partial(jax.jit, static_argnames="shape_BV")
def gumbel_noise(key: jax.Array, t: int | jax.Array, shape_BV: tuple[int, int]) -> jax.Array:
    """The noise that decides new token number t (from 0): it is argmax(processed logits + noise), row by row.

    This is what `jax.random.categorical` adds (the Gumbel-max trick); given to another implementation, it makes that one
    draw the same tokens.
    """
    return jax.vmap(lambda key: jax.random.gumbel(key, shape_BV[1:], jnp.float32))(_token_keys(_keys_of_rows(key, shape_BV[0]), t))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["numbers"], meta_fields=["top_k", "functions"])
@dataclass(frozen=True)
class Chain:
    """Settings as one function (logits, seen) -> logits. Its numbers can change without compiling anew."""

    numbers: dict[str, ArrayLike | tuple[ArrayLike, ArrayLike]]  # only what is switched on
    top_k: int | None
    functions: tuple[Function, ...]

    @classmethod
    def of(cls, sampling: SamplingConfig, functions: Sequence[Function] = ()) -> Chain:
        """The chain that these settings describe. Greedy choice needs nothing that only takes unlikely tokens away."""
        names = "repetition_penalty", "presence_penalty", "frequency_penalty"
        drawing = sampling.temperature > 0
        if drawing:
            names += "temperature", "top_p", "min_p"
        numbers = {name: np.float32(value) for name in names if (value := getattr(sampling, name)) is not None}
        if sampling.top_p == 1:  # keeps everything, but for rounding
            numbers.pop("top_p", None)
        if bias := sampling.logit_bias:
            numbers["logit_bias"] = np.fromiter(bias.keys(), np.int32), np.fromiter(bias.values(), np.float32)
        if sampling.banned:
            numbers["banned"] = np.asarray(sampling.banned, np.int32)
        return cls(numbers, sampling.top_k if drawing else None, tuple(functions))

    def __call__(self, logits_BV: jax.Array, seen: Seen | None = None) -> jax.Array:
        """The float32 logits to choose by, in the order of Hugging Face's `generate`."""
        logits_BV, numbers = logits_BV.astype(jnp.float32), self.numbers
        if "logit_bias" in numbers:
            logits_BV = processors.add_bias(logits_BV, *numbers["logit_bias"])
        if "repetition_penalty" in numbers:
            logits_BV = processors.penalise_repetition(logits_BV, seen.prompt_BV | (seen.counts_BV > 0), numbers["repetition_penalty"])
        if "presence_penalty" in numbers:
            logits_BV = processors.penalise_presence(logits_BV, seen.counts_BV, numbers["presence_penalty"])
        if "frequency_penalty" in numbers:
            logits_BV = processors.penalise_frequency(logits_BV, seen.counts_BV, numbers["frequency_penalty"])
        if "banned" in numbers:
            logits_BV = processors.ban(logits_BV, numbers["banned"])
        if "temperature" in numbers:
            logits_BV = logits_BV / numbers["temperature"]
        if self.top_k is not None:
            logits_BV = processors.keep_top_k(logits_BV, self.top_k)
        if "top_p" in numbers:
            logits_BV = processors.keep_top_p(logits_BV, numbers["top_p"])
        if "min_p" in numbers:
            logits_BV = processors.keep_min_p(logits_BV, numbers["min_p"])
        for function in self.functions:
            logits_BV = function(logits_BV)
        return logits_BV


def row_keys(sampling: SamplingConfig, key: jax.Array | None, B: int) -> jax.Array | None:
    """A key for each of B rows, or None for greedy choice.

    Raises:
        InputError: there is no key to draw with, or not one for each row.
    """
    if sampling.temperature == 0:
        return None
    if key is None:
        raise InputError(f"temperature={sampling.temperature} draws at random: pass a key, or temperature 0 for greedy decoding")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), (B,)):
        raise InputError(f"key is {key.dtype}{list(key.shape)}: expected one typed key (jax.random.key), or {B}, one for each row")
    return _keys_of_rows(key, B)


def choose(logits_BV: jax.Array, keys_B: jax.Array | None, t: int | jax.Array) -> jax.Array:
    """Token ids from processed logits, for new token number t (from 0): the likeliest without keys, else a draw."""
    if keys_B is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(_token_keys(keys_B, t), logits_BV).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="n")
def draw_without_replacement(logits_V: jax.Array, key: jax.Array, n: int) -> jax.Array:
    """int32 ids of n different tokens, in the order in which they are drawn: each time among those that are left (Kool et al. 2019).

    The Gumbel-max trick that `choose` draws by, with the n largest in place of the largest: the first is what
    `jax.random.categorical` draws with this key.

    Args:
        logits_V: processed logits, at least n of them finite.
        key: a typed PRNG key.
        n: tokens to draw.
    """
    return jax.lax.top_k(logits_V + jax.random.gumbel(key, logits_V.shape, logits_V.dtype), n)[1]


def _keys_of_rows(key: jax.Array, B: int) -> jax.Array:
    return key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))


def _token_keys(keys_B: jax.Array, t: int | jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys_B, t)
