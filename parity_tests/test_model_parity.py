"""The same weights give the same numbers on both sides, for any shape; what dropout and the initialisers are. See also test_ladder.py."""

import functools
import re

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import SMALL, assert_close, random_ids, random_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxgpt.config import GPTConfig, TrainConfig
from flaxgpt.convert.names import module_path
from flaxgpt.convert.params import from_torch
from flaxgpt.generation.generate import generate
from flaxgpt.interventions import tapping, visiting
from flaxgpt.layers import Dropout
from flaxgpt.loss import next_token_loss
from flaxgpt.model import GPT, forward, init_params
from flaxgpt.optim import make_optimizer
from flaxgpt.parity.compare import relative
from flaxgpt.sites import sites
from flaxgpt.state import abstract_state
from flaxgpt.step import make_train_step
from torch_ref.generation.generate import generate_text_simple
from torch_ref.loss import calc_loss_batch
from torch_ref.model import init_model

LOGITS_BOUND, LOSS_BOUND = 2e-6, 3e-6


@st.composite
def configs(draw: st.DrawFn) -> GPTConfig:
    n_heads, bias = draw(st.integers(1, 4)), draw(st.booleans())
    return GPTConfig(
        vocab_size=draw(st.integers(2, 80)),
        context_length=draw(st.integers(1, 20)),
        emb_dim=n_heads * draw(st.integers(1 if bias else 2, 12)),  # without shifts, what is one wide is 0 after a norm
        n_heads=n_heads,
        n_layers=draw(st.integers(1, 2)),
        drop_rate=0.0,
        qkv_bias=draw(st.booleans()) if bias else False,
        bias=bias,
        activation=draw(st.sampled_from(["gelu_tanh", "gelu"])),
        tie_embeddings=draw(st.booleans()),
    )


@functools.partial(jax.jit, static_argnums=1)  # eagerly, each of its operations would be compiled for each config
def logits_and_loss(params, cfg, tokens_BT, targets_BT):
    logits_BTV = forward(params, cfg, tokens_BT)
    return logits_BTV, next_token_loss(logits_BTV, targets_BT)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(cfg=configs(), data=st.data())
def test_logits_loss_and_greedy_text_are_equal_for_any_config(cfg, data):
    batch, length, seed = data.draw(st.integers(1, 3)), data.draw(st.integers(1, cfg.context_length)), data.draw(st.integers(0, 999))
    reference, params = random_pair(cfg, seed)
    tokens, targets = random_ids(cfg, (batch, length), seed), random_ids(cfg, (batch, length), seed + 1)
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens))
        expected_loss = calc_loss_batch(reference, torch.from_numpy(tokens), torch.from_numpy(targets))
    logits, loss = logits_and_loss(params, cfg, tokens, targets)
    assert logits.dtype == jnp.float32
    assert_close("logits, random configs", logits, expected, LOGITS_BOUND, where=str(logits.shape))
    # A loss is a difference of logits, so it is as exact as they are large.
    largest = max(1.0, float(np.abs(logits).max()))
    assert_close("loss, random configs", loss, expected_loss, LOSS_BOUND, scale=largest)

    new = cfg.context_length  # so that it goes past the context
    ours = generate(params, cfg, tokens, new)
    theirs = generate_text_simple(reference, torch.from_numpy(tokens), new, cfg.context_length)
    np.testing.assert_array_equal(ours, theirs, err_msg=f"greedy text differs for {cfg}")


def test_dropout_is_a_function_of_its_key_and_keeps_the_mean():
    cfg = SMALL.replace(drop_rate=0.3)
    _, params = random_pair(cfg)
    tokens = random_ids(cfg, (2, 16))

    def logits(seed):
        return conftest.forward(params, cfg, tokens, dropout_key=jax.random.key(seed))

    np.testing.assert_array_equal(logits(0), logits(0))
    assert relative(logits(0), logits(1)) > 0.1
    x = jnp.ones((400, 500))
    dropped = Dropout(0.3).apply({}, x, jnp.arange(400), rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(dropped).tolist()) == {0.0, float(np.float32(1) / np.float32(0.7))}
    assert abs(float(dropped.mean()) - 1) < 4 * (0.3 / 0.7 / x.size) ** 0.5


def test_dropout_differs_between_the_layers_and_between_the_shortcuts():
    cfg = SMALL.replace(drop_rate=0.5, n_layers=3)
    inputs = {"params": random_pair(cfg)[1]}, random_ids(cfg, (2, 16)), jnp.arange(2)
    _, drawn = jax.jit(functools.partial(GPT(cfg).apply, mutable=["dropout_masks"]))(*inputs, rngs={"dropout": jax.random.key(0)})
    blocks = drawn["dropout_masks"]["trf_blocks"]
    masks = [np.asarray(blocks[name]["keep"][layer]) for name in ("drop_shortcut1", "drop_shortcut2") for layer in range(3)]
    for i, one in enumerate(masks):
        assert one.mean() == pytest.approx(0.5, abs=0.1)
        for other in masks[:i]:
            assert (one != other).mean() == pytest.approx(0.5, abs=0.1), "two masks agree in more than chance would have it"


