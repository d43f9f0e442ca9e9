"""The training loop: a state and a batch go into an update, a new state comes out."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxgpt import hosts, sharding
from flaxgpt.checkpoint import Checkpoints
from flaxgpt.config import TrainConfig
from flaxgpt.data.corpora import Corpus
from flaxgpt.data.loader import Batches, batch_windows, eval_batches, train_batches
from flaxgpt.data.tokenizer import Tokenizer
from flaxgpt.errors import InputError
from flaxgpt.generation.generate import generate
from flaxgpt.kernels import choose_attention
from flaxgpt.optim import make_optimizer, make_schedule
from flaxgpt.plan.search import settle
from flaxgpt.plan.targets import present
from flaxgpt.profiler import Tracer
from flaxgpt.run.folder import CHECKPOINTS, PROFILE
from flaxgpt.run.log import RunLog, check_loss, not_finite
from flaxgpt.state import TrainState, abstract_state, count_params, create_state
from flaxgpt.step import Metrics, jit_train_step, make_eval_step
from flaxgpt.types import Batch, Params


def train(
    cfg: TrainConfig,
    corpus: Corpus,
    log: RunLog,
    *,
    resume: bool = False,
    params: Params | None = None,
    profile: range | None = None,
) -> TrainState:
    """Train from the run folder's newest checkpoint if there is one to go on from, else from the start, to `max_steps` updates.

    Update s (from 0) trains on batch s; an evaluation, log line or checkpoint "at step s" comes after that update.
    The loop never waits for the update it has just dispatched: while the device computes it, the metrics of the one
    before are fetched and the next batch is made.

    Args:
        cfg: the run, as `flaxgpt.run.setup.prepare` returns it.
        corpus: its data.
        log: what the results are reported to; its folder takes the checkpoints.
        resume: go on from the newest of them, or if there is none yet, begin anew.
        params: what to start from, if not from random parameters; arrays, or what is read where it is indexed.
        profile: updates that JAX's profiler traces.

    Raises:
        InputError: the splits are too short for the config, the devices can't share its batches, what is to be found (auto) does not fit in
            memory, the attention that is asked for is impossible on these devices, the run is complete, the updates to trace are not among
            those to come, or more losses in a row than `skip_nonfinite` are not finite; or the hosts don't share the run folder.
    """
    if cfg.model.dtype == "float64":
        raise InputError("dtype=float64 is for comparisons (parity_report.py, replay.py): train in float32 or bfloat16")
    mesh, optimizer = sharding.make_mesh(cfg.fsdp, cfg.tensor), make_optimizer(cfg)
    target = present(list(mesh.devices.flat))
    asked, cfg = cfg, settle(cfg, target)
    found = cfg.gather, cfg.grad_accum_steps
    gather, grad_accum_steps = hosts.of_first(lambda: found)  # a host with less memory may have found others
    cfg = cfg.replace(gather=gather, grad_accum_steps=grad_accum_steps)
    peak_flops = cfg.peak_tflops * 1e12 * mesh.size if cfg.peak_tflops else target.peak(cfg.model.dtype)
    sharding.check_batch(cfg, mesh)
    rows = functools.partial(sharding.process_rows, mesh)
    batches = train_batches(corpus.train, cfg, rows)
    splits = eval_batches(corpus.train, cfg, "training", rows), eval_batches(corpus.val, cfg, "validation", rows)
    devices = describe_devices(cfg, mesh) + describe_choices(asked, cfg)
    template = abstract_state(cfg, optimizer)
    shardings = sharding.state_shardings(template, mesh)
    compute_mesh = sharding.compute_mesh(mesh, cfg.gather)
    train_step = sharding.within(compute_mesh, jit_train_step(cfg, optimizer, mesh))
    eval_step = sharding.within(compute_mesh, jax.jit(make_eval_step(cfg.model)))
    sample = sharding.within(mesh, make_sample)
    agreed = hosts.Agreement(mesh, values=2)
    learning_rates = np.asarray(jax.jit(make_schedule(cfg))(np.arange(cfg.max_steps)))

    tracer = Tracer(profile if hosts.is_first() else None, log.out_dir / PROFILE)
    with Checkpoints(log.out_dir / CHECKPOINTS, keep=cfg.keep_checkpoints) as checkpoints, tracer:
        goes_on = resume and hosts.of_first(lambda: checkpoints.newest) is not None
        state = checkpoints.restore(template, shardings) if goes_on else create_state(cfg, optimizer, mesh, params)
        start = int(state.step)
        evaluates = functools.partial(evaluation_is_due, cfg)
        # A checkpoint can be older than the evaluation after the same update, which a kill or a stop has then prevented.
        owed = goes_on and evaluates(start - 1) and not hosts.of_first(lambda: log.evaluated(start - 1))
        if start >= cfg.max_steps and not owed:
            raise InputError(f"{log.out_dir} has made its {start} updates: pass a larger --max-steps to go on")
        tracer.check(range(start, cfg.max_steps))
        log.begin(cfg, corpus, start, n_params=count_params(state.params), devices=devices, resume=resume, peak_flops=peak_flops)
        hosts.check_shared(log.out_dir)
        log.compiling()
        unreported: tuple[int, Metrics] | None = None
        began, saved_at, in_a_row = time.monotonic(), 0.0, 0

        def report(step: int, metrics: Metrics) -> None:
            """Wait for the metrics of an update, check them and hand them to the log."""
            nonlocal in_a_row
            with log.timed("compute"):
                loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
            in_a_row = 0 if math.isfinite(loss) and math.isfinite(grad_norm) else in_a_row + 1
            if in_a_row > cfg.skip_nonfinite:
                windows = batch_windows(corpus.train, cfg, step)
                check_loss(step, loss, grad_norm, f", the batch is of windows {windows}, {last_saved(checkpoints)}")
            if in_a_row:
                log.skipped(step, loss, grad_norm)
            else:
                skipped = int(metrics.get("skipped", 0))  # the schedule counts the updates that were made
                log.update(step, loss, grad_norm, float(learning_rates[step - skipped]), skipped=skipped)

        def stop_and_time() -> tuple[bool, float]:
            """Whether any process was asked to stop, and the seconds since the start."""
            signal, now = agreed(log.stop.signal or 0, time.monotonic() - began)
            log.stop.signal = int(signal) or log.stop.signal
            return signal > 0, now

        def save() -> None:
            with log.timed("checkpoint"):
                log.sync()
                checkpoints.save(state)

        def report_evaluation(step: int) -> bool:
            """Evaluate the parameters after this update; False if that was given up, since the run is to stop."""
            with log.timed("evaluation"):
                losses = evaluate(state.params, eval_step, splits, mesh, lambda: stop_and_time()[0])
                if losses is None:
                    return False
                text = sample(state.params, cfg, corpus.tokenizer)
            if step == cfg.max_steps - 1:
                with log.timed("checkpoint"):
                    checkpoints.wait()  # so that what the last save takes is counted, too
            log.evaluation(step, *losses, text)
            return True

        stops = owed and not report_evaluation(start - 1)
        for step in range(start, start if stops else cfg.max_steps):
            with log.timed("data"):
                batch = sharding.shard_batch(batches[step], mesh, batches.B)
            with log.timed("compute"):
                tracer.before(step, state)
                with jax.profiler.StepTraceAnnotation("update", step_num=step):
                    state, metrics = train_step(state, batch)
                tracer.after(step, state)
                stops, now = stop_and_time()
            if unreported:
                report(*unreported)
            unreported = step, metrics
            due = cfg.checkpoint_minutes is not None and now - saved_at >= 60 * cfg.checkpoint_minutes
            saves = stops or due or step == cfg.max_steps - 1 or (step + 1) % cfg.checkpoint_every == 0
            if saves or evaluates(step):
                report(*unreported)  # first, since it refuses what is not finite and not worth saving
                unreported = None
                if not all_finite(state.params):
                    raise not_finite(step, f", {last_saved(checkpoints)}")
            if saves:
                save()
                saved_at = now
            if evaluates(step) and not stops:
                stops = not report_evaluation(step)
                if stops and not saves:
                    save()
            if stops:
                break
    log.profiled(tracer.trace)
    return state


def evaluation_is_due(cfg: TrainConfig, step: int) -> bool:
    """Whether there is an evaluation after this update: every `eval_every`-th from the first on, and the last."""
    return step % cfg.eval_every == 0 or step == cfg.max_steps - 1


@jax.jit
def all_finite(params: Params) -> jax.Array:
    """Whether every parameter is a number: a boolean."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()


