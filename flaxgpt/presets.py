"""Models and runs that have a name: what differs from the defaults of GPTConfig and TrainConfig."""

from __future__ import annotations

from typing import Any


def _gpt2(n_layers: int, n_heads: int, emb_dim: int, learning_rate: float) -> tuple[dict, dict]:
    """A released GPT-2 size (Radford et al. 2019), trained much as nanoGPT does (half a million tokens an update)."""
    model = {
        "n_layers": n_layers,
        "n_heads": n_heads,
        "emb_dim": emb_dim,
        "qkv_bias": True,
        "tie_embeddings": True,
        "drop_rate": 0.0,
        "dtype": "bfloat16",
        "remat": "block",
    }
    run = {
        "batch_size": 512,
        "grad_accum_steps": 32,
        "max_steps": 600_000,
        "learning_rate": learning_rate,
        "min_learning_rate": learning_rate / 10,
        "warmup_steps": 2000,
        "eval_every": 1000,
        "stride": 1,
    }
    return model, run


PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tiny": (
        {"context_length": 64, "emb_dim": 192, "n_heads": 4, "n_layers": 2, "drop_rate": 0.0, "tie_embeddings": True, "vocab_size": 95},
        {
            "tokenizer": "char",
            "batch_size": 16,
            "max_steps": 1000,
            "stride": 1,
            "learning_rate": 4e-3,
            "min_learning_rate": 4e-4,
            "beta2": 0.99,
            "log_every": 50,
            "eval_every": 125,
            "sample_tokens": 100,
        },
    ),
    "verdict-124m": (
        {"context_length": 256, "init": "torch"},
        {
            "data": "the-verdict",
            "batch_size": 2,
            "max_steps": 90,
            "learning_rate": 4e-4,
            "min_learning_rate": None,
            "warmup_steps": 0,
            "beta2": 0.999,
            "decay": "all",
            "clip_norm": None,
            "log_every": 5,
            "eval_every": 5,
            "eval_batches": 5,
            "prompt": "Every effort moves you",
        },
    ),
    "shakespeare-char": (
        {"context_length": 64, "emb_dim": 128, "n_heads": 4, "n_layers": 4, "drop_rate": 0.0, "tie_embeddings": True, "vocab_size": 65},
        {
            "data": "tinyshakespeare",
            "tokenizer": "char",
            "batch_size": 12,
            "max_steps": 2000,
            "stride": 1,
            "beta2": 0.99,
            "eval_every": 250,
            "prompt": "ROMEO:",
            "sample_tokens": 200,
        },
    ),
    "gpt2-124m": _gpt2(12, 12, 768, 6e-4),
    "gpt2-355m": _gpt2(24, 16, 1024, 3e-4),
    "gpt2-774m": _gpt2(36, 20, 1280, 2.5e-4),
    "gpt2-1558m": _gpt2(48, 25, 1600, 2e-4),
}
"""Preset name -> (fields of the model, fields of the run) that differ from the defaults."""
