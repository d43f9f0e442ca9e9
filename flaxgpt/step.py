"""One update and one evaluation, as pure functions to be jitted by the caller. In `torch_ref/step.py` they change a model in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flaxgpt.config import GPTConfig, TrainConfig
from flaxgpt.layers import wide
from flaxgpt.loss import head_loss
from flaxgpt.model import head_kernel, hidden
from flaxgpt.optim import adam_state
from flaxgpt.sharding import data_parallel, placed_params, state_shardings
from flaxgpt.state import TrainState, abstract_state
from flaxgpt.types import Batch, Params

Metrics = dict[str, jax.Array]


def make_train_step(
    cfg: GPTConfig,
    tx: optax.GradientTransformation,
    grad_accum_steps: int = 1,
    *,
    gather: Literal["layer", "update"] = "layer",
    shardings: Params | None = None,
    skip_nonfinite: bool = False,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The function that makes one update: (state, (inputs_BT, targets_BT)) -> (state, metrics).

    Metrics are `loss`, in nats per token, and `grad_norm`, before clipping.

    An optional third argument holds dropout masks to be taken in place of drawing any (see `flaxgpt.layers.Dropout`). That is
    how a run of another implementation is replayed.

    Args:
        cfg: the model.
        tx: the optimizer.
        grad_accum_steps: microbatches that a batch is computed in; the result is the same.
        gather: when parameters that are split are gathered (see `flaxgpt.sharding.compute_mesh`).
        shardings: where they lie, if not on one device; the gradients are brought there for the optimizer.
        skip_nonfinite: where the loss or the gradient is not finite, leave parameters and moments as they were. The metrics then have
            `skipped` as well, how often that has happened in all updates of the state.
    """

    def loss_fn(params: Params, rows: dict[str, Any], dropout_key: jax.Array) -> jax.Array:
        # Not both: a mask that was forgotten is then an error, not a draw.
        masks = rows.get("dropout_masks")
        randomness = {"dropout_key": dropout_key, "rows_B": rows["number"]} if masks is None else {"dropout_masks": _swap_rows(masks)}
        return head_loss(hidden(params, cfg, rows["inputs"], **randomness), head_kernel(params, cfg), rows["targets"], cfg)

    def value_and_grad(params: Params, rows: dict[str, Any], dropout_key: jax.Array) -> tuple[jax.Array, Params]:
        loss, grads = jax.value_and_grad(loss_fn)(params, rows, dropout_key)
        return loss, placed_params(jax.tree.map(lambda grad: grad.astype(wide(grad.dtype)), grads))

    mean_value_and_grad = data_parallel(accumulated(value_and_grad, grad_accum_steps))

    def train_step(state: TrainState, batch: Batch, dropout_masks: Params | None = None) -> tuple[TrainState, Metrics]:
        inputs_BT, targets_BT = batch
        rows = {"inputs": inputs_BT, "targets": targets_BT, "number": jnp.arange(inputs_BT.shape[0])}
        if dropout_masks is not None:
            rows["dropout_masks"] = _swap_rows(dropout_masks)
        dropout_key = jax.random.fold_in(state.key, state.step)
        params = _matrices_in(cfg.dtype, state.params) if gather == "update" else state.params
        loss, grads = mean_value_and_grad(params, rows, dropout_key)
        if shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, shardings)
        with jax.named_scope("optimizer"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
            if skip_nonfinite:
                finite = jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"])
                new, old = (params, opt_state), (state.params, state.opt_state)
                params, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
                metrics["skipped"] = state.step + 1 - adam_state(opt_state).count
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return train_step


def jit_train_step(cfg: TrainConfig, tx: optax.GradientTransformation, mesh: Mesh) -> Callable[..., tuple[TrainState, Metrics]]:
    """The train step as a run jits it: it donates the old state. It is traced with `compute_mesh(mesh, cfg.gather)` in context.

    Args:
        cfg: the run.
        tx: its optimizer.
        mesh: what the state lies on.
    """
    shardings = state_shardings(abstract_state(cfg, tx), mesh)
    options = {"gather": cfg.gather, "shardings": shardings.params, "skip_nonfinite": cfg.skip_nonfinite > 0}
    step = make_train_step(cfg.model, tx, cfg.grad_accum_steps, **options)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_eval_step(cfg: GPTConfig) -> Callable[[Params, Batch], jax.Array]:
    """The function that evaluates one batch: (params, (inputs_BT, targets_BT)) -> mean loss, without dropout.

    It returns a number and changes nothing, where `torch_ref.step.evaluate_model` moves the global generator.
    """

    def eval_step(params: Params, batch: Batch) -> jax.Array:
        inputs_BT, targets_BT = batch
        return head_loss(hidden(params, cfg, inputs_BT), head_kernel(params, cfg), targets_BT, cfg)

    return data_parallel(eval_step)


def accumulated(value_and_grad: Callable[..., Any], grad_accum_steps: int) -> Callable[..., Any]:
    """The same function, (params, rows, dropout_key) -> (loss, gradients), computed in equal microbatches.

    They are computed one after the other, so that the activations of only one are held; the mean of their gradients is
    the gradient of the mean.
    """
    if grad_accum_steps == 1:
        return value_and_grad

    def mean(params: Params, rows: Any, dropout_key: jax.Array) -> tuple[jax.Array, Params]:
        def add(total: tuple[jax.Array, Params], rows: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, value_and_grad(params, rows, dropout_key)), None

        # Microbatch i takes every grad_accum_steps-th row from i, so rows stay on the device that holds them.
        microbatches = jax.tree.map(lambda x: x.reshape(-1, grad_accum_steps, *x.shape[1:]).swapaxes(0, 1), rows)
        first = jax.tree.map(lambda x: x[0], microbatches)
        zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(value_and_grad, params, first, dropout_key))
        total, _ = jax.lax.scan(add, zero, microbatches)
        return jax.tree.map(lambda x: x / grad_accum_steps, total)

    return mean


def _matrices_in(dtype: str, params: Params) -> Params:
    """The same parameters, matrices of the blocks in the dtype that they are multiplied in, as they go over the wire."""

    def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return x.astype(dtype) if path[0].key == "trf_blocks" and path[-1].key == "kernel" else x

    return jax.tree_util.tree_map_with_path(cast, params)


def _swap_rows(masks: Params) -> Params:
    """Dropout masks with rows as the first axis of all, or back: those of the blocks are stacked, (L, B, ...)."""
    return masks | {"trf_blocks": jax.tree.map(lambda x: x.swapaxes(0, 1), masks["trf_blocks"])}
