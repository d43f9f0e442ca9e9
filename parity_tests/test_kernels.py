"""Fused attention, the loss in chunks, a padded vocabulary and rematerialisation compute what the plain model does."""

import functools
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_jax
from conftest import ONE_LAYER, SMALL, assert_close, random_ids, random_pair, refused

from flaxgpt import kernels, model
from flaxgpt.cache import Cache
from flaxgpt.config import GPTConfig, TrainConfig
from flaxgpt.convert.huggingface import from_huggingface, to_huggingface
from flaxgpt.convert.params import fit_vocab, from_torch, to_torch
from flaxgpt.edits import scale
from flaxgpt.errors import InputError
from flaxgpt.generation.decode import next_logits, unstack
from flaxgpt.generation.generate import complete
from flaxgpt.kernels import Choice, choose_attention, choose_loss_chunk, choose_unroll, fused_attention, padded_logits
from flaxgpt.loss import head_loss, next_token_loss
from flaxgpt.model import forward, head_kernel, hidden, init_params
from flaxgpt.optim import make_optimizer
from flaxgpt.parity.bounds import BOUNDS
from flaxgpt.state import TrainState, state_from_torch, state_to_torch
from flaxgpt.step import make_eval_step, make_train_step

BFLOAT16 = GPTConfig(dtype="bfloat16", drop_rate=0.0)


@pytest.mark.parametrize(
    ("platform", "changes", "length", "dropout", "implementation", "reason"),
    [
        ("cpu", {}, 1024, False, "plain", "no kernel for cpu"),
        ("gpu", {}, 1024, False, "cudnn", "possible"),
        ("cuda", {}, 1024, False, "cudnn", "possible"),
        ("gpu", {"attention": "plain"}, 1024, False, "plain", "asked for"),
        ("gpu", {"attention": "fused"}, 1024, False, "cudnn", "asked for"),
        ("gpu", {"dtype": "float32"}, 1024, False, "plain", "bfloat16, not float32"),
        ("gpu", {"n_heads": 64}, 1024, False, "plain", "multiple of 8, not 12"),
        ("gpu", {"n_heads": 3}, 1024, False, "plain", "at most 128 .* not 256"),
        ("gpu", {}, 65, False, "plain", "even number of tokens, not 65"),
        ("gpu", {}, 1024, True, "plain", "drops out"),
        ("tpu", {}, 1024, False, "splash", "possible"),
        ("tpu", {"dtype": "float32"}, 1024, False, "splash", "possible"),
        ("tpu", {"dtype": "float64"}, 1024, False, "plain", "float32 at most"),
        ("tpu", {}, 192, False, "plain", "multiple of 128 tokens, not 192"),
        ("tpu", {}, 1024, True, "plain", "drops out"),
    ],
)
def test_fused_attention_is_chosen_where_there_is_a_kernel_for_it(platform, changes, length, dropout, implementation, reason):
    choice = choose_attention(BFLOAT16.replace(**changes), length, platform, dropout=dropout)
    assert choice.implementation == implementation
    assert re.search(reason, choice.reason)
    if implementation == "plain" and changes.get("attention") != "plain":
        with pytest.raises(InputError, match=reason):
            choose_attention(BFLOAT16.replace(**changes | {"attention": "fused"}), length, platform, dropout=dropout)


def test_a_fused_attention_that_is_impossible_is_refused_before_a_run_folder_is_made(call, tmp_path):
    refused(
        call(train_jax, "--attention", "fused", "--out-dir", tmp_path / "run"), "attention=fused is impossible: there is no kernel for cpu"
    )
    assert not (tmp_path / "run").exists()


def test_the_first_line_of_a_run_says_which_attention_it_has(small):
    assert "plain attention (there is no kernel for cpu)" in small.said.splitlines()[0]


