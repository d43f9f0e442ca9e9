"""What flaxgpt computes, as NumPy arrays by the reference's names. `torch_ref/record.py` has the same functions.

Each takes the weights as a state_dict of the reference, and a precision: "float32", "bfloat16" or "float64". Products of
float32 matrices are never rounded to less, whatever the device does by default.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxgpt.config import GPTConfig, SamplingConfig, TrainConfig
from flaxgpt.convert.names import module_path
from flaxgpt.convert.params import from_torch, named_parameters, per_layer, stacked
from flaxgpt.generation import generate as generation
from flaxgpt.generation.sampling import Chain, choose, gumbel_noise, row_keys
from flaxgpt.layers import tapped
from flaxgpt.loss import next_token_loss
from flaxgpt.model import GPT
from flaxgpt.optim import adam_state, clip_by_global_norm, make_optimizer, with_adam_state
from flaxgpt.parity.compare import Tensors
from flaxgpt.parity.sites import sites
from flaxgpt.state import TrainState
from flaxgpt.step import make_train_step
from flaxgpt.types import Params

Batch = tuple[np.ndarray, np.ndarray]


def passes(cfg: GPTConfig, weights: Tensors, batch: Batch, dtype: str) -> dict[str, Tensors]:
    """One forward and backward pass without dropout.

    Args:
        cfg: the model's config.
        weights: by the names of the reference's parameters.
        batch: (inputs_BT, targets_BT), int64.
        dtype: the precision.

    Returns:
        "activations" and "backward" (the gradient of the loss with respect to each of them, the last one first),
        "loss", and "gradients" of all parameters.
    """
    with precision(dtype):
        loss, taps, grads, tap_grads = jax.device_get(_passes(_params(weights, cfg, dtype), batch, cfg.replace(dtype=dtype)))
    forward, backward = per_layer(taps, cfg), per_layer(tap_grads, cfg)
    points = {site.name: site.point for site in sites(cfg.n_layers)}
    return {
        "activations": {name: forward[point] for name, point in points.items()},
        "loss": {"loss": loss},
        "backward": {name: backward[point] for name, point in reversed(points.items())},
        "gradients": named_parameters(grads, cfg, grads["tok_emb"]["embedding"].dtype),
    }


def clip(gradients: Tensors, cfg: TrainConfig, dtype: str) -> Tensors:
    """The gradients, by the names of the reference's parameters, clipped to the config's `clip_norm`, and the "norm" () they had."""
    with precision(dtype):
        clipped, norm = _clip(_params(gradients, cfg.model, dtype), cfg.clip_norm)
        return {"norm": np.asarray(norm), **_named(clipped, cfg.model)}


def adamw(cfg: TrainConfig, weights: Tensors, gradients: Tensors, moments: Mapping[str, Tensors], step: int, dtype: str) -> Tensors:
    """One update of AdamW from given gradients.

    Args:
        cfg: the run, without clipping.
        weights: before the update, by the names of the reference's parameters, as are the gradients and both moments.
        gradients: what to update with.
        moments: "exp_avg" and "exp_avg_sq" before the update.
        step: the updates made before.
        dtype: the precision.

    Returns:
        "parameter/...", "exp_avg/..." and "exp_avg_sq/..." after it.
    """
    with precision(dtype):
        params, grads, mu, nu = (_params(t, cfg.model, dtype) for t in (weights, gradients, moments["exp_avg"], moments["exp_avg_sq"]))
        params, opt_state = _adamw(params, grads, mu, nu, step, cfg.replace(seed=0))
        return _after(params, opt_state, cfg)


def train(
    cfg: TrainConfig, weights: Tensors, batches: Sequence[Batch], dtype: str, masks: Sequence[Tensors] | None = None
) -> tuple[Tensors, list[Tensors]]:
    """Train on these batches, one an update, from these weights.

    Args:
        cfg: the run; its dropout is on if its rate is above 0.
        weights: to begin with.
        batches: one for each update.
        dtype: the precision.
        masks: what dropout keeps, for each update; None: flaxgpt draws.

    Returns:
        Losses and gradient norms of all updates, and the parameters and moments after the last; and the masks that were used.
    """
    with precision(dtype):
        state = initial_state(cfg, weights, dtype)
        metrics, used = [], []
        for i, batch in enumerate(batches):
            if masks is None:
                used.append(drawn_masks(state, batch[0], cfg.model))
            else:
                used.append(masks[i])
            state, values = train_step(state, batch, None if masks is None else masks[i], cfg, dtype)
            metrics.append(jax.device_get(values))
        traces = {name: np.array([values[name] for values in metrics]) for name in ("loss", "grad_norm")}
        return traces | _after(state.params, state.opt_state, cfg), used


def generate(
    cfg: GPTConfig,
    weights: Tensors,
    prompt_BT: np.ndarray,
    new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Continue prompts in float32, drawing with the noise of this seed; token ids (B, T + new_tokens)."""
    with precision("float32"):
        params, key = _params(weights, cfg, "float32"), jax.random.key(seed)
        return np.asarray(generation.generate(params, cfg, prompt_BT, new_tokens, temperature=temperature, top_k=top_k, key=key))


