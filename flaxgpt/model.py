"""GPT-2 as a pure function of (params, tokens, randomness). `torch_ref/model.py` is its stateful twin.

Architecture: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": pre-norm blocks, learned
positions, tanh GELU. The only file that imports flax.linen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from flaxgpt.cache import LayerCache
from flaxgpt.config import GPTConfig


class GPT(nn.Module):
    """Token ids to next-token logits.

    `GPT(cfg).init(key, tokens_BT)["params"]` makes the parameters, float32, those of the blocks stacked along a
    leading L axis. `GPT(cfg).apply({"params": params}, tokens_BT)` is deterministic; dropout wants
    `deterministic=False` and either `rngs={"dropout": key}` or the masks themselves, as a collection
    "dropout_masks" (see Dropout). With `mutable=["taps"]` the activations come back as well (see tap).
    """

    cfg: GPTConfig

    def setup(self) -> None:
        cfg, init = self.cfg, initialisers(self.cfg)
        embed = {"dtype": cfg.dtype, "embedding_init": init.embedding}
        self.tok_emb = nn.Embed(cfg.vocab_size, cfg.emb_dim, **embed)
        self.pos_emb = nn.Embed(cfg.context_length, cfg.emb_dim, **embed)
        self.drop_emb = Dropout(cfg.drop_rate)
        self.trf_blocks = TransformerBlock(cfg)
        self.final_norm = LayerNorm()
        if not cfg.tie_embeddings:
            self.out_head = OutHead(cfg)

    def __call__(self, tokens_BT: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """float32 logits_BTV of the token after each position.

        Raises:
            ValueError: T is larger than the context length.
        """
        return self.logits(self.features(tokens_BT, deterministic=deterministic))

    def features(self, tokens_BT: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """The final norm's output, (B, T, D) in the compute dtype: all of the model but the head."""
        cfg, T = self.cfg, tokens_BT.shape[1]
        if T > cfg.context_length:
            raise ValueError(f"{T} tokens do not fit in context_length={cfg.context_length}; crop them to the last ones")
        x_BTD = self.embed(tokens_BT, jnp.arange(T))
        x_BTD = tap(self, "embedding", self.drop_emb(x_BTD, deterministic))

        def block(module: TransformerBlock, x_BTD: jax.Array, _: None) -> tuple[jax.Array, None]:
            return module(x_BTD, deterministic), None

        # One compiled block, run L times: every collection and the dropout keys are split along the L axis.
        x_BTD, _ = nn.scan(
            nn.remat(block, prevent_cse=False) if cfg.remat else block,
            variable_axes={"params": 0, "dropout_masks": 0, "taps": 0, "perturbations": 0},
            split_rngs={"params": True, "dropout": True},
            length=cfg.n_layers,
        )(self.trf_blocks, x_BTD, None)
        return self.final_norm(x_BTD)

    def embed(self, tokens_BT: jax.Array, positions: jax.Array) -> jax.Array:
        """What enters the first block, before dropout; positions are (T,) or (B, T)."""
        return self.tok_emb(tokens_BT) + self.pos_emb(positions)

    def last_logits(self, x_BTD: jax.Array) -> jax.Array:
        """What the last block returned -> logits_BV of the token after the last position."""
        return self.logits(self.final_norm(x_BTD[:, -1:]))[:, 0]

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """The head: (B, T, D) features to float32 logits (B, T, V)."""
        head = self.out_head if not self.cfg.tie_embeddings else lambda x_BTD: _head(x_BTD, self.tok_emb.embedding.T)
        return tap(self, "logits", head(x_BTD))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); dropout on both before the shortcut is added.

    Given a cache, x holds the tokens that follow those in it, and the longer cache is returned as well.
    """

    cfg: GPTConfig

    def setup(self) -> None:
        self.norm1, self.norm2 = LayerNorm(), LayerNorm()
        self.att, self.ff = MultiHeadAttention(self.cfg), FeedForward(self.cfg)
        self.drop_shortcut1, self.drop_shortcut2 = Dropout(self.cfg.drop_rate), Dropout(self.cfg.drop_rate)

    def __call__(self, x_BTD: jax.Array, deterministic: bool, cache: LayerCache | None = None) -> Any:
        out_BTD = self.att(self.norm1(x_BTD), deterministic, cache)
        if cache is not None:
            out_BTD, cache = out_BTD
        x_BTD = x_BTD + self.drop_shortcut1(out_BTD, deterministic)
        x_BTD = tap(self, "shortcut1", x_BTD)
        x_BTD = x_BTD + self.drop_shortcut2(self.ff(self.norm2(x_BTD)), deterministic)
        x_BTD = tap(self, "shortcut2", x_BTD)
        return x_BTD if cache is None else (x_BTD, cache)


class MultiHeadAttention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017), scaled by 1/sqrt(H), softmax in float32. A cache is as in TransformerBlock."""

    cfg: GPTConfig

    def setup(self) -> None:
        cfg = self.cfg
        self.W_query = dense(cfg, cfg.emb_dim, cfg.emb_dim, use_bias=cfg.qkv_bias)
        self.W_key = dense(cfg, cfg.emb_dim, cfg.emb_dim, use_bias=cfg.qkv_bias)
        self.W_value = dense(cfg, cfg.emb_dim, cfg.emb_dim, use_bias=cfg.qkv_bias)
        self.out_proj = dense(cfg, cfg.emb_dim, cfg.emb_dim, residual=True)
        self.dropout = Dropout(cfg.drop_rate)

    def __call__(self, x_BTD: jax.Array, deterministic: bool, cache: LayerCache | None = None) -> Any:
        B, T, D = x_BTD.shape
        N, H = self.cfg.n_heads, D // self.cfg.n_heads
        q_BTNH = tap(self, "query", self.W_query(x_BTD)).reshape(B, T, N, H)
        k_BSNH = tap(self, "key", self.W_key(x_BTD)).reshape(B, T, N, H)
        v_BSNH = tap(self, "value", self.W_value(x_BTD)).reshape(B, T, N, H)
        if cache is not None:
            cache = cache.extend(k_BSNH, v_BSNH)
            return self.out_proj(cache.attend(q_BTNH).reshape(B, T, D)), cache
        scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=_wide(x_BTD.dtype))
        causal_TS = jnp.tril(jnp.ones((T, T), bool))
        weights_BNTS = jax.nn.softmax(jnp.where(causal_TS, scores_BNTS * H**-0.5, -jnp.inf))
        weights_BNTS = tap(self, "weights", weights_BNTS.astype(x_BTD.dtype))
        context_BTNH = jnp.einsum("BNTS,BSNH->BTNH", self.dropout(weights_BNTS, deterministic), v_BSNH)
        context_BTD = tap(self, "context", context_BTNH.reshape(B, T, D))
        return tap(self, "out", self.out_proj(context_BTD))


