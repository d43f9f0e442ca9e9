"""A Llama of `transformers` in Flax Linen: RMSNorm, rotary positions, grouped heads, SwiGLU. docs/port.md tells how it came to agree.

B batch, T query position, S key position, D width, N heads, K heads of keys and values, H head size, F feed-forward width, V vocabulary.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Config:
    V: int
    D: int
    F: int
    N: int
    K: int
    layers: int
    eps: float = 1e-5
    rope_base: float = 10000.0


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x_BTD):
        weight = self.param("weight", nn.initializers.ones, (x_BTD.shape[-1],))
        wide = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
        variance = (wide * wide).mean(-1, keepdims=True)
        return weight * (wide * jax.lax.rsqrt(variance + self.eps)).astype(x_BTD.dtype)


def rotate(x_BTNH, base):
    T, H = x_BTNH.shape[1], x_BTNH.shape[3]
    angles_TH = np.outer(np.arange(T), base ** (-np.arange(0, H, 2) / H))
    cos_TH, sin_TH = (jnp.asarray(f(angles_TH), x_BTNH.dtype)[:, None] for f in (np.cos, np.sin))
    a, b = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([a * cos_TH - b * sin_TH, b * cos_TH + a * sin_TH], axis=-1)


class Attention(nn.Module):
    cfg: Config

    @nn.compact
    def __call__(self, x_BTD, keep_BT):
        cfg, (B, T, D) = self.cfg, x_BTD.shape
        H = D // cfg.N
        q_BTNH = nn.Dense(cfg.N * H, name="query")(x_BTD).reshape(B, T, cfg.N, H)
        k_BSKH = nn.Dense(cfg.K * H, name="key")(x_BTD).reshape(B, T, cfg.K, H)
        v_BSKH = nn.Dense(cfg.K * H, name="value")(x_BTD).reshape(B, T, cfg.K, H)
        q_BTNH = rotate(q_BTNH, cfg.rope_base)
        k_BSKH = rotate(k_BSKH, cfg.rope_base)
        k_BSNH, v_BSNH = (jnp.repeat(x, cfg.N // cfg.K, axis=2) for x in (k_BSKH, v_BSKH))
        scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) / H**0.5
        seen = jnp.tril(jnp.ones((T, T), bool)) & keep_BT[:, None, None, :].astype(bool)
        weights_BNTS = jax.nn.softmax(jnp.where(seen, scores_BNTS, -jnp.inf))
        context_BTNH = jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH)
        return nn.Dense(D, name="out")(context_BTNH.reshape(B, T, D))


class MLP(nn.Module):
    cfg: Config

    @nn.compact
    def __call__(self, x_BTD):
        gate_BTF = nn.Dense(self.cfg.F, use_bias=False, name="gate")(x_BTD)
        up_BTF = nn.Dense(self.cfg.F, use_bias=False, name="up")(x_BTD)
        return nn.Dense(x_BTD.shape[-1], use_bias=False, name="down")(nn.silu(gate_BTF) * up_BTF)


class Block(nn.Module):
    cfg: Config

    @nn.compact
    def __call__(self, x_BTD, keep_BT):
        x_BTD = x_BTD + Attention(self.cfg, name="attention")(RMSNorm(self.cfg.eps, name="norm1")(x_BTD), keep_BT)
        return x_BTD + MLP(self.cfg, name="mlp")(RMSNorm(self.cfg.eps, name="norm2")(x_BTD))


class Llama(nn.Module):
    cfg: Config

    @nn.compact
    def __call__(self, input_ids, attention_mask):
        x_BTD = nn.Embed(self.cfg.V, self.cfg.D, name="embed")(input_ids)
        for i in range(self.cfg.layers):
            x_BTD = Block(self.cfg, name=f"block{i}")(x_BTD, attention_mask)
        x_BTD = RMSNorm(self.cfg.eps, name="norm")(x_BTD)
        return nn.Dense(self.cfg.V, use_bias=False, name="head")(x_BTD)
