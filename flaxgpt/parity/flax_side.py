"""What flaxgpt computes, as NumPy arrays by the reference's names: the functions of `flaxgpt.parity.side.SeededSide`.

`torch_ref.parity.torch_side` is its twin; that of `replay` is `torch_ref.parity.replay.recorded_run`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from flaxgpt.config import GPTConfig, SamplingConfig, TrainConfig
from flaxgpt.convert.names import module_path
from flaxgpt.convert.params import from_torch, named_parameters, per_layer, stacked
from flaxgpt.edits import Edit, Edits, checked_edits
from flaxgpt.generation import generate as generation
from flaxgpt.generation.sampling import Chain, choose, gumbel_noise, row_keys
from flaxgpt.interventions import editing, layer_numbers, tapping, visiting
from flaxgpt.loss import next_token_loss
from flaxgpt.model import GPT
from flaxgpt.optim import adam_state, clip_by_global_norm, make_optimizer, with_adam_state
from flaxgpt.parity.replay import Repeated, Update
from flaxgpt.parity.side import Batch, Moments, Noise, Tensors
from flaxgpt.sharding import compute_mesh, make_mesh, placed_params, state_shardings, within
from flaxgpt.sites import sites
from flaxgpt.state import TrainState
from flaxgpt.step import Metrics, jit_train_step, make_eval_step
from flaxgpt.types import Params


def passes(cfg: GPTConfig, weights: Tensors, batch: Batch, dtype: str) -> dict[str, Tensors]:
    """One forward and backward pass without dropout."""
    return _passes_of(cfg, weights, batch, {}, dtype)


def editable(cfg: GPTConfig) -> list[str]:
    """All sites."""
    return [site.name for site in sites(cfg.n_layers)]


def edited(cfg: GPTConfig, weights: Tensors, batch: Batch, edits: Edits, dtype: str) -> Tensors:
    """One forward and backward pass with edits, and one without: an edit is an argument, so there is nothing to take away."""
    within, after = (_passes_of(cfg, weights, batch, given, dtype) for given in (edits, {}))
    parts = {
        "edited": within["activations"],
        "backward": within["backward"],
        "gradients": within["gradients"],
        "after": after["activations"],
    }
    return {f"{part}/{name}": value for part, named in parts.items() for name, value in named.items()}


def _passes_of(cfg: GPTConfig, weights: Tensors, batch: Batch, edits: Edits, dtype: str) -> dict[str, Tensors]:
    with precision(dtype):
        checked = checked_edits(edits, cfg, batch[0].shape[1])
        loss, taps, grads, tap_grads = jax.device_get(_passes(_params(weights, cfg, dtype), batch, checked, _of(cfg, dtype)))
    forward, backward = per_layer(taps, cfg), per_layer(tap_grads, cfg)
    points = {site.name: site.point for site in sites(cfg.n_layers)}
    return {
        "activations": {name: forward[point] for name, point in points.items()},
        "loss": {"loss": loss},
        "backward": {name: backward[point] for name, point in reversed(points.items())},
        "gradients": named_parameters(grads, cfg, grads["tok_emb"]["embedding"].dtype),
    }


def clip(gradients: Tensors, cfg: TrainConfig, dtype: str) -> Tensors:
    """The gradients, clipped, and the norm that they had."""
    with precision(dtype):
        clipped, norm = _clip(_params(gradients, cfg.model, dtype), cfg.clip_norm)
        return {"norm": np.asarray(norm), **_named(clipped, cfg.model)}


def adamw(cfg: TrainConfig, weights: Tensors, gradients: Tensors, moments: Moments, step: int, dtype: str) -> Tensors:
    """One update of AdamW from given gradients."""
    with precision(dtype):
        params, grads, mu, nu = (_params(t, cfg.model, dtype) for t in (weights, gradients, moments["exp_avg"], moments["exp_avg_sq"]))
        params, opt_state = _adamw(params, grads, mu, nu, step, cfg.replace(seed=0))
        return _after(params, opt_state, cfg)


def train(
    cfg: TrainConfig, weights: Tensors, batches: Sequence[Batch], dtype: str, masks: Sequence[Tensors] | None = None
) -> tuple[Tensors, list[Tensors]]:
    """Train on these batches with these masks, or with those that flaxgpt draws."""
    with precision(dtype):
        state = initial_state(cfg, weights, dtype)
        metrics, kept = [], []
        for step, batch in enumerate(batches):
            kept.append(drawn_masks(state, batch[0], cfg.model) if masks is None else masks[step])
            state, values = train_step(state, batch, None if masks is None else masks[step], cfg, dtype)
            metrics.append(jax.device_get(values))
        traces = {name: np.array([values[name] for values in metrics]) for name in ("loss", "grad_norm")}
        return traces | _after(state.params, state.opt_state, cfg), kept


def generate(
    cfg: GPTConfig,
    weights: Tensors,
    prompt_BT: np.ndarray,
    new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Continue prompts, drawing with the noise of this seed."""
    with precision("float32"):
        params, key = _params(weights, cfg, "float32"), jax.random.key(seed)
        return np.asarray(generation.generate(params, cfg, prompt_BT, new_tokens, temperature=temperature, top_k=top_k, key=key))


