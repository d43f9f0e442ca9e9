"""The loop: one update after another, evaluated, logged and saved."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from flaxgpt import sharding
from flaxgpt.checkpoint import Checkpoints
from flaxgpt.data import loader as data
from flaxgpt.data.corpora import Corpus
from flaxgpt.errors import InputError
from flaxgpt.generation.generate import generate
from flaxgpt.optim import make_optimizer, make_schedule
from flaxgpt.run.folder import CHECKPOINTS, Run
from flaxgpt.state import TrainState, abstract_state, count_params, create_state
from flaxgpt.step import Metrics, make_eval_step, make_train_step


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

    mesh, tx = sharding.make_mesh(cfg.fsdp), make_optimizer(cfg)
    template = abstract_state(cfg, tx)
    shardings = sharding.state_shardings(template, mesh)
    train_step = jax.jit(make_train_step(cfg.model, tx, cfg.grad_accum_steps), donate_argnums=0, out_shardings=(shardings, None))
    eval_step = jax.jit(make_eval_step(cfg.model))
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
