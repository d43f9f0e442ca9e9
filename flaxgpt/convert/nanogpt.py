"""nanoGPT's configs <-> ours; its tensors are `flaxgpt.convert.names.NANOGPT`. Imports no framework.

Matches nanoGPT's `model.py` since it has exact GELU (`nn.GELU()`): tied embeddings, biases everywhere or nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxgpt.config import GPTConfig
from flaxgpt.errors import InputError

MODEL_ARGS = {
    "n_layer": "n_layers",
    "n_head": "n_heads",
    "n_embd": "emb_dim",
    "block_size": "context_length",
    "bias": "bias",
    "vocab_size": "vocab_size",
    "dropout": "drop_rate",
}
"""Key of a checkpoint's `model_args` -> the field of GPTConfig with the same value."""


def config_from_nanogpt(model_args: Mapping[str, Any]) -> GPTConfig:
    """The model that a checkpoint's `model_args` describe.

    Raises:
        InputError: naming what is missing, unknown or makes no sense.
    """
    faults = [f"no {name}" for name in MODEL_ARGS if name not in model_args]
    if faults := faults + [f"{name} is not known" for name in model_args if name not in MODEL_ARGS]:
        raise InputError(f"these are not the model_args of nanoGPT: {'; '.join(faults)}")
    fields = {ours: model_args[theirs] for theirs, ours in MODEL_ARGS.items()}
    return GPTConfig(**fields, qkv_bias=fields["bias"], tie_embeddings=True, activation="gelu")


def config_to_nanogpt(cfg: GPTConfig) -> dict[str, Any]:
    """The `model_args` of a model.

    Raises:
        InputError: nanoGPT has no such model: it ties the embeddings, and computes exact GELU.
    """
    faults = [] if cfg.tie_embeddings else ["tie_embeddings is off"]
    faults += [] if cfg.activation == "gelu" else ["its GELU is the tanh approximation, nanoGPT's the exact one (activation=gelu)"]
    if faults:
        raise InputError(f"nanoGPT has no such model: {'; '.join(faults)}")
    return {theirs: getattr(cfg, ours) for theirs, ours in MODEL_ARGS.items()}
