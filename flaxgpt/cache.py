"""The key-value cache: what the blocks have computed for earlier tokens, as a pytree that goes in and comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flaxgpt.config import GPTConfig
from flaxgpt.sharding import placed


class LayerCache(NamedTuple):
    """One block's keys and values, for S slots of each row, and what it needs to add T tokens, each attending to the slots it can see."""

    k_BNSH: jax.Array
    v_BNSH: jax.Array
    filled: jax.Array  # (), the slot of the first new token
    visible_B1TS: jax.Array  # which slots each new token attends to

    def extend(self, k_BNTH: jax.Array, v_BNTH: jax.Array) -> LayerCache:
        """The cache with the T tokens in it.

        Raises:
            ValueError: it has fewer than T slots.
        """
        T, S = k_BNTH.shape[2], self.k_BNSH.shape[2]
        if T > S:
            raise ValueError(f"{T} tokens do not fit in a cache of {S} slots")
        k_BNSH, v_BNSH = (
            jax.lax.dynamic_update_slice_in_dim(old_BNSH, new_BNTH, self.filled, axis=2)
            for old_BNSH, new_BNTH in ((self.k_BNSH, k_BNTH), (self.v_BNSH, v_BNTH))
        )
        return self._replace(k_BNSH=k_BNSH, v_BNSH=v_BNSH)


class Cache(NamedTuple):
    """Keys and values of every block. Slots before `first_B` hold padding, from `filled` on nothing.

    Every row writes to the same slot at the same time; rows of different lengths begin at different slots. So one
    update serves the whole batch, and a position is a slot less the row's first one.
    """

    kv: tuple[tuple[jax.Array, jax.Array], ...]  # k_BNSH and v_BNSH of each block
    first_B: jax.Array
    filled: jax.Array

    @classmethod
    def empty(cls, cfg: GPTConfig, first_B: jax.Array, slots: int) -> Cache:
        """A cache with nothing in it; row b is to begin at slot first_B[b]."""
        empty_BNSH = placed(jnp.zeros((first_B.shape[0], cfg.n_heads, slots, cfg.emb_dim // cfg.n_heads), cfg.dtype), "BNSH")
        return cls(((empty_BNSH, empty_BNSH),) * cfg.n_layers, first_B, jnp.int32(0))

    @property
    def slots(self) -> int:
        """S, the tokens that a row can hold, padding included."""
        return self.kv[0][0].shape[2]

    def layers(self, T: int) -> list[LayerCache]:
        """What each block is given with T more tokens."""
        visible_B1TS = self.visible_BTS(T)[:, None]
        return [LayerCache(k_BNSH, v_BNSH, self.filled, visible_B1TS) for k_BNSH, v_BNSH in self.kv]

    def with_layers(self, layers: Sequence[LayerCache]) -> Cache:
        """The cache made of what the blocks returned, T tokens longer."""
        T = layers[0].visible_B1TS.shape[2]
        return Cache(tuple((layer.k_BNSH, layer.v_BNSH) for layer in layers), self.first_B, self.filled + T)

    def positions_BT(self, T: int) -> jax.Array:
        """Positions of the T tokens to come; 0 for padding."""
        return jnp.maximum(self.filled + jnp.arange(T) - self.first_B[:, None], 0)

    def visible_BTS(self, T: int) -> jax.Array:
        """Which slots each of the T tokens to come attends to: from the row's first to its own.

        Padding attends to itself, since a softmax over nothing would be nan, and nan times zero weight is nan as well.
        """
        slots_S = jnp.arange(self.slots)
        own_T1 = (self.filled + jnp.arange(T))[:, None]
        return (slots_S <= own_T1) & (slots_S >= self.first_B[:, None, None]) | (slots_S == own_T1)
