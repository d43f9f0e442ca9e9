"""One update and one evaluation, as pure functions of the state and a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flaxgpt.data import loader as data
from flaxgpt.loss import next_token_loss
from flaxgpt.model import GPT
from flaxgpt.state import Params, TrainState

Metrics = dict[str, jax.Array]


def make_train_step(model: GPT, tx: optax.GradientTransformation, grad_accum_steps: int = 1) -> Callable[..., tuple[TrainState, Metrics]]:
    """One update as a pure function (state, (inputs_BT, targets_BT)) -> (state, metrics), to be jitted by the caller.

    With gradient accumulation the batch is computed in equal microbatches, one after the other, so the mean of their
    gradients is the gradient of the mean. Metrics: `loss`, nats per token, and `grad_norm`, before clipping.

    An optional third argument holds dropout masks to be used in place of drawing any (see `flaxgpt.model.Dropout`), with
    accumulation those of each microbatch along a leading axis. That is how a run of another implementation is replayed.
    """

    def loss_fn(params: Params, batch: data.Batch, dropout_key: jax.Array, masks: Any) -> jax.Array:
        inputs_BT, targets_BT = batch
        variables = {"params": params} if masks is None else {"params": params, "dropout_masks": masks}
        rngs = {"dropout": dropout_key} if masks is None else {}  # so that a mask that was forgotten is an error, not a draw
        logits_BTV = model.apply(variables, inputs_BT, deterministic=False, rngs=rngs)
        return next_token_loss(logits_BTV, targets_BT)

    def mean_gradient(params: Params, *part: Any) -> tuple[jax.Array, Params]:
        if grad_accum_steps == 1:
            return jax.value_and_grad(loss_fn)(params, *part)

        def add(total: tuple[jax.Array, Params], part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_fn)(params, *part)), None

        # Microbatch i takes every grad_accum_steps-th row from i, so rows stay on the device that holds them.
        batch, dropout_key, masks = part
        batches = jax.tree.map(lambda x: x.reshape(-1, grad_accum_steps, *x.shape[1:]).swapaxes(0, 1), batch)
        parts = (batches, jax.random.split(dropout_key, grad_accum_steps), masks)
        first = jax.tree.map(lambda x: x[0], parts)
        zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(jax.value_and_grad(loss_fn), params, *first))
        total, _ = jax.lax.scan(add, zero, parts)
        return jax.tree.map(lambda x: x / grad_accum_steps, total)

    def train_step(state: TrainState, batch: data.Batch, dropout_masks: Any = None) -> tuple[TrainState, Metrics]:
        dropout_key = jax.random.fold_in(state.key, state.step)
        loss, grads = mean_gradient(state.params, batch, dropout_key, dropout_masks)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, state.key), {"loss": loss, "grad_norm": optax.tree.norm(grads)}

    return train_step


def make_eval_step(model: GPT) -> Callable[[Params, data.Batch], jax.Array]:
    """(params, (inputs_BT, targets_BT)) -> mean loss without dropout, to be jitted by the caller.

    It returns a number and nothing else, where `torch_ref.step.evaluate_model` moves the global generator.
    """

    def eval_step(params: Params, batch: data.Batch) -> jax.Array:
        inputs_BT, targets_BT = batch
        return next_token_loss(model.apply({"params": params}, inputs_BT), targets_BT)

    return eval_step
