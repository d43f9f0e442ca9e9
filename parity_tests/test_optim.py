import jax
import pytest
from conftest import SMALL, random_pair

from flaxgpt.config import TrainConfig
from flaxgpt.optim import make_schedule, matrices
from torch_ref.optim import learning_rate


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
