"""Eight devices (made of one CPU) compute what one does, whatever the mesh. A process of its own, since JAX counts its devices once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from flaxgpt.config import GPTConfig, TrainConfig
from flaxgpt.errors import InputError
from flaxgpt.sharding import check_batch, make_mesh

PROGRAM = """
import json, sys
import jax, numpy as np
from flaxgpt.config import GPTConfig, TrainConfig
from flaxgpt.convert.params import named_parameters
from flaxgpt.optim import make_optimizer
from flaxgpt.sharding import compute_mesh, make_mesh, shard_batch, state_shardings, within
from flaxgpt.state import create_state, init_state
from flaxgpt.step import jit_train_step, make_eval_step

dtype, updates, runs = json.loads(sys.argv[1])
jax.config.update("jax_enable_x64", dtype == "float64")
model = GPTConfig(vocab_size=96, context_length=16, emb_dim=32, n_heads=4, n_layers=2, drop_rate=0.1, dtype=dtype)

def train(devices, fsdp, tensor, accum, gather):
    cfg = TrainConfig(model=model, batch_size=32, grad_accum_steps=accum, fsdp=fsdp, tensor=tensor, gather=gather, warmup_steps=0)
    mesh, tx = make_mesh(fsdp, tensor, jax.devices()[:devices]), make_optimizer(cfg)
    drawn = jax.tree.map(lambda x: x.astype(dtype), create_state(cfg, tx, mesh).params)
    state = create_state(cfg, tx, mesh, drawn)  # as a run starts from given parameters
    shardings = state_shardings(state, mesh)
    step = within(compute_mesh(mesh, gather), jit_train_step(cfg, tx, mesh))
    evaluate = within(compute_mesh(mesh, gather), jax.jit(make_eval_step(model)))
    rng, losses = np.random.default_rng(0), []
    for _ in range(updates):
        tokens = rng.integers(0, 96, (32, 17))
        batch = shard_batch((tokens[:, :-1], tokens[:, 1:]), mesh)
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    kernel = state.params["trf_blocks"]["ff"]["layers_0"]["kernel"]
    moment = state.opt_state[1][0].mu["trf_blocks"]["ff"]["layers_0"]["kernel"]
    shard = lambda x: list(x.addressable_shards[0].data.shape)
    return named_parameters(jax.device_get(state.params), model, dtype), dict(
        losses=losses,
        eval_loss=float(evaluate(state.params, batch)),
        shapes=dict(kernel=shard(kernel), moment=shard(moment), rows=shard(batch[0])),
        as_in_table=all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, shardings))),
        given_kept=not any(x.is_deleted() for x in jax.tree.leaves(drawn)),
    )

one, reports = None, []
for run in runs:
    params, report = train(*run)
    one = one or params
    report["params"] = {name: float(np.linalg.norm(params[name] - one[name]) / np.linalg.norm(one[name])) for name in one}
    reports.append(report)
print(json.dumps(reports))
"""

ONE = (1, 1, 1, 1, "layer")


def train(dtype: str, updates: int, *runs: tuple) -> list[dict]:
    """What each run of (devices, fsdp, tensor, grad_accum_steps, gather) came to; `params` is how far each tensor is from the first's."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", PROGRAM, json.dumps([dtype, updates, runs])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(dtype: str, updates: int, runs: list[tuple], rel: float) -> None:
    """These runs on devices, of 32 rows, compute what one device does, and lie on their mesh as the table has it."""
    one, *others = train(dtype, updates, ONE, *runs)
    for (devices, fsdp, tensor, _, _), report in zip(runs, others, strict=True):
        weights = [2, 32 // fsdp, 128 // tensor]
        assert report["shapes"] == {"kernel": weights, "moment": weights, "rows": [32 * tensor // devices, 16]}
        assert report["losses"] == pytest.approx(one["losses"], rel=rel)
        assert report["eval_loss"] == pytest.approx(one["eval_loss"], rel=rel)
        assert {name: error for name, error in report["params"].items() if not error <= rel} == {}, "norm of the difference, relative"
        assert report["as_in_table"], "after an update some leaf is laid out otherwise than before: the step would compile again"
        assert report["given_kept"], "the parameters that the run started from were donated with its state"


def test_eight_devices_train_as_one_does_with_the_same_dropout():
    check("float32", 4, [(8, 2, 2, 4, "layer"), (8, 4, 1, 2, "update")], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "rel"), [("float32", 1e-5), ("float64", 1e-12)])
def test_every_mesh_and_every_accumulation_train_as_one_device_does(dtype, rel):
    meshes = [(1, 1), (8, 1), (4, 1), (2, 2), (2, 4)]  # data 8, 1, 2, 2 and 1
    runs = [(8, *mesh, accum, "layer") for mesh in meshes for accum in (1, 2, 4)]
    runs += [(8, *mesh, 2, "update") for mesh in meshes if mesh[0] > 1]
    check(dtype, 20, runs, rel)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--data 2 --fsdp 2 --tensor 2 --vocab-multiple 2 --loss-chunk 16 --gather update --remat dots",
        "--fsdp 4 --tensor 2 --vocab-multiple 8",
    ],
)
def test_the_ladder_climbs_the_program_of_eight_devices(flags):
    script = Path(__file__).parent.parent / "scripts" / "parity_report.py"
    done = subprocess.run(
        [sys.executable, script, *flags.split(), "--steps", "2", "--length", "32"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all within their bounds" in done.stdout


def test_axes_that_do_not_divide_the_devices_are_refused():
    with pytest.raises(InputError, match=r"fsdp=3 x tensor=1 does not divide the \d+ devices; their product can be 1"):
        make_mesh(3)


def test_a_batch_that_the_mesh_does_not_divide_is_refused_with_what_would_do():
    mesh = jax.sharding.AbstractMesh((2, 4, 1), ("data", "fsdp", "tensor"))
    cfg = TrainConfig(batch_size=32, grad_accum_steps=2)
    check_batch(cfg, mesh)
    with pytest.raises(InputError, match=r"batch_size=24 .* grad_accum_steps=2 .* 8 devices: expected a multiple of 16"):
        check_batch(cfg.replace(batch_size=24), mesh)


def test_heads_that_the_tensor_axis_does_not_divide_are_refused():
    with pytest.raises(InputError, match="n_heads=25 is not divisible by tensor=2"):
        TrainConfig(model=GPTConfig(emb_dim=1600, n_heads=25), tensor=2)


def test_a_row_keeps_its_dropout_masks_in_any_company():
    from flaxgpt.model import forward, init_params

    cfg = GPTConfig(vocab_size=96, context_length=16, emb_dim=32, n_heads=4, n_layers=2, drop_rate=0.5)
    params, key = init_params(cfg, jax.random.key(0)), jax.random.key(1)
    tokens_BT = np.random.default_rng(0).integers(0, 96, (6, 16))
    whole = forward(params, cfg, tokens_BT, dropout_key=key)
    rows_B = np.array([4, 1])
    np.testing.assert_allclose(forward(params, cfg, tokens_BT[rows_B], dropout_key=key, rows_B=rows_B), whole[rows_B], atol=1e-5)
    assert np.abs(np.asarray(forward(params, cfg, tokens_BT[rows_B], dropout_key=key)) - whole[rows_B]).max() > 0.1
