"""One update and one evaluation, as pure functions to be jitted by the caller. In `torch_ref/step.py` they change a model in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flaxgpt.config import GPTConfig
from flaxgpt.loss import head_loss
from flaxgpt.model import head_inputs
from flaxgpt.state import TrainState
from flaxgpt.types import Batch, Params

Metrics = dict[str, jax.Array]


def make_train_step(
    cfg: GPTConfig, tx: optax.GradientTransformation, grad_accum_steps: int = 1
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The function that makes one update: (state, (inputs_BT, targets_BT)) -> (state, metrics).

    Metrics are `loss`, in nats per token, and `grad_norm`, before clipping.

    An optional third argument holds dropout masks to be taken in place of drawing any (see `flaxgpt.layers.Dropout`), with
    accumulation those of each microbatch along a leading axis. That is how a run of another implementation is replayed.
    """

    def loss_fn(params: Params, batch: Batch, dropout_key: jax.Array, dropout_masks: Params | None) -> jax.Array:
        inputs_BT, targets_BT = batch
        # Not both: a mask that was forgotten is then an error, not a draw.
        randomness = {"dropout_key": dropout_key} if dropout_masks is None else {"dropout_masks": dropout_masks}
        return head_loss(*head_inputs(params, cfg, inputs_BT, **randomness), targets_BT, cfg)

    value_and_grad = accumulated(jax.value_and_grad(loss_fn), grad_accum_steps)

    def train_step(state: TrainState, batch: Batch, dropout_masks: Params | None = None) -> tuple[TrainState, Metrics]:
        dropout_key = jax.random.fold_in(state.key, state.step)
        loss, grads = value_and_grad(state.params, batch, dropout_key, dropout_masks)
        with jax.named_scope("optimizer"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return train_step


def make_eval_step(cfg: GPTConfig) -> Callable[[Params, Batch], jax.Array]:
    """The function that evaluates one batch: (params, (inputs_BT, targets_BT)) -> mean loss, without dropout.

    It returns a number and changes nothing, where `torch_ref.step.evaluate_model` moves the global generator.
    """

    def eval_step(params: Params, batch: Batch) -> jax.Array:
        inputs_BT, targets_BT = batch
        return head_loss(*head_inputs(params, cfg, inputs_BT), targets_BT, cfg)

    return eval_step


def accumulated(value_and_grad: Callable[..., Any], grad_accum_steps: int) -> Callable[..., Any]:
    """The same function, (params, batch, dropout_key, dropout_masks) -> (loss, gradients), computed in equal microbatches.

    They are computed one after the other, so that the activations of only one are held; the mean of their gradients is
    the gradient of the mean.
    """
    if grad_accum_steps == 1:
        return value_and_grad

    def mean(params: Params, batch: Batch, dropout_key: jax.Array, dropout_masks: Params | None) -> tuple[jax.Array, Params]:
        def add(total: tuple[jax.Array, Params], part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, value_and_grad(params, *part)), None

        # Microbatch i takes every grad_accum_steps-th row from i, so rows stay on the device that holds them.
        batches = jax.tree.map(lambda x: x.reshape(-1, grad_accum_steps, *x.shape[1:]).swapaxes(0, 1), batch)
        parts = (batches, jax.random.split(dropout_key, grad_accum_steps), dropout_masks)
        first = jax.tree.map(lambda x: x[0], parts)
        zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(value_and_grad, params, *first))
        total, _ = jax.lax.scan(add, zero, parts)
        return jax.tree.map(lambda x: x / grad_accum_steps, total)

    return mean