# Sizes of heads, among them that of GPT-2 and one that is no power of two.
@pytest.mark.parametrize(("H", "T"), [(16, 128), (64, 256), (24, 384)])
def test_splash_attention_equals_plain_attention(H, T):
    rng = np.random.default_rng(0)
    qkv = tuple(jnp.asarray(rng.standard_normal((2, 3, T, H), np.float32)) for _ in range(3))
    weights = jnp.asarray(rng.standard_normal((2, 3, T, H), np.float32))

    def plain(q, k, v):
        scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), jnp.einsum("BNTH,BNSH->BNTS", q, k) / H**0.5, -jnp.inf)
        return jnp.einsum("BNTS,BNSH->BNTH", jax.nn.softmax(scores), v)

    def run(attend):
        context, pull = jax.vjp(attend, *qkv)
        return context, *pull(weights)

    fused, expected = run(functools.partial(fused_attention, implementation="splash", interpret=True)), run(plain)
    for name, a, b in zip(("context", "dq", "dk", "dv"), fused, expected, strict=True):
        bound = BOUNDS["activations" if name == "context" else "gradients"].float32
        assert_close(f"splash attention, {'forward' if name == 'context' else 'backward'}", a, b, bound, where=f"{name} H={H} T={T}")


@pytest.fixture
def splash(monkeypatch):
    """The model with splash attention wherever it may be used, in the interpreter."""
    monkeypatch.setattr(model, "choose_attention", lambda *_: Choice("splash", ""))
    calls = []

    def attend(*qkv_and_choice):
        calls.append(1)
        return fused_attention(*qkv_and_choice, interpret=True)

    monkeypatch.setattr(model, "fused_attention", attend)
    return calls


def test_a_model_with_splash_attention_has_the_loss_and_gradients_of_the_plain_one(splash):
    cfg = ONE_LAYER.replace(context_length=128, qkv_bias=True)
    _, params = random_pair(cfg)
    batch = batch_of(cfg)
    loss, grads = loss_and_gradients(params, cfg, batch)
    assert splash, "the model did not use the kernel"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "choose_attention", lambda *_: Choice("plain", ""))
        plain_loss, plain_grads = loss_and_gradients(params, cfg, batch)
    assert_close("splash attention, loss of a model", loss, plain_loss, BOUNDS["loss"].float32)
    query = np.linalg.norm(plain_grads["trf_blocks"]["att"]["W_query"]["bias"])  # the gradient of the key's bias is rounding
    for (path, grad), plain in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(plain_grads), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        scale = query if name == "trf_blocks/att/W_key/bias" else None
        assert_close("splash attention, gradients of a model", grad, plain, BOUNDS["gradients"].float32, scale=scale, where=name)


def test_weights_that_are_dropped_out_or_looked_at_and_a_cache_have_the_plain_attention(splash):
    cfg, tokens_BT = SMALL.replace(context_length=128, n_layers=1, drop_rate=0.1), jnp.zeros((2, 128), int)
    perturbations = {"trf_blocks": {"att": {"dropout": {"input": jnp.zeros((1, 2, 4, 128, 128))}}}}
    masks = {"trf_blocks": {"att": {"dropout": {"keep": jnp.ones((1, 2, 4, 128, 128), bool)}}}}
    key = jax.random.key(0)

    def trace(function, *args, **options):
        jax.eval_shape(lambda: function(*args, **options))
        used, splash[:] = bool(splash), []
        return used

    params = jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(lambda: init_params(cfg, key)))
    gpt, cache = model.GPT(cfg), Cache.empty(cfg, jnp.zeros(2, int), 128)
    assert trace(forward, params, cfg, tokens_BT)
    assert not trace(forward, params, cfg, tokens_BT, dropout_key=key)
    assert not trace(gpt.apply, {"params": params, "dropout_masks": masks}, tokens_BT, jnp.arange(2), rngs={"dropout": key})
    assert not trace(gpt.apply, {"params": params}, tokens_BT, mutable=["taps"])
    assert not trace(gpt.apply, {"params": params, "perturbations": perturbations}, tokens_BT)
    assert not trace(next_logits, unstack(params, cfg), cfg, tokens_BT, cache)


@pytest.mark.parametrize(
    ("layers", "platform", "unroll"), [(4, "cpu", 4), (8, "cpu", 8), (9, "cpu", 1), (12, "cpu", 1), (4, "gpu", 1), (4, "tpu", 1)]
)
def test_the_layers_of_a_small_model_are_written_out_on_a_cpu(layers, platform, unroll):
    assert choose_unroll(SMALL.replace(n_layers=layers), platform) == unroll


