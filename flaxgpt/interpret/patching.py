"""Activation patching: what one activation of another run changes, at every layer and position, in one compiled call.

`torch_ref/interpret/patching.py` does the same with a hook at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from flaxgpt.config import GPTConfig
from flaxgpt.errors import InputError
from flaxgpt.layers import project
from flaxgpt.model import head_kernel, hidden
from flaxgpt.types import Params

Metric = Callable[[jax.Array], jax.Array]
"""logits_V of the token after the text -> a number, for instance the difference of two tokens' logits."""


@functools.partial(jax.jit, static_argnames=("cfg", "metric", "site", "rows"))
def patch_each(
    params: Params, cfg: GPTConfig, tokens_T: jax.Array, other_LTD: jax.Array, metric: Metric, *, site: str = "shortcut2", rows: int = 32
) -> jax.Array:
    """A metric of the next token's logits, when one activation at one position of one block is that of another run.

    Meng et al. 2022, "Locating and Editing Factual Associations in GPT" (causal tracing), on any activation of a block.

    Args:
        params: as `init_params` makes them.
        cfg: the model.
        tokens_T: the text.
        other_LTD: the activations of the other run, of a text of as many tokens (`activations(...)["trf_blocks.{}.shortcut2"][:, 0]`).
        metric: what to measure.
        site: the activation's name within its block (`flaxgpt.sites`), one with the axes B, T and another.
        rows: forward passes made side by side.

    Returns:
        metric_LT, of the patch in block l at position t.

    Raises:
        InputError: there is no such site, or `other_LTD` is not of this model and of as many tokens.
    """
    T = tokens_T.shape[0]
    if other_LTD.shape[0] != cfg.n_layers or other_LTD.shape[-2] != T:
        raise InputError(f"other_LTD is {[*other_LTD.shape]}: expected the activations of {cfg.n_layers} blocks at {T} positions")

    def patched(place: tuple[jax.Array, jax.Array]) -> jax.Array:
        layer, position = place

        def patch(x_BTD: jax.Array, i: jax.Array) -> jax.Array:
            here = (i == layer) & (jnp.arange(T) == position)
            return jnp.where(here[:, None], other_LTD[i].astype(x_BTD.dtype), x_BTD)

        x_BTD = hidden(params, cfg, tokens_T[None], edits={f"trf_blocks.{{}}.{site}": patch})
        return metric(project(x_BTD[:, -1:], head_kernel(params, cfg))[0, 0, : cfg.vocab_size])

    places = jnp.meshgrid(jnp.arange(cfg.n_layers), jnp.arange(T), indexing="ij")
    return jax.lax.map(patched, tuple(place.ravel() for place in places), batch_size=rows).reshape(cfg.n_layers, T)
