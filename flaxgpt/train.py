"""The train step, a pure function, and the loop that applies it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxgpt import data, sharding
from flaxgpt.checkpoint import Checkpoints
from flaxgpt.corpus import Corpus
from flaxgpt.errors import InputError
from flaxgpt.generate import generate
from flaxgpt.loss import next_token_loss
from flaxgpt.model import GPT
from flaxgpt.optim import make_optimizer, make_schedule
from flaxgpt.run import CHECKPOINTS, Run
from flaxgpt.state import Params, TrainState, abstract_state, count_params, create_state

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
    """(params, (inputs_BT, targets_BT)) -> mean loss without dropout, to be jitted by the caller."""

    def eval_step(params: Params, batch: data.Batch) -> jax.Array:
        inputs_BT, targets_BT = batch
        return next_token_loss(model.apply({"params": params}, inputs_BT), targets_BT)

    return eval_step


def train(run: Run, corpus: Corpus, *, resume: bool = False) -> TrainState:
    """Train from the start, or from the run's newest checkpoint, to `max_steps` updates.

    Update s (from 0) trains on batch s; an evaluation, log line or checkpoint "at step s" comes after that update.
    The loop never waits for the update it has just dispatched: while the device computes it, the metrics of the one
    before are fetched and the next batch is made.

    Raises:
        InputError: the splits are too short for the config, there is nothing to resume from, or the loss is not finite.
    """
    cfg = run.cfg
    if cfg.model.dtype == "float64":
        raise InputError("dtype=float64 is for comparisons (parity_report.py, replay.py): train in float32 or bfloat16")
    train_batches = data.train_batches(corpus.train, cfg)
    splits = data.eval_batches(corpus.train, cfg, "training"), data.eval_batches(corpus.val, cfg, "validation")
    prompt_BT = np.asarray([corpus.tokenizer.encode(cfg.prompt)], np.int32)

    mesh, tx, model = sharding.make_mesh(cfg.fsdp), make_optimizer(cfg), GPT(cfg.model)
    template = abstract_state(cfg, tx)
    shardings = sharding.state_shardings(template, mesh)
    train_step = jax.jit(make_train_step(model, tx, cfg.grad_accum_steps), donate_argnums=0, out_shardings=(shardings, None))
    eval_step = jax.jit(make_eval_step(model))
    learning_rates = np.asarray(make_schedule(cfg)(np.arange(cfg.max_steps)))

    with Checkpoints(run.folder / CHECKPOINTS, keep=cfg.keep_checkpoints) as checkpoints:
        state = checkpoints.restore(template, shardings) if resume else create_state(cfg, tx, mesh)
        start = int(state.step)
        if start >= cfg.max_steps:
            raise InputError(f"{run.folder} has made its {start} updates: pass a larger --max-steps to go on")

        def report(step: int, metrics: Metrics) -> None:
            run.step(step, float(metrics["loss"]), float(metrics["grad_norm"]), float(learning_rates[step]))

        def evaluate(step: int) -> None:
            losses = [jnp.stack([eval_step(state.params, sharding.shard_batch(batch, mesh)) for batch in split]).mean() for split in splits]
            text = ""
            if cfg.sample_tokens:
                ids = generate(state.params, cfg.model, prompt_BT, max_new_tokens=cfg.sample_tokens)
                text = corpus.tokenizer.decode(np.asarray(ids[0]).tolist())
            run.evaluation(step, *map(float, losses), text)

        whole = "" if cfg.microbatch_size % mesh.size == 0 else f" (each with all rows: {cfg.microbatch_size} do not split over them)"
        run.begin(start, n_params=count_params(state.params), devices=f"{mesh.size} x {jax.devices()[0].device_kind}{whole}")
        pending: tuple[int, Metrics] | None = None
        for step in range(start, cfg.max_steps):
            state, metrics = train_step(state, sharding.shard_batch(train_batches[step], mesh))
            if pending:
                report(*pending)
            pending = step, metrics
            last = step == cfg.max_steps - 1 or run.stopped_by is not None
            evaluates = last or step % cfg.eval_every == 0
            saves = last or (step + 1) % cfg.checkpoint_every == 0
            if evaluates or saves:
                report(*pending)  # which refuses what is not finite: such a state is not worth saving
                pending = None
            if saves:
                checkpoints.save(state)
            if evaluates:
                evaluate(step)
            if last:
                break
    return state
