import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import SMALL, assert_close, random_ids, random_pair

from flaxgpt.config import TrainConfig
from flaxgpt.convert import from_torch
from flaxgpt.model import GPT
from flaxgpt.optim import make_optimizer, make_schedule, matrices
from flaxgpt.state import TrainState
from flaxgpt.train import make_train_step
from torch_ref.train import calc_loss_batch, learning_rate
from torch_ref.train import make_optimizer as make_torch_optimizer


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("low", [None, 1e-4])
def test_both_schedules_agree_at_every_step(warmup, low):
    cfg = TrainConfig(learning_rate=1e-3, min_learning_rate=low, warmup_steps=warmup, max_steps=50, decay_steps=40)
    for step in range(50):
        assert float(make_schedule(cfg)(step)) == pytest.approx(learning_rate(step, cfg), rel=1e-6), f"step {step}"


def test_the_schedule_has_its_corners_where_they_belong():
    cfg = TrainConfig(learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=10, max_steps=110)
    assert learning_rate(0, cfg) == pytest.approx(1e-3 / 11)
    assert learning_rate(10, cfg) == pytest.approx(1e-3)
    assert learning_rate(60, cfg) == pytest.approx(1e-4 + 9e-4 / 2)
    assert learning_rate(110, cfg) == learning_rate(500, cfg) == pytest.approx(1e-4)


def test_only_kernels_and_embeddings_count_as_matrices():
    params = random_pair(SMALL.replace(qkv_bias=True))[1]
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): flag for path, flag in jax.tree.leaves_with_path(matrices(params))}
    assert {name.rsplit("/")[-1] for name, flag in flat.items() if flag} == {"kernel", "embedding"}
    assert {name.rsplit("/")[-1] for name, flag in flat.items() if not flag} == {"bias", "scale", "shift"}


@pytest.mark.parametrize("decay", ["all", "matrices"])
@pytest.mark.parametrize("clip_norm", [None, 0.1])
@pytest.mark.parametrize("accum", [1, 2])
def test_five_updates_leave_the_same_parameters(decay, clip_norm, accum):
    cfg = TrainConfig(
        model=SMALL, batch_size=4, grad_accum_steps=accum, decay=decay, clip_norm=clip_norm, weight_decay=0.5, warmup_steps=2, max_steps=9
    )
    reference, params = random_pair(SMALL)
    optimizer, tx = make_torch_optimizer(reference, cfg), make_optimizer(cfg)
    state = TrainState(jnp.int32(0), jax.tree.map(jnp.asarray, params), tx.init(params), jax.random.key(0))
    step = jax.jit(make_train_step(GPT(SMALL), tx, accum))
    for i in range(5):
        inputs, targets = random_ids(SMALL, (4, 16), seed=2 * i), random_ids(SMALL, (4, 16), seed=2 * i + 1)
        state, metrics = step(state, (inputs, targets))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(i, cfg)
        optimizer.zero_grad()
        loss = calc_loss_batch(reference, torch.from_numpy(inputs), torch.from_numpy(targets))  # the whole batch at once
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), clip_norm or math.inf)
        optimizer.step()
        assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-6)
        assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-5)
    expected = from_torch({k: v.detach() for k, v in reference.state_dict().items()}, SMALL)
    start = jax.tree.leaves(params)
    for (path, ours), theirs, before in zip(jax.tree.leaves_with_path(state.params), jax.tree.leaves(expected), start, strict=True):
        moved = float(np.linalg.norm(np.asarray(theirs, np.float64) - before))
        where = f"{jax.tree_util.keystr(path)} decay={decay} clip_norm={clip_norm} accum={accum}"
        assert_close("5 AdamW updates, relative to their size", ours, theirs, 5e-4, scale=moved, where=where)