class FeedForward(nn.Module):
    """D -> 4 D -> D with GELU between (the tanh approximation, as GPT-2 was trained)."""

    cfg: GPTConfig

    def setup(self) -> None:
        D, F = self.cfg.emb_dim, 4 * self.cfg.emb_dim
        self.layers_0 = dense(self.cfg, D, F)
        self.layers_2 = dense(self.cfg, F, D, residual=True)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        hidden_BTF = tap(self, "hidden", jax.nn.gelu(self.layers_0(x_BTD), approximate=True))
        return tap(self, "out", self.layers_2(hidden_BTF))


class LayerNorm(nn.Module):
    """Zero mean and unit (biased) variance over the last axis, eps 1e-5, computed in float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        shift = self.param("shift", nn.initializers.zeros, (x.shape[-1],))
        x_wide = x.astype(_wide(x.dtype))
        mean = x_wide.mean(-1, keepdims=True)
        variance = x_wide.var(-1, keepdims=True)
        return tap(self, "out", (scale * (x_wide - mean) * jax.lax.rsqrt(variance + 1e-5) + shift).astype(x.dtype))


class Dropout(nn.Module):
    """Zeroes a part of the elements and scales the rest by 1 / (1 - rate).

    What to keep is drawn from the "dropout" stream, unless the caller hands it in: a boolean array `keep` of the
    shape of x, in the collection "dropout_masks" at this module's path. So a run of another implementation can be replayed.
    With `mutable=["dropout_masks"]` what was drawn comes back, to be replayed elsewhere.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        if deterministic or self.rate == 0:
            return x
        if self.has_variable("dropout_masks", "keep"):
            keep = self.get_variable("dropout_masks", "keep")
            if keep.shape != x.shape:
                raise ValueError(f"the dropout mask of {'/'.join(self.path)} is {keep.shape}, expected {x.shape}")
        else:
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, x.shape)
            if self.is_mutable_collection("dropout_masks"):
                self.put_variable("dropout_masks", "keep", keep)
        return jnp.where(keep, x / (1 - self.rate), 0)