def draw(logits_BV: np.ndarray, temperature: float, top_k: int | None, seed: int) -> np.ndarray:
    """One token for each row of logits, drawn with `noise(seed)` of token 0."""
    config = SamplingConfig(temperature=temperature, top_k=top_k)
    processed_BV = Chain.of(config)(jnp.asarray(logits_BV))
    return np.asarray(choose(processed_BV, row_keys(config, jax.random.key(seed), len(logits_BV)), t=0))


def noise(seed: int, shape_BV: tuple[int, int]) -> Callable[[int], np.ndarray]:
    """The Gumbel noise that `generate` adds to the logits of each new token."""
    return lambda t: np.asarray(gumbel_noise(jax.random.key(seed), t, shape_BV))


def initial_state(cfg: TrainConfig, weights: Tensors, dtype: str) -> TrainState:
    """The state before the first update, from these weights."""
    return _start(_params(weights, cfg.model, dtype), jax.random.key(cfg.seed), cfg.replace(seed=0))


def train_step(
    state: TrainState, batch: Batch, masks: Tensors | None, cfg: TrainConfig, dtype: str
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update with these dropout masks, by the names of the reference's dropout modules (None: flaxgpt draws). Donates the state."""
    given = None if masks is None else stacked({f"{name}.keep": keep for name, keep in masks.items()}, cfg.model)
    return _train_step(state, batch, given, cfg.replace(seed=0), dtype)  # what is compiled does not depend on the seed


def drawn_masks(state: TrainState, inputs_BT: np.ndarray, cfg: GPTConfig) -> Tensors:
    """What dropout will keep in the next update of this state, by the names of the reference's dropout modules."""
    if not cfg.drop_rate:
        return {}
    masks = jax.device_get(_draw_masks(jax.random.fold_in(state.key, state.step), state.params, inputs_BT, cfg))
    return {name.removesuffix(".keep"): keep for name, keep in per_layer(masks, cfg).items()}


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """What all of this runs in: float64 where asked for, and products of float32 that are not rounded to less."""
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("float32"):
        yield


@functools.partial(jax.jit, static_argnames="cfg")
def _passes(params: Params, batch: Batch, cfg: GPTConfig) -> tuple[Any, ...]:
    inputs_BT, targets_BT = batch
    # Of one block: the scan runs it L times.
    points = {module_path(site.point) for site in sites(1)}

    def run(params: Params, perturbations: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "perturbations": perturbations}
        with tapped(points):
            logits_BTV, state = GPT(cfg).apply(variables, inputs_BT, mutable=["taps"])
        return next_token_loss(logits_BTV, targets_BT), state["taps"]

    shapes = jax.eval_shape(lambda: run(params, {}))[1]
    zeros = jax.tree.map(jnp.zeros_like, shapes)
    (loss, taps), (grads, tap_grads) = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(params, zeros)
    return loss, taps, grads, tap_grads


@jax.jit
def _clip(grads: Params, limit: float) -> tuple[Params, jax.Array]:
    return clip_by_global_norm(limit).update(grads, optax.EmptyState())[0], optax.tree.norm(grads)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnums=(0, 2, 3))
def _adamw(params: Params, grads: Params, mu: Params, nu: Params, step: int, cfg: TrainConfig) -> tuple[Params, optax.OptState]:
    tx = make_optimizer(cfg)
    opt_state = with_adam_state(tx.init(params), mu, nu, step)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


@functools.partial(jax.jit, static_argnames="cfg")
def _start(params: Params, key: jax.Array, cfg: TrainConfig) -> TrainState:
    return TrainState(jnp.int32(0), params, make_optimizer(cfg).init(params), key)


@functools.partial(jax.jit, static_argnames=("cfg", "dtype"), donate_argnums=0)
def _train_step(state: TrainState, batch: Batch, masks: Any, cfg: TrainConfig, dtype: str) -> tuple[TrainState, Any]:
    step = make_train_step(cfg.model.replace(dtype=dtype), make_optimizer(cfg), cfg.grad_accum_steps)
    return step(state, batch, masks)


@functools.partial(jax.jit, static_argnames="cfg")
def _draw_masks(key: jax.Array, params: Params, inputs_BT: jax.Array, cfg: GPTConfig) -> Any:
    _, drawn = GPT(cfg).apply({"params": params}, inputs_BT, deterministic=False, rngs={"dropout": key}, mutable=["dropout_masks"])
    return drawn["dropout_masks"]


def _params(weights: Tensors, cfg: GPTConfig, dtype: str) -> Params:
    """On the default device; parameters of a bfloat16 model are float32."""
    return jax.device_put(from_torch(weights, cfg, np.float64 if dtype == "float64" else np.float32))


def _named(params: Params, cfg: GPTConfig) -> Tensors:
    return named_parameters(jax.device_get(params), cfg, params["tok_emb"]["embedding"].dtype)


def _after(params: Params, opt_state: optax.OptState, cfg: TrainConfig) -> Tensors:
    adam = adam_state(opt_state)
    parts = {"parameter": params, "exp_avg": adam.mu, "exp_avg_sq": adam.nu}
    return {f"{part}/{name}": value for part, tree in parts.items() for name, value in _named(tree, cfg.model).items()}
