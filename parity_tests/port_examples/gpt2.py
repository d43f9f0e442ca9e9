"""GPT-2 of `transformers` in Flax NNX: learned positions, layer norm, one matrix for queries, keys and values, tanh GELU, a tied head."""

import jax
import jax.numpy as jnp
from flax import nnx


class Attention(nnx.Module):
    def __init__(self, D, N, *, rngs):
        self.N = N
        self.qkv = nnx.Linear(D, 3 * D, rngs=rngs)
        self.out = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x_BTD):
        B, T, D = x_BTD.shape
        q_BTNH, k_BSNH, v_BSNH = (x.reshape(B, T, self.N, -1) for x in jnp.split(self.qkv(x_BTD), 3, axis=-1))
        scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) / q_BTNH.shape[-1] ** 0.5
        weights_BNTS = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores_BNTS, -jnp.inf))
        return self.out(jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH).reshape(B, T, D))


class Block(nnx.Module):
    def __init__(self, D, N, *, rngs):
        self.norm1 = nnx.LayerNorm(D, epsilon=1e-5, rngs=rngs)
        self.attention = Attention(D, N, rngs=rngs)
        self.norm2 = nnx.LayerNorm(D, epsilon=1e-5, rngs=rngs)
        self.up, self.down = nnx.Linear(D, 4 * D, rngs=rngs), nnx.Linear(4 * D, D, rngs=rngs)

    def __call__(self, x_BTD):
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD))
        return x_BTD + self.down(nnx.gelu(self.up(self.norm2(x_BTD)), approximate=True))


class GPT2(nnx.Module):
    def __init__(self, V, S, D, N, layers, *, rngs):
        self.tokens, self.positions = nnx.Embed(V, D, rngs=rngs), nnx.Embed(S, D, rngs=rngs)
        self.blocks = nnx.List([Block(D, N, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(D, epsilon=1e-5, rngs=rngs)

    def __call__(self, input_ids):
        x_BTD = self.tokens(input_ids) + self.positions(jnp.arange(input_ids.shape[1]))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.norm(x_BTD) @ self.tokens.embedding.T