def draw(logits_BV: np.ndarray, temperature: float, top_k: int | None, seed: int) -> np.ndarray:
    """One token for each row of logits, drawn with the noise of this seed."""
    config = SamplingConfig(temperature=temperature, top_k=top_k)
    processed_BV = Chain.of(config)(jnp.asarray(logits_BV))
    return np.asarray(choose(processed_BV, row_keys(config, jax.random.key(seed), len(logits_BV)), t=0))


def noise(seed: int, shape_BV: tuple[int, int]) -> Noise:
    """The Gumbel noise of this seed, by the number of the new token."""
    return functools.cache(lambda t: np.asarray(gumbel_noise(jax.random.key(seed), t, shape_BV)))  # each sampler asks for the same


def replay(cfg: TrainConfig, weights: Tensors, updates: Iterable[Update], dtype: str = "float32") -> Iterator[Repeated]:
    """Train from a recording's weights on its batches, with its masks; evaluate on its batches, and sample, where it did.

    Holds one state and one update at a time. `torch_ref.parity.replay.recorded_run` makes the recording.

    Args:
        cfg: the run that was recorded.
        weights: its initial weights, by the names of the reference's parameters.
        updates: its updates, in order.
        dtype: "float32" or "float64".
    """
    model = _of(cfg.model, dtype)
    eval_step = jax.jit(make_eval_step(model))
    with precision(dtype):
        state = initial_state(cfg, weights, dtype)
    for update in updates:
        with precision(dtype):
            state, metrics = train_step(state, update.batch, update.masks, cfg, dtype)
            train_loss = val_loss = sample = None
            if update.evaluation:
                splits = update.evaluation.train_batches, update.evaluation.val_batches
                train_loss, val_loss = (float(np.mean([eval_step(state.params, batch) for batch in batches])) for batches in splits)
            if update.sample is not None:
                prompt_BT = np.array([update.sample[: len(update.sample) - cfg.sample_tokens]])
                sample = generation.generate(state.params, model, prompt_BT, cfg.sample_tokens)[0].tolist()
        yield Repeated(update, float(metrics["loss"]), float(metrics["grad_norm"]), train_loss, val_loss, sample)


def initial_state(cfg: TrainConfig, weights: Tensors, dtype: str) -> TrainState:
    """The state before the first update, from these weights."""
    tx, params = make_optimizer(cfg), _params(weights, cfg.model, dtype)
    state = TrainState(jnp.int32(0), params, tx.init(params), jax.random.key(cfg.seed))
    return jax.device_put(state, state_shardings(state, _mesh()))


def train_step(state: TrainState, batch: Batch, masks: Tensors | None, cfg: TrainConfig, dtype: str) -> tuple[TrainState, Metrics]:
    """One update with these dropout masks, by the names of the reference's dropout modules (None: flaxgpt draws). Donates the state."""
    given = None if masks is None else stacked({f"{name}.keep": keep for name, keep in masks.items()}, cfg.model)
    step = _jitted_step(cfg.replace(seed=0, model=_of(cfg.model, dtype)), _mesh())  # what is compiled does not depend on the seed
    return step(state, batch, given)


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
def _passes(params: Params, batch: Batch, edits: Mapping[str, Edit], cfg: GPTConfig) -> tuple[Any, ...]:
    inputs_BT, targets_BT = batch
    # Of one block: the scan runs it L times.
    points = {module_path(site.point) for site in sites(1)}

    def run(params: Params, perturbations: Any) -> tuple[jax.Array, Any]:
        variables = {"params": placed_params(params), "perturbations": perturbations, **layer_numbers(edits, cfg)}
        with visiting(*editing(edits, cfg, jnp.arange(inputs_BT.shape[1])), tapping(points)):
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


@functools.cache
def _jitted_step(cfg: TrainConfig, mesh: Mesh) -> Callable[..., tuple[TrainState, Metrics]]:
    """The very step that training runs; `gather` is not looked for here."""
    cfg = cfg.replace(gather="layer") if cfg.gather == "auto" else cfg
    return within(compute_mesh(mesh, cfg.gather), jit_train_step(cfg, make_optimizer(cfg), mesh))


def _mesh() -> Mesh:
    """The one in context, or the default device alone."""
    mesh = jax.sharding.get_mesh()
    return make_mesh(devices=[jax.config.jax_default_device or jax.devices()[0]]) if mesh.empty else mesh


def _of(cfg: GPTConfig, dtype: str) -> GPTConfig:
    """The model in this precision; no kernel computes in float64."""
    return cfg.replace(dtype=dtype, attention="plain" if dtype == "float64" else cfg.attention)


@functools.partial(jax.jit, static_argnames="cfg")
def _draw_masks(key: jax.Array, params: Params, inputs_BT: jax.Array, cfg: GPTConfig) -> Any:
    _, drawn = GPT(cfg).apply({"params": params}, inputs_BT, jnp.arange(len(inputs_BT)), rngs={"dropout": key}, mutable=["dropout_masks"])
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