class OutHead(nn.Module):
    """The untied head: a projection to the vocabulary without bias."""

    cfg: GPTConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        shape = (self.cfg.emb_dim, self.cfg.vocab_size)
        return _head(x_BTD, self.param("kernel", initialisers(self.cfg).kernel, shape))


def _head(x_BTD: jax.Array, kernel_DV: jax.Array) -> jax.Array:
    return jnp.einsum("BTD,DV->BTV", x_BTD, kernel_DV.astype(x_BTD.dtype), preferred_element_type=_wide(x_BTD.dtype))


def tap(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
    """A point of the forward pass that can be looked at from outside: x itself, unless the caller asks for more.

    With `mutable=["taps"]`, x comes back in that collection at the module's path. An array of x's shape in the collection
    "perturbations" at that path is added to x, so the gradient with respect to it is the gradient with respect to x.
    """
    if module.is_initializing():
        return x
    if module.has_variable("perturbations", name):
        x = x + module.get_variable("perturbations", name)
    module.sow("taps", name, x, init_fn=lambda: None, reduce_fn=lambda _, new: new)
    return x


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    """What norms, softmax and logits are computed in: float32, or float64 in a float64 model."""
    return jnp.promote_types(dtype, jnp.float32)


def dense(cfg: GPTConfig, fan_in: int, features: int, *, use_bias: bool = True, residual: bool = False) -> nn.Dense:
    """A linear layer initialised as the config says; `residual` marks the two that write to the residual stream."""
    init = initialisers(cfg)
    kernel_init = init.residual_kernel if residual else init.kernel
    return nn.Dense(features, use_bias=use_bias, dtype=cfg.dtype, kernel_init=kernel_init, bias_init=init.bias(fan_in))


class Initialisers(NamedTuple):
    """Initialisers for each kind of parameter; `bias` takes the layer's fan-in."""

    embedding: Initializer
    kernel: Initializer
    residual_kernel: Initializer
    bias: Callable[[int], Initializer]


def initialisers(cfg: GPTConfig) -> Initialisers:
    """The initialisers that `cfg.init` names.

    gpt2: normal(0.02), residual projections normal(0.02 / sqrt(2 L)), biases zero (Radford et al. 2019).
    torch: the distributions of torch 2's nn.Embedding, normal(1), and nn.Linear, uniform within 1/sqrt(fan_in).
    """
    if cfg.init == "gpt2":
        normal = nn.initializers.normal(0.02)
        residual = nn.initializers.normal(0.02 * (2 * cfg.n_layers) ** -0.5)
        return Initialisers(normal, normal, residual, lambda fan_in: nn.initializers.zeros)
    # A uniform within 1/sqrt(fan_in) has the variance 1 / (3 fan_in).
    linear = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return Initialisers(nn.initializers.normal(1.0), linear, linear, _uniform_bias)


def _uniform_bias(fan_in: int) -> Initializer:
    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init
