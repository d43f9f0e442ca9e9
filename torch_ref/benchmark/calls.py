"""What flaxgpt is timed against: the reference, eager and compiled, and Hugging Face's GPT-2."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from flaxgpt.config import GPTConfig, TrainConfig
from torch_ref.model import GPTModel
from torch_ref.optim import make_optimizer

Call = Callable[[], object]
Forward = Callable[[torch.Tensor], torch.Tensor]

VARIANTS = ("torch_ref", "torch_ref, fused AdamW", "torch.compile, fused AdamW", "Hugging Face, fused AdamW")
"""The first is what `scripts/train_torch.py` runs; the others are what a torch user would try for speed."""


def update_parts(cfg: TrainConfig, batch: tuple[np.ndarray, np.ndarray], variant: str, parts: tuple[str, ...]) -> dict[str, Call]:
    """A call for each part of an update, as `flaxgpt.benchmark.calls.update_parts` has them, of one model with random weights.

    Raises:
        ImportError: the variant needs transformers, which is not installed.
    """
    torch.manual_seed(0)
    inputs_BT, targets_BT = (torch.from_numpy(part).long() for part in batch)
    model = hugging_face(cfg.model) if variant.startswith("Hugging Face") else GPTModel(cfg.model)
    logits: Forward = (lambda ids: model(ids).logits) if variant.startswith("Hugging Face") else model
    if variant.startswith("torch.compile"):
        logits = torch.compile(model)
    optimizer = make_optimizer(model, cfg)
    if variant.endswith("fused AdamW"):
        optimizer = torch.optim.AdamW(optimizer.param_groups, fused=True)  # groups carry the other settings

    def loss() -> torch.Tensor:
        return F.cross_entropy(logits(inputs_BT).flatten(0, 1), targets_BT.flatten())

    def forward() -> float:
        model.eval()
        with torch.no_grad():
            return loss().item()

    def gradients() -> float:
        model.train()
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value.item()

    def optimize() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm or math.inf).item()
        optimizer.step()

    def update() -> float:
        value = gradients()
        optimize()
        return value

    if "optimizer" in parts:
        gradients()  # there must be some
    calls = {"forward": forward, "gradients": gradients, "optimizer": optimize, "update": update}
    return {part: calls[part] for part in parts}


def hugging_face(cfg: GPTConfig) -> torch.nn.Module:
    """GPT2LMHeadModel of the same shape, with its default attention.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_positions": cfg.context_length, "n_embd": cfg.emb_dim, "n_layer": cfg.n_layers, "n_head": cfg.n_heads}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), cfg.drop_rate)
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = GPT2Config(vocab_size=cfg.vocab_size, tie_word_embeddings=cfg.tie_embeddings, **shape, **dropout, **special)
    return GPT2LMHeadModel(config)


def generation(cfg: GPTConfig, prompt_BT: np.ndarray, new_tokens: int) -> Call:
    """Greedy decoding by Hugging Face's `generate`, with its cache.

    Raises:
        ImportError: transformers is not installed.
    """
    model: Any = hugging_face(cfg).eval().to(getattr(torch, cfg.dtype))
    ids = torch.from_numpy(prompt_BT)
    options = {"max_new_tokens": new_tokens, "do_sample": False, "use_cache": True}

    def generate() -> torch.Tensor:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    return generate
