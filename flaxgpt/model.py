"""GPT-2 as a pure function of (params, tokens, randomness). `torch_ref/model.py` is its stateful twin: same names, same numbers.

    params = init_params(cfg, key)                    logits_BTV = forward(params, cfg, tokens_BT)

B batch, T query position, S key position, D emb_dim, N heads, H head size, F feed-forward width, V vocabulary.

Architecture: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": pre-norm blocks, learned
positions, tanh GELU (or, on request, the exact one, and no biases: nanoGPT's variants).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxgpt.cache import LayerCache
from flaxgpt.config import GPTConfig
from flaxgpt.edits import Edits, checked_edits
from flaxgpt.errors import InputError
from flaxgpt.interventions import editing, layer_numbers, visiting
from flaxgpt.kernels import choose_attention, choose_unroll, current_platform, fused_attention
from flaxgpt.layers import Dropout, Embedding, Identity, LayerNorm, Linear, OutHead, project, rematerialised, wide
from flaxgpt.sharding import placed
from flaxgpt.types import Params


def init_params(cfg: GPTConfig, key: jax.Array) -> Params:
    """Random parameters, float32, as `cfg.init` says; those of the blocks are stacked along a leading L axis.

    Args:
        cfg: the model.
        key: a typed PRNG key, `jax.random.key(seed)`.
    """
    return GPT(cfg).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def forward(
    params: Params,
    cfg: GPTConfig,
    tokens_BT: jax.Array,
    *,
    dropout_key: jax.Array | None = None,
    rows_B: jax.Array | None = None,
    dropout_masks: Params | None = None,
    edits: Edits | None = None,
) -> jax.Array:
    """float32 logits_BTV of the token after each position (float64 of a float64 model).

    Dropout is off unless it is given its randomness: the key to draw masks with, or the masks themselves.

    Args:
        params: as `init_params` makes them.
        cfg: the model.
        tokens_BT: token ids, any integer dtype, at most `cfg.context_length` of them in a row.
        dropout_key: a typed PRNG key.
        rows_B: numbers of the rows in the batch that they are part of: a row's masks depend on the key and on its number alone.
            None: 0 to B - 1.
        dropout_masks: what dropout keeps, booleans by module (see `flaxgpt.layers.Dropout`).
        edits: what becomes of activations, by the names of `flaxgpt.sites`: `{"trf_blocks.3.att.out": scale(0)}` (see `flaxgpt.edits`).

    Raises:
        ValueError: T is larger than the context length, a mask has another shape than what it is for, or an edit makes no sense.
    """
    return _apply("__call__", params, cfg, tokens_BT, dropout_key, rows_B, dropout_masks, edits)


def hidden(
    params: Params,
    cfg: GPTConfig,
    tokens_BT: jax.Array,
    *,
    dropout_key: jax.Array | None = None,
    rows_B: jax.Array | None = None,
    dropout_masks: Params | None = None,
    edits: Edits | None = None,
) -> jax.Array:
    """All of `forward` but the head, with its arguments: x_BTD, whose product with `head_kernel` is the logits.

    Raises:
        ValueError: as `forward`, and for an edit of the logits.
    """
    if edits and "logits" in edits:
        raise InputError("logits: they are not computed here, so they can't be edited; forward computes them")
    return _apply("hidden", params, cfg, tokens_BT, dropout_key, rows_B, dropout_masks, edits)


def head_kernel(params: Params, cfg: GPTConfig) -> jax.Array:
    """kernel_DV of the head, float32; V is `cfg.padded_vocab`."""
    return params["tok_emb"]["embedding"].T if cfg.tie_embeddings else params["out_head"]["kernel"]


def _apply(
    method: str,
    params: Params,
    cfg: GPTConfig,
    tokens_BT: jax.Array,
    dropout_key: jax.Array | None,
    rows_B: jax.Array | None,
    dropout_masks: Params | None,
    edits: Edits | None,
) -> jax.Array:
    collections = {"params": params} if dropout_masks is None else {"params": params, "dropout_masks": dropout_masks}
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    if rows_B is None and not (dropout_key is None and dropout_masks is None):
        rows_B = jnp.arange(tokens_BT.shape[0])
    edits, positions = checked_edits(edits or {}, cfg, tokens_BT.shape[1]), jnp.arange(tokens_BT.shape[1])
    with visiting(*editing(edits, cfg, positions)):
        return GPT(cfg).apply(collections | layer_numbers(edits, cfg), tokens_BT, rows_B, rngs=rngs, method=method)


class GPT(nn.Module):
    """Token ids to next-token logits: the Linen module behind `init_params` and `forward`."""

    cfg: GPTConfig

    def setup(self) -> None:
        cfg = self.cfg
        self.tok_emb = Embedding(cfg, "tok_emb", cfg.padded_vocab, "VD")
        self.pos_emb = Embedding(cfg, "pos_emb", cfg.context_length, "TD")
        self.drop_emb = Dropout(cfg.drop_rate)
        self.trf_blocks = TransformerBlock(cfg)
        self.final_norm = LayerNorm(cfg.bias)
        if not cfg.tie_embeddings:
            self.out_head = OutHead(cfg)

    def __call__(self, tokens_BT: jax.Array, rows_B: jax.Array | None = None) -> jax.Array:
        return self.logits(self.hidden(tokens_BT, rows_B))

    def hidden(self, tokens_BT: jax.Array, rows_B: jax.Array | None = None) -> jax.Array:
        """All but the head: the final norm's output."""
        cfg, T = self.cfg, tokens_BT.shape[1]
        if T > cfg.context_length:
            raise ValueError(f"{T} tokens do not fit in context_length={cfg.context_length}; crop them to the last ones")
        x_BTD = self.embed(tokens_BT, jnp.arange(T), rows_B)

        def block(module: TransformerBlock, x_BTD: jax.Array, cache: None) -> tuple[jax.Array, None]:
            x_BTD, cache = module(x_BTD, cache, rows_B)
            return placed(x_BTD, "BTD"), cache

        # One block, run L times: every collection and the dropout keys are split along the L axis.
        x_BTD, _ = nn.scan(
            rematerialised(block, cfg),
            variable_axes={"params": 0, "dropout_masks": 0, "taps": 0, "perturbations": 0, "layer": 0},
            split_rngs={"params": True, "dropout": True},
            length=cfg.n_layers,
            unroll=1 if self.is_initializing() else choose_unroll(cfg, current_platform()),
        )(self.trf_blocks, x_BTD, None)
        return self.final_norm(x_BTD)

    def embed(self, tokens_BT: jax.Array, positions: jax.Array, rows_B: jax.Array | None = None) -> jax.Array:
        """What enters the first block; positions are (T,) or (B, T)."""
        return self.drop_emb(placed(self.tok_emb(tokens_BT) + self.pos_emb(positions), "BTD"), rows_B)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """The head: the final norm's output to logits_BTV."""
        kernel_DV = self.tok_emb.embedding.T if self.cfg.tie_embeddings else self.out_head.kernel
        return placed(project(x_BTD, kernel_DV), "BTV")[..., : self.cfg.vocab_size]

    def last_logits(self, x_BTD: jax.Array) -> jax.Array:
        """What the last block returned -> logits_BV of the token after the last position."""
        return self.logits(self.final_norm(x_BTD[:, -1:]))[:, 0]


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); dropout on both before the shortcut is added.

    Given a cache, x holds the tokens that follow those in it; what is returned beside x is the cache with them in it.
    """

    cfg: GPTConfig

    def setup(self) -> None:
        self.att, self.ff = MultiHeadAttention(self.cfg), FeedForward(self.cfg)
        self.norm1, self.norm2 = LayerNorm(self.cfg.bias), LayerNorm(self.cfg.bias)
        self.drop_shortcut1, self.drop_shortcut2 = Dropout(self.cfg.drop_rate), Dropout(self.cfg.drop_rate)
        self.shortcut1 = Identity()  # a place to look at what is otherwise no module's output

    def __call__(
        self, x_BTD: jax.Array, cache: LayerCache | None = None, rows_B: jax.Array | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        out_BTD, cache = self.att(self.norm1(x_BTD), cache, rows_B)
        x_BTD = self.shortcut1(x_BTD + self.drop_shortcut1(out_BTD, rows_B))
        out_BTD = self.ff(self.norm2(x_BTD))
        return x_BTD + self.drop_shortcut2(out_BTD, rows_B), cache


class MultiHeadAttention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017), scaled by 1/sqrt(H), softmax in float32. A cache is as in TransformerBlock."""

    cfg: GPTConfig

    def setup(self) -> None:
        cfg, D = self.cfg, self.cfg.emb_dim
        self.W_query = Linear(cfg, "trf_blocks/att/W_query", D, cfg.qkv_bias)
        self.W_key = Linear(cfg, "trf_blocks/att/W_key", D, cfg.qkv_bias)
        self.W_value = Linear(cfg, "trf_blocks/att/W_value", D, cfg.qkv_bias)
        self.out_proj = Linear(cfg, "trf_blocks/att/out_proj", D, cfg.bias)
        self.dropout = Dropout(cfg.drop_rate)

    def __call__(
        self, x_BTD: jax.Array, cache: LayerCache | None = None, rows_B: jax.Array | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        B, T, D = x_BTD.shape
        N, H = self.cfg.n_heads, D // self.cfg.n_heads
        q_BNTH, k_BNSH, v_BNSH = (W(x_BTD).reshape(B, T, N, H).swapaxes(1, 2) for W in (self.W_query, self.W_key, self.W_value))
        visible = jnp.tril(jnp.ones((T, T), bool))  # (T, S); of a cache (B, 1, T, S), since its rows begin at different slots
        if cache is not None:
            cache = cache.extend(k_BNSH, v_BNSH)
            k_BNSH, v_BNSH, visible = cache.k_BNSH, cache.v_BNSH, cache.visible_B1TS
        kernel = self.kernel(T, rows_B) if cache is None else "plain"
        if kernel == "plain":
            scores_BNTS = jnp.einsum("BNTH,BNSH->BNTS", q_BNTH, k_BNSH, preferred_element_type=wide(x_BTD.dtype)) / H**0.5
            scores_BNTS = jnp.where(visible, scores_BNTS, -jnp.inf)
            weights_BNTS = jax.nn.softmax(scores_BNTS).astype(x_BTD.dtype)
            weights_BNTS = self.dropout(weights_BNTS, rows_B)
            context_BNTH = jnp.einsum("BNTS,BNSH->BNTH", weights_BNTS, v_BNSH)
        else:
            context_BNTH = fused_attention(q_BNTH, k_BNSH, v_BNSH, kernel)
        return self.out_proj(context_BNTH.swapaxes(1, 2).reshape(B, T, D)), cache

    def kernel(self, T: int, rows_B: jax.Array | None) -> str:
        """What computes the same without a cache; "plain" where the weights are dropped out or looked at."""
        if not self.dropout.inert(rows_B):
            return "plain"
        return choose_attention(self.cfg, T, current_platform()).implementation


class FeedForward(nn.Module):
    """D -> 4 D -> D with GELU between, the tanh approximation (Hendrycks & Gimpel 2016) or the exact one."""

    cfg: GPTConfig

    def setup(self) -> None:
        self.layers_0 = Linear(self.cfg, "trf_blocks/ff/layers_0", 4 * self.cfg.emb_dim, self.cfg.bias)
        self.layers_2 = Linear(self.cfg, "trf_blocks/ff/layers_2", self.cfg.emb_dim, self.cfg.bias)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        hidden_BTF = jax.nn.gelu(self.layers_0(x_BTD), approximate=self.cfg.activation == "gelu_tanh")
        return self.layers_2(hidden_BTF)