def last_saved(checkpoints: Checkpoints) -> str:
    """What there is to go back to, for a message, once what is being saved is on disk."""
    checkpoints.wait()
    return "no checkpoint was saved" if checkpoints.newest is None else f"the last checkpoint is of {checkpoints.newest} updates"


def evaluate(
    params: Params, eval_step: Callable[[Params, Batch], jax.Array], splits: Sequence[Batches], mesh: Mesh, stops: Callable[[], bool]
) -> tuple[float, float] | None:
    """Training and validation loss: the mean over the batches of each split. None once `stops`, which is asked before each batch."""
    losses = []
    for split in splits:
        of_batches: list[jax.Array] = []
        for batch in split:
            if stops():
                return None
            jax.block_until_ready(of_batches[-2:-1])  # one batch ahead of the devices, or all would be asked for at once
            of_batches.append(eval_step(params, sharding.shard_batch(batch, mesh, split.B)))
        losses.append(jnp.stack(of_batches).mean())
    train_loss, val_loss = map(float, losses)
    return train_loss, val_loss


def make_sample(params: Params, cfg: TrainConfig, tokenizer: Tokenizer) -> str:
    """The run's prompt and how the model continues it, greedily; "" if `sample_tokens` is 0."""
    if not cfg.sample_tokens:
        return ""
    prompt_BT = np.asarray([tokenizer.encode(cfg.prompt)], np.int32)
    ids_BT = generate(params, cfg.model, prompt_BT, max_new_tokens=cfg.sample_tokens)
    return tokenizer.decode(np.asarray(ids_BT[0]).tolist())


def describe_devices(cfg: TrainConfig, mesh: Mesh) -> str:
    """How many devices of which kind, how they share the work, and which attention they compute.

    Raises:
        InputError: `attention=fused` is impossible on them.
    """
    device = mesh.devices.flat[0]
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    choice = choose_attention(cfg.model, cfg.model.context_length, device.platform, dropout=cfg.model.drop_rate > 0)
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{mesh.size} x {device.device_kind}{processes}{axes and f' ({axes})'}, {choice.implementation} attention ({choice.reason})"


def describe_choices(asked: TrainConfig, cfg: TrainConfig) -> str:
    """How weights are gathered, and what was left open and is now known, for the first line."""
    said = ""
    if cfg.fsdp > 1:
        said += f", gather {cfg.gather}" + (" (the least traffic that fits)" if asked.gather == "auto" else "")
    if asked.grad_accum_steps == "auto":
        said += f", grad_accum_steps {cfg.grad_accum_steps} (the fewest that fit)"
    return said
