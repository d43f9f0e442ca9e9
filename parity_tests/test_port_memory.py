"""A check runs in pieces that equal layers share, and holds few arrays at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxgpt.port import evaluate
from flaxgpt.port.evaluate import Program
from flaxgpt.port.kept import in_files, in_memory

LAYERS, D = 12, 512


def deep(params, x):
    """A dozen equal layers, and all their gradients."""

    def loss(params):
        y = x
        for weight in params:
            for _ in range(evaluate.LENGTH // 4):  # so that a layer has more operations than a piece
                y = jnp.tanh(y) * 0.5
            y = y @ weight
        return (y * y).sum()

    return jax.value_and_grad(loss)(params)


def shapes(*arrays):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)


def drawn(layers=LAYERS):
    draw = np.random.default_rng(0)
    return [(draw.normal(size=(D, D)) / D**0.5).astype(np.float32) for _ in range(layers)], draw.normal(size=(1, D)).astype(np.float32)


def kept(*arrays):
    return jax.tree.map(lambda x: in_memory(x), arrays)


@pytest.mark.parametrize("x64", [False, True])
def test_a_program_in_pieces_computes_what_the_function_does(x64):
    with jax.enable_x64(x64):
        params, x = jax.tree.map(lambda x: x.astype(np.float64 if x64 else np.float32), drawn())
        found = Program(deep, *shapes(params, x))(*kept(params, x), keep=in_memory)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(deep(params, x)), strict=True):
            np.testing.assert_allclose(one(), other, rtol=1e-12 if x64 else 1e-4, atol=1e-12 if x64 else 1e-5)


def test_a_deeper_model_has_no_more_pieces_to_compile():
    counts = []
    for layers in (6, 12, 24):
        evaluate._jitted.cache_clear()
        program = Program(deep, *shapes(*drawn(layers)))
        assert len(program.pieces) >= layers
        counts.append(evaluate._jitted.cache_info().misses)
    assert counts[2] <= counts[0] + 2, f"pieces to compile of 6, 12 and 24 equal layers: {counts}"


def test_results_are_put_away_one_after_the_other_and_nothing_is_held_that_is_not_needed(tmp_path):
    params, x = drawn()
    program, before, most = Program(deep, *shapes(params, x)), live(), [0]
    put_away = in_files(tmp_path)

    def keep(x):
        most[0] = max(most[0], live() - before)
        return put_away(x)

    program(*kept(params, x), keep=keep)
    assert most[0] < 6 * D * D * 4, f"{most[0] / (D * D * 4):.1f} matrices of the {LAYERS} of the model, or of their gradients, are held"


def live():
    return sum(x.nbytes for x in jax.live_arrays())


MEASURE = """
import json, sys
import numpy as np, torch
from test_port_gpt2 import make_pair
from flaxgpt.config import GPTConfig
from flaxgpt.port.check import check
from flaxgpt.run.process import give_freed_memory_back

def memory(kind):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kind))

give_freed_memory_back()  # as check_port.py does
RUNGS = ("activations", "loss", "gradients", "clipping")
cfg = GPTConfig.preset("gpt2-124m").replace(drop_rate=0.0, context_length=64)
check(make_pair(cfg.replace(vocab_size=50, emb_dim=24, n_heads=2, n_layers=1), 1, 4, convert=True), RUNGS)  # everything is imported
pair = make_pair(cfg, 1, 4, convert=True)
before = memory("VmRSS:")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak is measured from here
verdict = check(pair, RUNGS)
copy = 4 * sum(parameter.numel() for parameter in pair.reference.model.parameters())
print(json.dumps({"passed": verdict.passed, "copies": (memory("VmHWM:") - before) / copy, "parameters": copy / 4}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak is read from Linux's /proc")
def test_a_model_of_100_million_parameters_is_checked_within_three_copies_of_it():
    folder = Path(__file__).parent
    paths = [str(folder), str(folder.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    run = subprocess.run([sys.executable, "-c", MEASURE], env=env, capture_output=True, text=True, timeout=3600)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["passed"]
    assert found["parameters"] > 100e6
    assert found["copies"] < 3, f"at its peak a check holds {found['copies']:.2f} float32 copies of the model beside the models themselves"
