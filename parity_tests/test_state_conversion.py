"""A training state carried from one framework to the other, in the middle of a run."""

import jax
import numpy as np
import pytest
import torch
from conftest import SMALL, assert_close, random_ids, random_pair

from flaxgpt.config import TrainConfig
from flaxgpt.convert.params import from_torch
from flaxgpt.optim import make_optimizer
from flaxgpt.state import state_from_torch, state_to_torch
from flaxgpt.step import make_train_step
from torch_ref.checkpoint import to_numpy, to_tensors
from torch_ref.model import GPTModel
from torch_ref.optim import make_optimizer as make_torch_optimizer
from torch_ref.step import train_step

CONFIG = TrainConfig(model=SMALL, batch_size=4, warmup_steps=2, max_steps=8)


@pytest.fixture(scope="module", params=["all", "matrices"])
def cfg(request):
    """With biases, and without any."""
    model = SMALL if request.param == "all" else SMALL.replace(bias=False, activation="gelu")
    return CONFIG.replace(decay=request.param, model=model)


def batch(step):
    return random_ids(SMALL, (4, 16), seed=2 * step), random_ids(SMALL, (4, 16), seed=2 * step + 1)


def train_torch(model, optimizer, steps, cfg):
    for step in steps:
        train_step(model, optimizer, tuple(map(torch.from_numpy, batch(step))), step, cfg)


def train_jax(state, steps, cfg):
    train_step = jax.jit(make_train_step(cfg.model, make_optimizer(cfg)))
    for step in steps:
        state, _ = train_step(state, batch(step))
    return state


def start(cfg, updates=0):
    model, _ = random_pair(cfg.model)
    optimizer = make_torch_optimizer(model, cfg)
    train_torch(model, optimizer, range(updates), cfg)
    return model, optimizer


def carried(model, optimizer, cfg):
    return state_from_torch(to_numpy(dict(model.state_dict())), to_numpy(optimizer.state_dict()), cfg)


def test_a_round_trip_is_exact_and_loads_strictly(cfg):
    model, optimizer = start(cfg, updates=3)
    state = carried(model, optimizer, cfg)
    assert int(state.step) == 3
    state_dict, optimizer_state = state_to_torch(state, cfg)
    expected = optimizer.state_dict()
    assert optimizer_state["state"].keys() == expected["state"].keys()
    for i, entry in expected["state"].items():
        for part, value in entry.items():
            np.testing.assert_array_equal(optimizer_state["state"][i][part], value.numpy(), err_msg=f"{part} of parameter {i}")
    for ours, theirs in zip(optimizer_state["param_groups"], expected["param_groups"], strict=True):
        assert {k: v for k, v in ours.items() if k != "lr"} == {k: v for k, v in theirs.items() if k != "lr"}
    other = GPTModel(cfg.model)
    other.load_state_dict(to_tensors(state_dict))
    make_torch_optimizer(other, cfg).load_state_dict(to_tensors(optimizer_state))
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
    again = state_from_torch(state_dict, optimizer_state, cfg)
    jax.tree.map(np.testing.assert_array_equal, (again.params, again.opt_state), (state.params, state.opt_state))


@pytest.mark.parametrize("direction", ["torch to jax", "jax to torch"])
def test_a_run_that_changes_frameworks_lands_where_it_would_have(cfg, direction):
    model, optimizer = start(cfg)
    state = carried(model, optimizer, cfg)  # of an optimizer that has made no update yet
    if direction == "torch to jax":
        train_torch(model, optimizer, range(4), cfg)
        state = train_jax(carried(model, optimizer, cfg), range(4, 8), cfg)
        train_torch(model, optimizer, range(4, 8), cfg)  # the run that was not interrupted
    else:
        other, other_optimizer = start(cfg)
        state_dict, optimizer_state = state_to_torch(train_jax(state, range(4), cfg), cfg)
        state = train_jax(state, range(8), cfg)  # the run that was not interrupted
        other.load_state_dict(to_tensors(state_dict))
        other_optimizer.load_state_dict(to_tensors(optimizer_state))
        train_torch(other, other_optimizer, range(4, 8), cfg)
        model = other
    before = from_torch(to_numpy(dict(start(cfg)[0].state_dict())), cfg.model)
    theirs = from_torch(to_numpy(dict(model.state_dict())), cfg.model)
    paths = jax.tree.leaves_with_path(state.params)
    for (path, ours), wanted, first in zip(paths, jax.tree.leaves(theirs), jax.tree.leaves(before), strict=True):
        moved = float(np.linalg.norm(wanted - first))
        assert_close("parameters of a run that changed frameworks", ours, wanted, 5e-4, scale=moved, where=jax.tree_util.keystr(path))


def test_an_optimizer_state_of_another_model_is_refused_with_every_fault():
    model, optimizer = start(CONFIG, updates=1)
    state_dict, optimizer_state = to_numpy(dict(model.state_dict())), to_numpy(optimizer.state_dict())
    wider = CONFIG.replace(model=SMALL.replace(emb_dim=64))
    with pytest.raises(ValueError, match=r"exp_avg: wrong shape: tok_emb\.weight is \(97, 32\), expected \(97, 64\), pos_emb"):
        state_from_torch(state_dict, optimizer_state, wider)
    deeper = CONFIG.replace(model=SMALL.replace(n_layers=3))
    with pytest.raises(ValueError, match=r"of another model or decay: its groups hold \[15, 16\] parameters, expected \[21, 23\]"):
        state_from_torch(state_dict, optimizer_state, deeper)
    with pytest.raises(ValueError, match=r"betas is \(0\.9, 0\.95\) in group 0, \(0\.9, 0\.999\) in the config"):
        state_from_torch(state_dict, optimizer_state, CONFIG.replace(beta2=0.999))
    del optimizer_state["state"][3]["exp_avg_sq"]
    with pytest.raises(ValueError, match=r"exp_avg_sq: missing: trf_blocks\.0\.att\.W_key\.weight"):
        state_from_torch(state_dict, optimizer_state, CONFIG)


def test_the_state_of_another_optimizer_is_refused():
    model, _ = start(CONFIG)
    groups = [
        {"params": list(group["params"]), "weight_decay": group["weight_decay"]}
        for group in make_torch_optimizer(model, CONFIG).param_groups
    ]
    adam = torch.optim.Adam(groups, lr=1e-3, betas=(0.9, 0.95))
    train_torch(model, adam, range(1), CONFIG)
    state_dict = to_numpy(dict(model.state_dict()))
    with pytest.raises(ValueError, match="decoupled_weight_decay is False in group 0, True in the config"):
        state_from_torch(state_dict, to_numpy(adam.state_dict()), CONFIG)
    for other in (None, [], {}, {"state": {}, "param_groups": [{}]}, {"state": {0: 1}, "param_groups": []}):
        with pytest.raises(ValueError, match="not that of an AdamW"):
            state_from_torch(state_dict, other, CONFIG)


def test_moments_that_are_not_finite_are_refused_by_name():
    model, optimizer = start(CONFIG, updates=1)
    optimizer_state = to_numpy(optimizer.state_dict())
    optimizer_state["state"][1]["exp_avg"][2, 3] = np.nan
    with pytest.raises(
        ValueError, match=r"moments exp_avg are not finite: 1 of 31 tensors, the first pos_emb\.weight with nan at \[2, 3\]"
    ):
        state_from_torch(to_numpy(dict(model.state_dict())), optimizer_state, CONFIG)
