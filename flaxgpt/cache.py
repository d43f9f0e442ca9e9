"""The key-value cache: what a block has computed for earlier tokens, as a pytree that goes in and comes out."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flaxgpt.config import GPTConfig


class LayerCache(NamedTuple):
    """Keys and values of one block, for S slots of each row. Slots before `first_B` hold padding, from `filled` on nothing.

    Every row writes to the same slot at the same time; rows of different lengths begin at different slots. So one
    update serves the whole batch, and a position is a slot less the row's first one.
    """

    k_BNSH: jax.Array  # heads before slots: attention reads it as it lies, where (B, S, N, H) was copied at each token
    v_BNSH: jax.Array
    first_B: jax.Array
    filled: jax.Array

    def extend(self, k_BTNH: jax.Array, v_BTNH: jax.Array) -> LayerCache:
        """The cache with T more slots filled, for all rows."""
        if k_BTNH.shape[1] > self.k_BNSH.shape[2]:
            raise ValueError(f"{k_BTNH.shape[1]} tokens do not fit in a cache of {self.k_BNSH.shape[2]} slots")
        k_BNSH, v_BNSH = (
            jax.lax.dynamic_update_slice_in_dim(old_BNSH, new_BTNH.swapaxes(1, 2), self.filled, axis=2)
            for old_BNSH, new_BTNH in ((self.k_BNSH, k_BTNH), (self.v_BNSH, v_BTNH))
        )
        return LayerCache(k_BNSH, v_BNSH, self.first_B, self.filled + k_BTNH.shape[1])

    def visible_BTS(self, T: int) -> jax.Array:
        """Which slots each of the T newest tokens attends to: from the row's first to its own.

        Padding attends to itself, since a softmax over nothing would be nan, and nan times zero weight is nan as well.
        """
        slots_S = jnp.arange(self.k_BNSH.shape[2])
        own_T1 = (self.filled - T + jnp.arange(T))[:, None]
        return (slots_S <= own_T1) & (slots_S >= self.first_B[:, None, None]) | (slots_S == own_T1)

    def next_positions_BT(self, T: int) -> jax.Array:
        """Positions of the T tokens to come; 0 for padding."""
        return jnp.maximum(self.filled + jnp.arange(T) - self.first_B[:, None], 0)


def empty_cache(cfg: GPTConfig, first_B: jax.Array, slots: int) -> tuple[LayerCache, ...]:
    """A cache for each block, with nothing in it; row b is to begin at slot first_B[b]."""
    shape = (first_B.shape[0], cfg.n_heads, slots, cfg.emb_dim // cfg.n_heads)
    empty = jnp.zeros(shape, cfg.dtype)
    return (LayerCache(empty, empty, first_B, jnp.int32(0)),) * cfg.n_layers
