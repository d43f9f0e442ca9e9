"""A check runs in pieces that equal layers share, and holds few arrays at a time."""

import json
import os
import subprocess
import sys
import time
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

give_freed_memory_back()  # as check_port.py does
sizes, rungs = json.loads(sys.argv[1])
cfg = GPTConfig.preset("gpt2-124m").replace(drop_rate=0.0, context_length=64, **sizes)
check(make_pair(cfg.replace(vocab_size=50, emb_dim=24, n_heads=2, n_layers=1), 1, 4, convert=True), rungs)  # everything is imported
pair = make_pair(cfg, 1, 4, convert=True)
print("from here", flush=True)
sys.stdin.readline()
verdict = check(pair, rungs, updates=2)
shapes = [tuple(parameter.shape) for parameter in pair.reference.model.parameters()]
print(json.dumps({"passed": verdict.passed, "sizes": [int(np.prod(shape)) for shape in shapes]}))
"""

PASS = ("activations", "loss", "gradients", "clipping")
MODELS = {
    "GPT-2 124M": ({}, PASS),
    "mostly a tied embedding": ({"emb_dim": 1280, "n_heads": 20, "n_layers": 2}, (*PASS, "adamw", "training")),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="what a process holds is read from Linux's /proc")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_100_million_parameters_is_checked_within_three_copies_of_it(name):
    folder = Path(__file__).parent
    paths = [str(folder), str(folder.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", MEASURE, json.dumps(MODELS[name])]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "from here\n"
        before = most = held(run.pid)
        run.stdin.write("\n")
        run.stdin.close()
        while run.poll() is None:
            most = max(most, held(run.pid))
            time.sleep(0.002)
        found = json.loads(run.stdout.read())
    copy = 4 * sum(found["sizes"])
    assert found["passed"]
    assert copy > 400e6
    assert (most - before) / copy < 3, (
        f"at its peak a check holds {(most - before) / copy:.2f} float32 copies of the model beside the models"
    )


def held(pid):
    """Bytes that nothing but swapping can take from a process. Pages of mapped files aren't among them, unless the files are in memory."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
