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

    Rows and heads are one axis, Z: of all layouts that were tried, XLA on a CPU updates and reads only this one in place.
    """

    k_ZSH: jax.Array
    v_ZSH: jax.Array
    first_B: jax.Array
    filled: jax.Array

    def extend(self, k_BTNH: jax.Array, v_BTNH: jax.Array) -> LayerCache:
        """The cache with T more slots filled, for all rows.

        Raises:
            ValueError: it has fewer than T slots.
        """
        T, S = k_BTNH.shape[1], self.k_ZSH.shape[1]
        if T > S:
            raise ValueError(f"{T} tokens do not fit in a cache of {S} slots")
        k_ZSH, v_ZSH = (
            jax.lax.dynamic_update_slice_in_dim(old_ZSH, _heads_apart(new_BTNH), self.filled, axis=1)
            for old_ZSH, new_BTNH in ((self.k_ZSH, k_BTNH), (self.v_ZSH, v_BTNH))
        )
        return LayerCache(k_ZSH, v_ZSH, self.first_B, self.filled + T)

    def attend(self, q_BTNH: jax.Array) -> jax.Array:
        """What the queries of the T newest tokens gather, (B, T, N, H). The mathematics of `model.MultiHeadAttention`."""
        B, T, N, H = q_BTNH.shape
        wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
        scores_ZTS = jnp.einsum("ZTH,ZSH->ZTS", _heads_apart(q_BTNH), self.k_ZSH, preferred_element_type=wide)
        scores_BNTS = scores_ZTS.reshape(B, N, T, -1) * H**-0.5
        weights_BNTS = jax.nn.softmax(jnp.where(self.visible_BTS(T)[:, None], scores_BNTS, -jnp.inf))
        context_ZTH = jnp.einsum("ZTS,ZSH->ZTH", weights_BNTS.astype(q_BTNH.dtype).reshape(scores_ZTS.shape), self.v_ZSH)
        return context_ZTH.reshape(B, N, T, H).swapaxes(1, 2)

    def visible_BTS(self, T: int) -> jax.Array:
        """Which slots each of the T newest tokens attends to: from the row's first to its own.

        Padding attends to itself, since a softmax over nothing would be nan, and nan times zero weight is nan as well.
        """
        slots_S = jnp.arange(self.k_ZSH.shape[1])
        own_T1 = (self.filled - T + jnp.arange(T))[:, None]
        return (slots_S <= own_T1) & (slots_S >= self.first_B[:, None, None]) | (slots_S == own_T1)

    def next_positions_BT(self, T: int) -> jax.Array:
        """Positions of the T tokens to come; 0 for padding."""
        return jnp.maximum(self.filled + jnp.arange(T) - self.first_B[:, None], 0)


def empty_cache(cfg: GPTConfig, first_B: jax.Array, slots: int) -> tuple[LayerCache, ...]:
    """A cache for each block, with nothing in it; row b is to begin at slot first_B[b]."""
    empty_ZSH = jnp.zeros((first_B.shape[0] * cfg.n_heads, slots, cfg.emb_dim // cfg.n_heads), cfg.dtype)
    return (LayerCache(empty_ZSH, empty_ZSH, first_B, jnp.int32(0)),) * cfg.n_layers


def _heads_apart(x_BTNH: jax.Array) -> jax.Array:
    """(B, T, N, H) -> (Z, T, H)."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.swapaxes(1, 2).reshape(B * N, T, H)
