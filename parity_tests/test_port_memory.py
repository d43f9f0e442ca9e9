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
import optax
import pytest
import torch

from flaxgpt.port import evaluate
from flaxgpt.port.evaluate import Program
from flaxgpt.port.kept import in_files, in_memory
from flaxgpt.port.recorder import AdamW, probe
from torch_ref.port import torch_recorder
from torch_ref.port.torch_recorder import TorchRecorder

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


def test_an_update_is_made_a_parameter_at_a_time(tmp_path):
    params, _ = drawn()
    gradients = [0.1 * x for x in params]
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

    def update(params, state, gradients):
        changes, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, changes), state

    wanted = update(params, tx.init(params), gradients)
    given = jax.tree.map(np.asarray, (params, tx.init(params), gradients))
    put_away, before, most = in_files(tmp_path), live(), [0]

    def keep(x):
        most[0] = max(most[0], live() - before)
        return put_away(x)

    found = Program(update, *shapes(*given), apart=True)(*kept(*given), keep=keep)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one(), other, rtol=1e-5, atol=1e-7)
    assert most[0] < 6 * D * D * 4, f"{most[0] / (D * D * 4):.1f} matrices of {LAYERS} parameters, gradients and both moments are held"


def test_a_file_goes_with_the_last_who_can_ask_for_it(tmp_path):
    keep = in_files(tmp_path)
    one, other = keep(np.arange(3)), keep(np.ones(2**20))
    assert (one() == np.arange(3)).all()
    assert isinstance(other(), np.memmap)
    read = other()
    del one, other
    assert not [*tmp_path.iterdir()]
    assert read.sum() == 2**20


class Tied(torch.nn.Module):
    """One matrix in three places, and a parameter that is not used."""

    def __init__(self):
        super().__init__()
        self.embed, self.middle, self.head = torch.nn.Embedding(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8, bias=False)
        self.head.weight = self.middle.weight = self.embed.weight
        self.unused = torch.nn.Parameter(torch.ones(8))

    def forward(self, tokens):
        return self.head(torch.tanh(self.middle(self.embed(tokens))))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("large", [1, 2**20])
def test_what_lies_in_files_and_what_is_tied_is_trained_as_torch_does(monkeypatch, large, dtype):
    monkeypatch.setattr(torch_recorder, "LARGE", large)
    torch.manual_seed(0)
    model, tokens = Tied(), np.arange(6)[None]
    losses, found = TorchRecorder(model).train(tokens, AdamW(), 3, dtype)
    recorded = TorchRecorder(model).record(tokens, dtype).parameter_gradients

    model = model.to(getattr(torch, dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=AdamW.learning_rate, weight_decay=AdamW.weight_decay)
    for step in range(3):
        optimizer.zero_grad()
        output = model(torch.tensor(tokens))
        loss = (output * torch.tensor(probe(tuple(output.shape)), dtype=output.dtype)).sum() / output.numel() ** 0.5
        loss.backward()
        assert losses[step] == loss.item(), f"update {step}"
        if step == 0:
            assert (recorded["embed.weight"] == model.embed.weight.grad.numpy()).all(), "the gradients of the three places, added up"
            assert not recorded["unused"].any()
        torch.nn.utils.clip_grad_norm_(model.parameters(), AdamW.clip_norm)
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert (found[name] == parameter.detach().numpy()).all(), name


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

MODELS = {
    "GPT-2 124M": ({}, ("activations", "loss", "gradients", "clipping")),
    "mostly a tied embedding": ({"emb_dim": 1280, "n_heads": 20, "n_layers": 2}, ("gradients", "training")),
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
        assert run.returncode == 0
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