def test_layers_compute_the_same_written_out_and_scanned_with_dropout_and_edits(monkeypatch):
    cfg, key = SMALL.replace(dtype="float64", drop_rate=0.1, n_layers=3), jax.random.key(1)
    edits = {"trf_blocks.1.att.out": scale(0.5), "trf_blocks.{}.ff.out": scale(0.9)}
    with jax.enable_x64(True):
        params, (inputs_BT, targets_BT) = jax.tree.map(lambda x: np.asarray(x, np.float64), random_pair(cfg)[1]), batch_of(cfg)

        def loss_and_all_gradients():
            def loss(params):
                x_BTD = hidden(params, cfg, inputs_BT, dropout_key=key, edits=edits)
                return head_loss(x_BTD, head_kernel(params, cfg), targets_BT, cfg)

            return jax.jit(jax.value_and_grad(loss))(params)

        written_out = loss_and_all_gradients()
        monkeypatch.setattr(kernels, "WRITTEN_OUT", 0)
        scanned = loss_and_all_gradients()
    for (path, a), b in zip(jax.tree.leaves_with_path(written_out), jax.tree.leaves(scanned), strict=True):
        assert_close("written out and scanned, float64", a, b, 1e-14, where=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("loss_chunk", "rows", "length", "chunk"),
    [
        (None, 16, 1024, 128),
        (None, 1, 1024, 1024),
        (None, 12, 1024, 147),  # seven chunks
        (None, 9999, 1024, 1),
        (0, 16, 1024, 1024),
        (2000, 16, 1024, 1024),
        (100, 16, 1024, 94),  # eleven
    ],
)
def test_the_loss_takes_at_most_so_many_positions_at_a_time(loss_chunk, rows, length, chunk):
    assert choose_loss_chunk(SMALL.replace(loss_chunk=loss_chunk), rows, length) == chunk


@pytest.mark.parametrize("chunk", [0, 1, 5, 8, 15])  # of 16 positions: 0 is all of them, some leave a rest
@pytest.mark.parametrize("multiple", [1, 64])
def test_the_loss_in_chunks_equals_that_of_all_logits_and_so_do_its_gradients(chunk, multiple):
    cfg, rng = SMALL.replace(vocab_multiple=multiple), np.random.default_rng(0)
    x_BTD, kernel_DV = rng.standard_normal((3, 16, 32)), rng.standard_normal((32, cfg.padded_vocab))
    targets_BT = rng.integers(0, 97, (3, 16))
    with jax.enable_x64(True):
        chunked = functools.partial(head_loss, cfg=cfg.replace(loss_chunk=chunk))

        def whole(x_BTD, kernel_DV, targets_BT):
            return next_token_loss(padded_logits(x_BTD, kernel_DV, cfg.vocab_size), targets_BT)

        (loss, grads), (loss_in_chunks, grads_in_chunks) = (
            jax.value_and_grad(f, (0, 1))(x_BTD, kernel_DV, targets_BT) for f in (whole, chunked)
        )
        evaluated = chunked(x_BTD, kernel_DV, targets_BT)
        assert_close("loss in chunks, float64", [loss_in_chunks, evaluated], [loss, loss], 3e-15, where=f"chunks of {chunk}")
        for name, a, b in zip(("x", "kernel"), grads_in_chunks, grads, strict=True):
            assert_close("gradients in chunks, float64", a, b, 5e-15, where=f"{name}, chunks of {chunk}")


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_has_the_same_loss_and_gradients_in_chunks(tied):
    cfg = SMALL.replace(tie_embeddings=tied, dtype="float64", loss_chunk=0, n_layers=1)
    with jax.enable_x64(True):
        params, batch = jax.tree.map(lambda x: np.asarray(x, np.float64), random_pair(cfg)[1]), batch_of(cfg)
        loss, grads = loss_and_gradients(params, cfg, batch)
        cfg = cfg.replace(loss_chunk=5)
        chunked_loss, chunked_grads = loss_and_gradients(params, cfg, batch)
        assert_close("loss in chunks, float64", [chunked_loss, jax.jit(make_eval_step(cfg))(params, batch)], [loss, loss], 3e-15)
        for (path, a), b in zip(jax.tree.leaves_with_path(chunked_grads), jax.tree.leaves(grads), strict=True):
            assert_close("gradients in chunks, float64", a, b, 5e-15, where=jax.tree_util.keystr(path))


