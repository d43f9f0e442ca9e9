"""Logits -> token ids: the chain of processors, and the draw."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxgpt.config import SamplingConfig
from flaxgpt.errors import InputError
from flaxgpt.generation import processors

Function = Callable[[jax.Array], jax.Array]
"""A processor of the user's: logits_BV -> logits_BV, that can be traced."""


class Seen(NamedTuple):
    """What the penalties look at."""

    prompt_BV: jax.Array  # bool: occurs in the prompt
    counts_BV: jax.Array  # int32: how often in the new text


def sample(
    logits_BV: jax.Array,
    key: jax.Array | None,
    temperature: float = 1.0,
    top_k: int | None = None,
    *,
    seen: Seen | None = None,
    functions: tuple[Function, ...] = (),
    **settings: Any,
) -> jax.Array:
    """Choose one token id for each row: int32 ids_B.

    Args:
        logits_BV: any float dtype.
        key: a typed PRNG key, row b draws with fold_in(key, b); or an array of B keys, one for each. None at temperature 0.
        temperature: divides the logits; 0 takes the likeliest token (the first of equal ones).
        top_k: draw among the k largest logits, and those equal to the k-th; more than V means all.
        seen: what was written so far, needed by the penalties.
        functions: called on the logits after everything else, in this order.
        **settings: the other fields of SamplingConfig.

    Raises:
        InputError: a setting makes no sense, there is no key to draw with, or a penalty but nothing seen.
    """
    config = SamplingConfig(temperature=temperature, top_k=top_k, **settings)
    config.check_vocabulary(logits_BV.shape[-1])
    if config.penalises and seen is None:
        raise InputError("penalties depend on what was written: pass seen=Seen(prompt_BV, counts_BV)")
    return choose(Chain.of(config, functions)(logits_BV, seen), row_keys(config, key, logits_BV.shape[0]))


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

    numbers: dict[str, Any]  # only what is switched on
    top_k: int | None
    functions: tuple[Function, ...]

    @classmethod
    def of(cls, config: SamplingConfig, functions: tuple[Function, ...] = ()) -> Chain:
        """The chain that these settings describe. Greedy choice needs nothing that only takes unlikely tokens away."""
        names = "repetition_penalty", "presence_penalty", "frequency_penalty"
        drawing = config.temperature > 0
        if drawing:
            names += "temperature", "top_p", "min_p"
        numbers = {name: np.float32(value) for name in names if (value := getattr(config, name)) is not None}
        if config.top_p == 1:  # keeps everything, but for rounding
            numbers.pop("top_p", None)
        if config.logit_bias:
            bias = config.logit_bias
            numbers["bias"] = np.fromiter(bias.keys(), np.int32), np.fromiter(bias.values(), np.float32)
        if config.banned:
            numbers["banned"] = np.asarray(config.banned, np.int32)
        return cls(numbers, config.top_k if drawing else None, tuple(functions))

    def __call__(self, logits_BV: jax.Array, seen: Seen | None = None) -> jax.Array:
        """The float32 logits to choose by, in the order of Hugging Face's `generate`."""
        logits_BV, numbers = logits_BV.astype(jnp.float32), self.numbers
        if "bias" in numbers:
            logits_BV = processors.add_bias(logits_BV, *numbers["bias"])
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


def row_keys(config: SamplingConfig, key: jax.Array | None, B: int) -> jax.Array | None:
    """A key for each of B rows, or None for greedy choice.

    Raises:
        InputError: there is no key to draw with, or not one for each row.
    """
    if config.temperature == 0:
        return None
    if key is None:
        raise InputError(f"temperature={config.temperature} draws at random: pass a key, or temperature 0 for greedy decoding")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), (B,)):
        raise InputError(f"key is {key.dtype}{list(key.shape)}: expected one typed key (jax.random.key), or {B}, one for each row")
    return _keys_of_rows(key, B)


def choose(logits_BV: jax.Array, keys_B: jax.Array | None, t: int | jax.Array | None = None) -> jax.Array:
    """Token ids from processed logits: the likeliest without keys, else a draw, of new token number t if there are many."""
    if keys_B is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B if t is None else _token_keys(keys_B, t), logits_BV).astype(jnp.int32)


def _keys_of_rows(key: jax.Array, B: int) -> jax.Array:
    return key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))


def _token_keys(keys_B: jax.Array, t: int | jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys_B, t)
