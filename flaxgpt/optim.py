"""AdamW as Optax transformations: clip, rescale, decay, scale by the schedule."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from flaxgpt.config import TrainConfig
from flaxgpt.types import Params


def make_optimizer(cfg: TrainConfig) -> optax.GradientTransformation:
    """Decoupled AdamW (Loshchilov & Hutter 2019), after clipping by global norm where the config asks for it.

    The same update as torch.nn.utils.clip_grad_norm_ and torch.optim.AdamW.
    """
    clip = optax.identity() if cfg.clip_norm is None else clip_by_global_norm(cfg.clip_norm)
    mask = decay_mask if cfg.decay == "matrices" else None
    adamw = optax.adamw(make_schedule(cfg), cfg.beta1, cfg.beta2, cfg.eps, weight_decay=cfg.weight_decay, mask=mask)
    return optax.chain(clip, adamw)


def make_schedule(cfg: TrainConfig) -> optax.Schedule:
    """Learning rate of update s, counted from 0: linear warm-up, cosine to the minimum, constant after that.

    Update s of the warm-up uses learning_rate * (s + 1) / (warmup_steps + 1), as nanoGPT does, so no update is at rate 0.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=cfg.learning_rate / (cfg.warmup_steps + 1),
        peak_value=cfg.learning_rate,
        warmup_steps=cfg.warmup_steps,
        decay_steps=cfg.total_decay_steps,
        end_value=cfg.final_learning_rate,
    )
    return lambda step: schedule(1.0 * step)  # of an int32, Optax makes a float32 rate even when x64 is on


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Scale the gradient by limit / (norm + 1e-6) where that is below 1: torch's rule.

    Optax's own has no 1e-6, a relative difference of 1e-6 at norm 1, which would hide all else in a comparison in float64.
    """

    def clip(grads: Params, _params: Params | None) -> Params:
        scale = jnp.minimum(1.0, limit / (optax.tree.norm(grads) + 1e-6))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)

    return optax.stateless(clip)


def decay_mask(params: Params) -> Params:
    """True for kernels and embeddings, False for biases, scales and shifts.

    By name, not by rank: stacked over the layers, a bias has two dimensions as well.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)


def adam_state(opt_state: optax.OptState) -> optax.ScaleByAdamState:
    """Adam's moments (`mu`, `nu`) and count, wherever in the chain's state they are."""
    parts = jax.tree.leaves(opt_state, is_leaf=lambda part: isinstance(part, optax.ScaleByAdamState))
    return next(part for part in parts if isinstance(part, optax.ScaleByAdamState))


def with_adam_state(opt_state: optax.OptState, mu: Params, nu: Params, step: int | jax.Array) -> optax.OptState:
    """The optimizer's state with these moments, and `step` as every count."""
    return optax.tree.set(opt_state, mu=mu, nu=nu, count=jnp.int32(step))