def test_the_loss_in_chunks_never_holds_all_logits():
    def arrays(cfg, differentiate):
        x_BTD, kernel_DV, targets_BT = jnp.zeros((4, 16, 32)), jnp.zeros((32, 97)), jnp.zeros((4, 16), int)
        compute = functools.partial(head_loss, cfg=cfg)
        program = jax.jit(jax.grad(compute, (0, 1)) if differentiate else compute).lower(x_BTD, kernel_DV, targets_BT).compile().as_text()
        return {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", program)}

    for differentiate in (False, True):
        of_whole, of_chunks = (arrays(SMALL.replace(loss_chunk=chunk), differentiate) for chunk in (0, 4))
        largest = max(np.prod(shape) for shape in of_chunks if 97 in shape)
        assert any(97 in shape and np.prod(shape) == 4 * 16 * 97 for shape in of_whole), "the shapes are not found where they must be"
        assert largest <= max(32 * 97, 4 * 4 * 97), f"{of_chunks}: more logits than of a chunk"


def test_evaluating_in_chunks_computes_no_gradient():
    args = jnp.zeros((2, 16, 32)), jnp.zeros((32, 97)), jnp.zeros((2, 16), int)
    loss = functools.partial(head_loss, cfg=SMALL.replace(loss_chunk=4))
    products = [str(jax.make_jaxpr(f)(*args)).count("dot_general") for f in (loss, jax.grad(loss, (0, 1)))]
    assert products == [1, 3]


def test_rematerialisation_changes_nothing():
    cfg = ONE_LAYER.replace(drop_rate=0.1)
    params, batch = random_pair(cfg)[1], batch_of(cfg)
    off, dots, block = (
        loss_and_gradients(params, cfg.replace(remat=remat), batch, jax.random.key(1)) for remat in ("none", "dots", "block")
    )
    for remat, on in (("dots", dots), ("block", block)):
        for a, b in zip(jax.tree.leaves(on), jax.tree.leaves(off), strict=True):
            assert_close("remat on and off", a, b, BOUNDS["loss"].float32, where=remat)


def test_the_policies_of_rematerialisation_compute_different_amounts_again():
    cfg = SMALL.replace(drop_rate=0.0)
    params, batch = random_pair(cfg)[1], batch_of(cfg)

    def dots(remat):
        return str(jax.make_jaxpr(lambda params: loss_and_gradients(params, cfg.replace(remat=remat), batch))(params)).count("dot_general")

    assert dots("none") < dots("dots") < dots("block")


def test_a_config_of_an_older_version_has_a_boolean_for_remat():
    older = {**TrainConfig().to_dict(), "model": {**GPTConfig().to_dict(), "remat": True}}
    assert TrainConfig.from_dict(older).model.remat == "block"
    assert GPTConfig.from_dict({"remat": False}).remat == "none"


@pytest.mark.parametrize(("tied", "chunk"), [(False, 0), (True, 5)])
def test_a_padded_vocabulary_changes_nothing(tied, chunk):
    cfg = SMALL.replace(tie_embeddings=tied, dtype="float64", loss_chunk=chunk, n_layers=1)
    padded = cfg.replace(vocab_multiple=64)
    assert padded.padded_vocab == 128
    with jax.enable_x64(True):
        params, more = (initial(c) for c in (cfg, padded))
        jax.tree.map(np.testing.assert_array_equal, fit_vocab(more, 97), params)
        jax.tree.map(np.testing.assert_array_equal, fit_vocab(params, 128), more)
        params, more = (jax.tree.map(lambda x: np.asarray(x, np.float64), tree) for tree in (params, more))
        batch = batch_of(cfg)
        logits = [jax.jit(functools.partial(forward, cfg=c))(p, tokens_BT=batch[0]) for p, c in ((more, padded), (params, cfg))]
        assert_close("padded vocabulary: logits", *logits, 1e-14)
        after = {}
        for config, start in ((cfg, params), (padded, more)):
            run = TrainConfig(model=config, batch_size=2, warmup_steps=0, decay="all")
            tx = make_optimizer(run)
            state, step = start_state(tx, start), jax.jit(make_train_step(config, tx))
            losses = []
            for i in range(3):
                state, metrics = step(state, batch_of(cfg, seed=i))
                losses += [metrics["loss"], metrics["grad_norm"]]
            after[config] = losses, state
        (losses, state), (padded_losses, padded_state) = after.values()
        assert_close("padded vocabulary: loss and norm", padded_losses, losses, 1e-14)
        for part in ("params", "opt_state"):
            for a, b in zip(jax.tree.leaves(getattr(padded_state, part)), jax.tree.leaves(getattr(state, part)), strict=True):
                for axis, (long, short) in enumerate(zip(a.shape, b.shape, strict=True)):
                    if long != short:
                        assert not np.any(jax.lax.slice_in_dim(a, short, long, axis=axis)), "padding has moved"
                        a = jax.lax.slice_in_dim(a, 0, short, axis=axis)
                assert_close(f"padded vocabulary: {part}", a, b, 2e-14)
        ids = [complete(p, c, batch[0][:, :5], 20, top_log_probs=97) for p, c in ((state.params, cfg), (padded_state.params, padded))]
        np.testing.assert_array_equal(ids[0].ids_BT, ids[1].ids_BT)
        assert ids[1].top_ids_BTK.max() == 96


@pytest.mark.parametrize("tied", [False, True])
def test_padding_of_the_vocabulary_converts_away_and_back(tied):
    cfg = TrainConfig(model=ONE_LAYER.replace(tie_embeddings=tied, vocab_multiple=64, qkv_bias=True))
    params = random_pair(cfg.model)[1]
    unpadded = {row: tensor.shape for row, tensor in to_torch(fit_vocab(params, 97), cfg.model.replace(vocab_multiple=1)).items()}
    state_dict = to_torch(params, cfg.model)
    assert {name: tensor.shape for name, tensor in state_dict.items()} == unpadded
    jax.tree.map(np.testing.assert_array_equal, from_torch(state_dict, cfg.model), params)
    jax.tree.map(np.testing.assert_array_equal, from_huggingface(to_huggingface(params, cfg.model), cfg.model), params)
    tx = make_optimizer(cfg)
    state, _ = jax.jit(make_train_step(cfg.model, tx))(start_state(tx, params), batch_of(cfg.model))
    back = state_from_torch(*state_to_torch(state, cfg), cfg)
    jax.tree.map(np.testing.assert_array_equal, (back.params, back.opt_state), (state.params, state.opt_state))


# The loss of a batch of eight rows and its gradients, split over eight devices in the way of a training step, and what the program sends.
ON_EIGHT = r"""
import functools, json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from flaxgpt.config import GPTConfig
from flaxgpt.kernels import fused_attention
from flaxgpt.loss import head_loss

kind, meshes = sys.argv[1], sys.argv[2:]
rng, rows = np.random.default_rng(0), ("data", "fsdp")
if kind == "loss":
    cfg = GPTConfig(vocab_size=97, vocab_multiple=8, loss_chunk=5)
    x, kernel, targets = rng.standard_normal((8, 16, 32)), rng.standard_normal((32, 104)), rng.integers(0, 97, (8, 16))
    f, args = functools.partial(head_loss, cfg=cfg), (x, kernel, targets)
    arg_specs, axes = (P(rows), P("fsdp", "tensor"), P(rows)), (0, None, 0)
    whole = functools.partial(head_loss, cfg=cfg.replace(loss_chunk=0))
else:
    f = lambda *qkv: jnp.sin(fused_attention(*qkv, "splash", interpret=True)).mean()
    args = tuple(rng.standard_normal((8, 4, 128, 16)).astype(np.float32) for _ in range(3))
    arg_specs, axes, whole = (P(rows, "tensor"),) * 3, (0, 0, 0), f
argnums = tuple(i for i, a in enumerate(args) if a.dtype.kind == "f")

def step(shape, *args):
    args = [a if axis is None else a.reshape(shape[0], -1, *a.shape[1:]) for a, axis in zip(args, axes)]
    loss, grads = jax.vmap(jax.value_and_grad(f, argnums), axes, spmd_axis_name="data")(*args)
    grads = [g.mean(0) if axes[i] is None else g.reshape(-1, *g.shape[2:]) / shape[0] for i, g in zip(argnums, grads)]
    return loss.mean(), grads

def difference(a, b):
    return max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

with jax.enable_x64(kind == "loss"):
    one = jax.jit(jax.value_and_grad(whole, argnums))(*args)
    for name in meshes:
        shape = tuple(map(int, name.split("x")))
        mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
        with jax.set_mesh(mesh):
            shardings = [NamedSharding(mesh, spec) for spec in arg_specs]
            placed = list(map(jax.device_put, args, shardings))
            split_step = jax.jit(functools.partial(step, shape), out_shardings=(None, [shardings[i] for i in argnums]))
            compiled = split_step.lower(*placed).compile()
            split = compiled(*placed)
        print(json.dumps(dict(devices=jax.device_count(), difference=difference(split, one), program=compiled.as_text())))
"""
MESHES = {"loss": ["8x1x1", "1x8x1", "2x2x2", "1x2x4"], "splash": ["1x8x1", "2x2x2"]}


@functools.cache
def on_eight(kind):
    """What was found for each of its meshes, in one process."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", ON_EIGHT, kind, *MESHES[kind]], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = dict(zip(MESHES[kind], map(json.loads, done.stdout.splitlines()), strict=True))
    assert all(result["devices"] == 8 for result in results.values())
    return results


def sent_in_loops(program):
    """Elements in the result of each collective of a compiled program that stands inside a loop."""
    computations = {text.split(" ")[0].lstrip("%"): text for text in re.split(r"\n(?=%|ENTRY)", program)}
    inside, new = set(), set(re.findall(r"body=%?([\w.-]+)", program))
    while new:
        inside |= new
        called = {name for c in new for name in re.findall(r"(?:to_apply|calls|body|condition)=%?([\w.-]+)", computations[c])}
        new = called - inside
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    results = [m for name in inside for m in re.findall(rf" = (.*) (?:{kinds})(?:-start)?\(", computations[name])]
    return [math.prod(map(int, filter(None, dims.split(",")))) for result in results for dims in re.findall(r"\w\[([\d,]*)\]", result)]


@pytest.mark.parametrize("mesh", MESHES["loss"])
def test_the_loss_in_chunks_on_eight_devices_equals_that_on_one(mesh):
    result = on_eight("loss")[mesh]
    assert result["difference"] < BOUNDS["gradients"].float64
    data, fsdp, tensor = map(int, mesh.split("x"))
    tokens = 8 // data // fsdp * 5
    most = tokens * 32 if tensor > 1 else tokens  # what a part of the vocabulary adds to the gradient of x has to be sent
    assert max(sent_in_loops(result["program"]), default=0) <= most, "in each chunk, more is sent than has to be"


@pytest.mark.parametrize("mesh", MESHES["splash"])
def test_splash_attention_on_eight_devices_equals_that_on_one(mesh):
    result = on_eight("splash")[mesh]
    assert result["difference"] < BOUNDS["activations"].float32
    assert not sent_in_loops(result["program"])


def initial(cfg):
    """As training draws them, which takes as long to compile as an update: where any will do, `random_pair` has some."""
    return jax.device_get(jax.jit(functools.partial(init_params, cfg))(jax.random.key(0)))


def batch_of(cfg, rows=2, seed=0):
    ids = random_ids(cfg, (rows, cfg.context_length + 1), seed)
    return ids[:, :-1], ids[:, 1:]


def loss_and_gradients(params, cfg, batch, dropout_key=None):
    def loss(params):
        return head_loss(hidden(params, cfg, batch[0], dropout_key=dropout_key), head_kernel(params, cfg), batch[1], cfg)

    return jax.jit(jax.value_and_grad(loss))(params)


def start_state(tx, params):
    return jax.jit(lambda params: TrainState(jnp.int32(0), params, tx.init(params), jax.random.key(0)))(params)
