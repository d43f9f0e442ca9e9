"""Eight devices (made of one CPU) compute what one does. A process of its own, since JAX counts its devices once."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
import jax, numpy as np
from flaxgpt.config import GPTConfig, TrainConfig
from flaxgpt.optim import make_optimizer
from flaxgpt.sharding import make_mesh, shard_batch, state_shardings
from flaxgpt.state import create_state
from flaxgpt.step import make_train_step

fsdp, accum = map(int, sys.argv[1:])
model = GPTConfig(vocab_size=97, context_length=16, emb_dim=32, n_heads=4, n_layers=2, drop_rate=0.1)
cfg = TrainConfig(model=model, batch_size=16, grad_accum_steps=accum, fsdp=fsdp)
mesh, tx = make_mesh(fsdp), make_optimizer(cfg)
drawn = create_state(cfg, tx, mesh).params
state = create_state(cfg, tx, mesh, drawn)  # as a run starts from given parameters
kernel = state.params["trf_blocks"]["ff"]["layers_0"]["kernel"]
moment = state.opt_state[1][0].mu["trf_blocks"]["ff"]["layers_0"]["kernel"]
shard = lambda x: list(x.addressable_shards[0].data.shape)
shapes = dict(kernel=shard(kernel), moment=shard(moment))
shardings = state_shardings(state, mesh)
step = jax.jit(make_train_step(model, tx, accum), donate_argnums=0, out_shardings=(shardings, None))
rng, losses = np.random.default_rng(0), []
for _ in range(4):
    tokens = rng.integers(0, 97, (16, 17))
    batch = shard_batch((tokens[:, :-1], tokens[:, 1:]), mesh)
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
after = state.params["trf_blocks"]["ff"]["layers_0"]["kernel"]
shapes |= dict(after=shard(after), rows=shard(batch[0]))
as_in_table = all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, shardings)))
shapes |= dict(as_in_table=as_in_table, given_kept=not any(x.is_deleted() for x in jax.tree.leaves(drawn)))
print(json.dumps(dict(devices=jax.device_count(), losses=losses, **shapes)))
"""


def run(devices: int, fsdp: int, accum: int = 1) -> dict:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(fsdp), str(accum)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def one() -> dict:
    return run(1, 1)


@pytest.mark.parametrize("fsdp", [1, 4, 8])
def test_eight_devices_train_as_one_does(one, fsdp):
    eight = run(8, fsdp)
    assert eight["devices"] == 8
    assert eight["losses"] == pytest.approx(one["losses"], rel=2e-6)
    assert eight["rows"] == [2, 16], "each device has two of the sixteen rows"
    assert eight["kernel"] == eight["moment"] == eight["after"] == [2, 32 // fsdp, 128], "parameters and moments are split along D"
    assert eight["given_kept"], "the parameters that the run started from were donated with its state"
    assert eight["as_in_table"], "after an update some leaf is laid out otherwise than before: the step would compile again"


@pytest.mark.parametrize("accum", [2, 4])  # microbatches of 8 rows, which eight devices share, and of 4, which they can't
def test_accumulation_on_eight_devices_gives_the_losses_of_one(accum):
    assert run(8, 4, accum)["losses"] == pytest.approx(run(1, 1, accum)["losses"], rel=2e-6)


def test_an_fsdp_that_does_not_divide_the_devices_is_refused():
    from flaxgpt.sharding import make_mesh

    with pytest.raises(ValueError, match="fsdp=3 does not divide"):
        make_mesh(3)
