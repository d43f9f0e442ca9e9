"""GPT-2 as a module that owns its weights. `flaxgpt/model.py` is its functional twin: same names, same numbers.

    model = init_model(cfg)                           logits_BTV = model(tokens_BT)

B batch, T query position, S key position, D emb_dim, N heads, H head size, F feed-forward width, V vocabulary.

Architecture: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": pre-norm blocks, learned
positions, tanh GELU (or, on request, the exact one, and no biases: nanoGPT's variants). The modules are created in
the order that reproduces published outputs after `torch.manual_seed(123)`, so their order here is part of the interface.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flaxgpt.config import GPTConfig
from torch_ref.layers import LayerNorm, TanhGELU, init_gpt2_


def init_model(cfg: GPTConfig) -> GPTModel:
    """A model with random weights, as `cfg.init` says, drawn from torch's global generator."""
    model = GPTModel(cfg)
    if cfg.init == "gpt2":
        init_gpt2_(model, cfg.n_layers)
    return model


class GPTModel(nn.Module):
    """Token ids to next-token logits.

    `GPTModel(cfg)(tokens_BT)` gives float32 logits_BTV. Weights are drawn from torch's global generator with the
    defaults of its layers, as the published outputs need (`init_model` obeys the config); dropout is on in `train()` mode
    and draws from the same generator.

    With `use_cache` the modules keep keys and values: tokens_BT then are those that follow the ones given before, until
    `reset_kv_cache()`. What `model(tokens_BT, use_cache=True)` returns depends on what it was called with before.
    """

    def __init__(self, cfg: GPTConfig | Mapping[str, Any]) -> None:
        """`cfg` is a GPTConfig or a dict with its fields; fields left out take GPTConfig's defaults."""
        super().__init__()
        cfg = self.cfg = cfg if isinstance(cfg, GPTConfig) else GPTConfig.from_dict(cfg)
        self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.emb_dim)
        self.pos_emb = nn.Embedding(cfg.context_length, cfg.emb_dim)
        self.drop_emb = nn.Dropout(cfg.drop_rate)
        self.trf_blocks = nn.Sequential(*[TransformerBlock(cfg) for _ in range(cfg.n_layers)])
        self.final_norm = LayerNorm(cfg.emb_dim, cfg.bias)
        self.out_head = nn.Linear(cfg.emb_dim, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.out_head.weight = self.tok_emb.weight
        self.n_cached = 0

    def forward(self, tokens_BT: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        """float32 logits_BTV of the token after each position.

        Raises:
            ValueError: T and the tokens in the cache are more than the context length.
        """
        first = self.n_cached if use_cache else 0
        S = first + tokens_BT.shape[1]
        if S > self.cfg.context_length:
            raise ValueError(f"{S} tokens do not fit in context_length={self.cfg.context_length}; crop them to the last ones")
        x_BTD = self.tok_emb(tokens_BT) + self.pos_emb(torch.arange(first, S, device=tokens_BT.device))
        x_BTD = self.drop_emb(x_BTD)
        for block in self.trf_blocks:
            x_BTD = block(x_BTD, use_cache)
        if use_cache:
            self.n_cached = S
        return self.out_head(self.final_norm(x_BTD))

    def reset_kv_cache(self) -> None:
        """Forget the tokens given with `use_cache`."""
        self.n_cached = 0
        for block in self.trf_blocks:
            block.att.cache_k = block.att.cache_v = None


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); dropout on both before the shortcut is added."""

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.att, self.ff = MultiHeadAttention(cfg), FeedForward(cfg)
        self.norm1, self.norm2 = LayerNorm(cfg.emb_dim, cfg.bias), LayerNorm(cfg.emb_dim, cfg.bias)
        self.drop_shortcut1, self.drop_shortcut2 = nn.Dropout(cfg.drop_rate), nn.Dropout(cfg.drop_rate)
        self.shortcut1 = nn.Identity()  # a place for hooks on what is otherwise no module's output

    def forward(self, x_BTD: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        out_BTD = self.att(self.norm1(x_BTD), use_cache)
        x_BTD = self.shortcut1(x_BTD + self.drop_shortcut1(out_BTD))
        out_BTD = self.ff(self.norm2(x_BTD))
        return x_BTD + self.drop_shortcut2(out_BTD)


class MultiHeadAttention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017), scaled by 1/sqrt(H)."""

    mask: torch.Tensor

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.n_heads = cfg.n_heads
        self.W_query = nn.Linear(cfg.emb_dim, cfg.emb_dim, bias=cfg.qkv_bias)
        self.W_key = nn.Linear(cfg.emb_dim, cfg.emb_dim, bias=cfg.qkv_bias)
        self.W_value = nn.Linear(cfg.emb_dim, cfg.emb_dim, bias=cfg.qkv_bias)
        self.out_proj = nn.Linear(cfg.emb_dim, cfg.emb_dim, bias=cfg.bias)
        self.dropout = nn.Dropout(cfg.drop_rate)
        # 1 where position T must not look at position S. Checkpoints in the wild hold it; those without load as well.
        self.register_buffer("mask", torch.triu(torch.ones(cfg.context_length, cfg.context_length), diagonal=1))
        self.register_load_state_dict_pre_hook(_mask_is_optional)
        self.cache_k: torch.Tensor | None = None  # (B, N, S, H); state, but of no checkpoint
        self.cache_v: torch.Tensor | None = None

    def forward(self, x_BTD: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        B, T, D = x_BTD.shape
        N, H = self.n_heads, D // self.n_heads
        q_BNTH, k_BNSH, v_BNSH = (W(x_BTD).view(B, T, N, H).transpose(1, 2) for W in (self.W_query, self.W_key, self.W_value))
        if use_cache:
            if self.cache_k is not None:
                k_BNSH, v_BNSH = torch.cat([self.cache_k, k_BNSH], dim=2), torch.cat([self.cache_v, v_BNSH], dim=2)
            self.cache_k, self.cache_v = k_BNSH, v_BNSH
        S = k_BNSH.shape[2]
        scores_BNTS = q_BNTH @ k_BNSH.transpose(2, 3) / H**0.5
        scores_BNTS = scores_BNTS.masked_fill(self.mask.bool()[S - T : S, :S], -torch.inf)
        weights_BNTS = torch.softmax(scores_BNTS, dim=-1)
        weights_BNTS = self.dropout(weights_BNTS)
        context_BTNH = (weights_BNTS @ v_BNSH).transpose(1, 2)
        return self.out_proj(context_BTNH.reshape(B, T, D))


class FeedForward(nn.Module):
    """D -> 4 D -> D with GELU between, the tanh approximation (Hendrycks & Gimpel 2016) or the exact one."""

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        D, F = cfg.emb_dim, 4 * cfg.emb_dim
        activation = TanhGELU() if cfg.activation == "gelu_tanh" else nn.GELU()
        self.layers = nn.Sequential(nn.Linear(D, F, bias=cfg.bias), activation, nn.Linear(F, D, bias=cfg.bias))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.layers(x_BTD)


def _mask_is_optional(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    state_dict.setdefault(prefix + "mask", module.mask)