@pytest.mark.parametrize("init", ["gpt2", "torch"])
@pytest.mark.parametrize("tied", [False, True])
def test_initialisers_have_the_spread_of_the_reference(init, tied):
    """Standard deviations, and bounds where the distribution is uniform, of every tensor of both sides."""
    cfg = GPTConfig(vocab_size=997, context_length=128, emb_dim=128, n_heads=4, n_layers=4, qkv_bias=True, tie_embeddings=tied, init=init)
    params = jax.device_get(init_params(cfg, jax.random.key(0)))
    torch.manual_seed(0)
    reference = init_model(cfg)
    expected = from_torch({k: v.detach() for k, v in reference.state_dict().items()}, cfg)
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        assert ours.shape == theirs.shape, name
        error = 4 * (2 / ours.size) ** 0.5  # four standard errors of the ratio of two standard deviations
        assert np.std(ours) == pytest.approx(np.std(theirs), rel=error), f"spread of {name}"
        assert np.mean(ours) == pytest.approx(np.mean(theirs), abs=float(6 * np.std(theirs) * ours.size**-0.5) + 1e-9), f"mean of {name}"
        if init == "torch" and ("kernel" in name or "bias" in name):
            assert np.abs(ours).max() == pytest.approx(np.abs(theirs).max(), rel=0.1), f"largest value of {name}"


def test_too_long_an_input_is_refused_on_both_sides():
    reference, params = random_pair(SMALL)
    tokens = random_ids(SMALL, (1, 17))
    with pytest.raises(ValueError, match="17 tokens do not fit"):
        forward(params, SMALL, tokens)
    with pytest.raises(ValueError, match="17 tokens do not fit"):
        reference(torch.from_numpy(tokens))


def test_bfloat16_gives_float32_logits_near_those_of_float32():
    _, params = random_pair(SMALL)
    tokens = random_ids(SMALL, (2, 16))
    exact = conftest.forward(params, SMALL, tokens)
    rough = conftest.forward(params, SMALL.replace(dtype="bfloat16"), tokens)
    assert rough.dtype == jnp.float32
    assert 1e-4 < relative(rough, exact) < 2e-2  # one rounding is 4e-3


def test_compile_size_does_not_grow_with_depth():
    """The blocks are one scanned function, so the program is as long for 48 layers as for twelve. (Fewer are written out on a CPU.)"""

    def lines(n_layers):
        cfg = SMALL.replace(n_layers=n_layers)
        params = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
        lowered = jax.jit(lambda p, t: forward(p, cfg, t)).lower(params, jax.ShapeDtypeStruct((2, 16), jnp.int32))
        return len(lowered.as_text().splitlines())

    assert lines(48) == lines(12)


def train_step_program(cfg: GPTConfig) -> jax.stages.Lowered:
    run = TrainConfig(model=cfg, batch_size=2)
    tx = make_optimizer(run)
    batch = (jax.ShapeDtypeStruct((2, 16), jnp.int32),) * 2
    return jax.jit(make_train_step(cfg, tx)).lower(abstract_state(run, tx), batch)


@pytest.mark.parametrize("tied", [False, True])
def test_a_compiled_update_names_the_parts_of_the_model(tied):
    """As a profile shows them."""
    program = train_step_program(SMALL.replace(tie_embeddings=tied, n_layers=1)).compile().as_text()
    scopes = {scope for name in re.findall(r'op_name="([^"]*)"', program) for scope in re.split(r"[/()]", name)}
    expected = {"trf_blocks", "norm1", "att", "W_query", "norm2", "ff", "final_norm", "out_head", "loss", "optimizer"}
    assert expected <= scopes, f"{expected - scopes} are in no instruction's name"


def test_taps_change_no_program_but_the_one_that_is_traced_within():
    cfg, tokens = SMALL, random_ids(SMALL, (2, 16))
    params = random_pair(cfg)[1]
    before = train_step_program(cfg).as_text()
    points = {module_path(site.point) for site in sites(1)}

    def recorded(params):
        with visiting(tapping(points)):
            return GPT(cfg).apply({"params": params}, tokens, mutable=["taps"])

    logits, state = jax.jit(recorded)(params)
    np.testing.assert_array_equal(logits, jax.jit(lambda params: forward(params, cfg, tokens))(params))
    taps = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(state["taps"])}
    assert taps == points, "some site is recorded by no module"
    with pytest.raises(ZeroDivisionError), visiting(tapping(points)):
        raise ZeroDivisionError
    assert train_step_program(cfg).as_text() == before
