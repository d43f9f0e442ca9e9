"""A forward pass recorded as an `Inspection`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxgpt.config import GPTConfig
from flaxgpt.data.tokenizer import Tokenizer
from flaxgpt.errors import InputError
from flaxgpt.interpret.activations import activations
from flaxgpt.interpret.inspection import Inspection, Lens
from flaxgpt.interpret.labels import token_labels
from flaxgpt.model import GPT
from flaxgpt.types import Params


def inspect_tokens(
    params: Params, cfg: GPTConfig, tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray, *, lens: int = 0, attention: bool = False
) -> Inspection:
    """What the model makes of a text: its logits at every position and, on request, each layer's prediction and the attention weights.

    One compiled pass for each number of tokens. The head is read once for each layer of the lens, whose logits are never held together.

    Args:
        params: as `flaxgpt.init_params` makes them, or `flaxgpt.load` reads them.
        cfg: the model.
        tokenizer: what its ids mean; its vocabulary may be smaller than the model's.
        ids: the T token ids of the text, 1 to `cfg.context_length`.
        lens: likeliest tokens to keep of each layer's prediction (all, if there are fewer); 0: no lens.
        attention: keep the attention weights, L N T T floats.

    Raises:
        InputError: no tokens, more than the context, ids outside the vocabulary, or logits that are not finite.
    """
    ids_T = np.asarray(ids)
    if ids_T.ndim != 1 or not ids_T.size or not np.issubdtype(ids_T.dtype, np.integer):
        raise InputError(f"ids has the shape {ids_T.shape} and type {ids_T.dtype}: expected the integer ids of one text, at least one")
    if len(ids_T) > cfg.context_length:
        raise InputError(f"the text has {len(ids_T)} tokens, and the model's context {cfg.context_length}: shorten it")
    if ids_T.min() < 0 or ids_T.max() >= cfg.vocab_size:
        raise InputError(f"ids has values from {ids_T.min()} to {ids_T.max()}, outside the vocabulary of {cfg.vocab_size}")
    if lens < 0:
        raise InputError(f"lens={lens}: expected at least 0")
    ids_T = ids_T.astype(np.int32)
    logits_TV, read, weights_LNTS = jax.device_get(_record(params, cfg, ids_T, min(lens, cfg.vocab_size), attention))
    if not np.isfinite(logits_TV).all():
        raise InputError("the model's logits are not all finite: its weights are damaged, or its training diverged")
    return Inspection(ids_T, token_labels(tokenizer, cfg.vocab_size), logits_TV, Lens(*read) if lens else None, weights_LNTS)


_RESIDUAL, _WEIGHTS = "trf_blocks.{}.shortcut2", "trf_blocks.{}.att.weights"


@functools.partial(jax.jit, static_argnames=("cfg", "lens", "attention"))
def _record(params: Params, cfg: GPTConfig, ids_T: jax.Array, lens: int, attention: bool) -> tuple[Any, ...]:
    """The fields of Inspection from the logits on; those of Lens as a tuple."""
    names = ["embedding", _RESIDUAL] * bool(lens) + [_WEIGHTS] * attention
    logits_BTV, taken = activations(params, cfg, ids_T[None], names)
    read = _lens(params, cfg, jnp.concatenate([taken["embedding"], taken[_RESIDUAL][:, 0]]), ids_T, lens) if lens else None
    weights_LNTS = taken[_WEIGHTS][:, 0].astype(jnp.float32) if attention else None
    return logits_BTV[0].astype(jnp.float32), read, weights_LNTS


def _lens(params: Params, cfg: GPTConfig, x_MTD: jax.Array, ids_T: jax.Array, K: int) -> tuple[jax.Array, ...]:
    """The residual streams as the final norm and the head read them, one at a time."""
    next_T1 = jnp.append(ids_T[1:], 0)[:, None]  # of the last position there is none: 0 stands for it until the end

    def read(x_TD: jax.Array) -> tuple[jax.Array, ...]:
        logits_BTV = GPT(cfg).apply({"params": params}, x_TD[None], method=lambda model, x_BTD: model.logits(model.final_norm(x_BTD)))
        logits_TV = logits_BTV[0].astype(jnp.float32)
        total_T1 = jax.nn.logsumexp(logits_TV, axis=-1, keepdims=True)
        top_TK, top_ids_TK = jax.lax.top_k(logits_TV, K)
        logit_T1 = jnp.take_along_axis(logits_TV, next_T1, axis=1)
        return top_ids_TK, top_TK - total_T1, (logit_T1 - total_T1)[:, 0], 1 + (logits_TV > logit_T1).sum(-1, dtype=jnp.int32)

    top_ids_MTK, top_log_probs_MTK, log_probs_MT, ranks_MT = jax.lax.map(read, x_MTD)
    return top_ids_MTK, top_log_probs_MTK, log_probs_MT.at[:, -1].set(jnp.nan), ranks_MT.at[:, -1].set(0)
