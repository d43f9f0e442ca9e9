"""What is timed of flaxgpt: calls that return when their work is done."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxgpt.benchmark.timing import Call
from flaxgpt.config import GPTConfig, TrainConfig
from flaxgpt.generation.decode import unstack
from flaxgpt.generation.generate import generate
from flaxgpt.loss import head_loss
from flaxgpt.model import head_kernel, hidden, init_params
from flaxgpt.optim import make_optimizer
from flaxgpt.sharding import make_mesh, within
from flaxgpt.state import abstract_state, create_state
from flaxgpt.step import jit_train_step, make_eval_step
from flaxgpt.types import Batch, Params

PARTS = ("forward", "gradients", "optimizer", "update")
"""Of an update: the loss without gradients or dropout; loss and gradients; clipping and AdamW; and all of it, as training jits it."""


def update_parts(cfg: TrainConfig, batch: Batch, parts: tuple[str, ...] = PARTS) -> dict[str, Call]:
    """A call for each part, of random parameters; only what `parts` names is made, since each holds parameters of its own."""
    mesh, tx = make_mesh(1, 1), make_optimizer(cfg)
    made = {"forward": _forward, "gradients": _gradients, "optimizer": _optimizer, "update": _update}
    return {part: within(mesh, made[part](cfg, tx, mesh, batch)) for part in parts}


def shapes(cfg: TrainConfig) -> Params:
    """Of the parameters, none of them made."""
    return abstract_state(cfg, make_optimizer(cfg)).params


def _forward(cfg: TrainConfig, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh, batch: Batch) -> Call:
    params, evaluate = create_state(cfg, tx, mesh).params, jax.jit(make_eval_step(cfg.model))
    return lambda: float(evaluate(params, batch))


def _gradients(cfg: TrainConfig, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh, batch: Batch) -> Call:
    params, key = create_state(cfg, tx, mesh).params, jax.random.key(0)

    @jax.jit
    @jax.value_and_grad
    def gradients(params: Params, batch: Batch) -> jax.Array:
        inputs_BT, targets_BT = batch
        return head_loss(hidden(params, cfg.model, inputs_BT, dropout_key=key), head_kernel(params, cfg.model), targets_BT, cfg.model)

    return lambda: jax.block_until_ready(gradients(params, batch))


def _optimizer(cfg: TrainConfig, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh, batch: Batch) -> Call:
    state = create_state(cfg, tx, mesh)
    held = [(state.params, state.opt_state)]
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 1e-3), state.params)

    def apply(state: tuple[Params, optax.OptState], grads: Params) -> tuple[Params, optax.OptState]:
        params, opt_state = state
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    applied = jax.jit(apply, donate_argnums=0)

    def call() -> None:
        held[0] = jax.block_until_ready(applied(held[0], grads))

    return call


def _update(cfg: TrainConfig, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh, batch: Batch) -> Call:
    held, step = [create_state(cfg, tx, mesh)], jit_train_step(cfg, tx, mesh)

    def call() -> float:
        held[0], metrics = step(held[0], batch)
        return float(metrics["loss"])

    return call


def generation(cfg: GPTConfig, prompt_BT: np.ndarray, new_tokens: int) -> Call:
    """Greedy decoding of random parameters; with one new token, little else than reading the prompt."""
    params = unstack(jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0)), cfg)
    return lambda: np.asarray(generate(params, cfg, prompt_BT, new_tokens))


def compile_seconds(cfg: TrainConfig, batch: Batch) -> float:
    """From tracing the update to its program, with no program taken from a cache; no parameters are made."""
    mesh, tx = make_mesh(1, 1), make_optimizer(cfg)
    state = abstract_state(cfg, tx)
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        started = time.perf_counter()
        within(mesh, lambda: jit_train_step(cfg, tx, mesh).lower(state, batch).compile())()
        return time.perf_counter() - started
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
