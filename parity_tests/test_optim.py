import jax
import pytest
from conftest import SMALL, random_pair

from flaxgpt.config import TrainConfig
from flaxgpt.optim import decay_mask, make_schedule
from torch_ref import optim as torch_optim


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("low", [None, 1e-4])
def test_both_schedules_agree_at_every_step(warmup, low):
    cfg = TrainConfig(learning_rate=1e-3, min_learning_rate=low, warmup_steps=warmup, max_steps=50, decay_steps=40)
    ours, theirs = make_schedule(cfg), torch_optim.make_schedule(cfg)
    for step in range(50):
        assert float(ours(step)) == pytest.approx(theirs(step), rel=1e-6), f"step {step}"


def test_the_schedule_has_its_corners_where_they_belong():
    cfg = TrainConfig(learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=10, max_steps=110)
    rate = torch_optim.make_schedule(cfg)
    assert rate(0) == pytest.approx(1e-3 / 11)
    assert rate(10) == pytest.approx(1e-3)
    assert rate(60) == pytest.approx(1e-4 + 9e-4 / 2)
    assert rate(110) == rate(500) == pytest.approx(1e-4)


def test_only_kernels_and_embeddings_decay():
    params = random_pair(SMALL.replace(qkv_bias=True))[1]
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): flag for path, flag in jax.tree.leaves_with_path(decay_mask(params))}
    assert {name.rsplit("/")[-1] for name, flag in flat.items() if flag} == {"kernel", "embedding"}
    assert {name.rsplit("/")[-1] for name, flag in flat.items() if not flag} == {"bias", "scale", "shift"}
