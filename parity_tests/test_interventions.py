"""Edits of activations: the same on both sides, as an argument and by hooks; and nothing is left of them."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import SMALL, assert_close, assert_equal_bits, random_ids, random_pair

from flaxgpt.edits import add, apply, replace, scale
from flaxgpt.errors import InputError
from flaxgpt.generation import decode as compiled
from flaxgpt.generation.generate import complete, generate
from flaxgpt.interpret.activations import activations
from flaxgpt.interpret.patching import patch_each
from flaxgpt.model import GPT, forward, hidden, init_params
from flaxgpt.sites import sites, sites_meant
from torch_ref.generation.generate import generate as torch_generate
from torch_ref.interpret.patching import patch_each as torch_patch_each
from torch_ref.interventions import edited, tapped

TWO = SMALL.replace(qkv_bias=True)
CFG = TWO.replace(n_layers=3)  # where the one in the middle is what matters: each takes as long to compile as the first
BLOCK = [name.split(".", 2)[2] for name in (site.name for site in sites(1)) if name.startswith("trf_blocks.")]
NAMES = ["embedding", "final_norm.out", "logits", *(f"trf_blocks.1.{name}" for name in BLOCK)]


def hooks_of(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


def both(model, params, tokens_BT, edits, cfg=CFG):
    """Logits of flaxgpt and of the reference."""
    with torch.no_grad(), edited(model, edits):
        theirs = model(torch.from_numpy(tokens_BT)).numpy()
    return np.asarray(forward(params, cfg, tokens_BT, edits=edits)), theirs


@pytest.fixture(scope="module")
def plain():
    return np.asarray(forward(random_pair(TWO)[1], TWO, random_ids(TWO, (2, 16))))


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_of_any_site_gives_the_same_logits_on_both_sides(plain, name):
    model, params = random_pair(TWO)
    tokens_BT = random_ids(TWO, (2, 16))
    heads = 2 if set(sites_meant(name, 2)[0].axes) & set("NE") else None
    ours, theirs = both(model, params, tokens_BT, {name: scale(0.25, positions=(5, -3), heads=heads)}, TWO)
    assert_close("edits", ours, theirs, 2e-6, where=name)
    assert not np.array_equal(ours[:, 5], plain[:, 5]), "the edit changed nothing"
    assert_equal_bits(ours[:, :5], plain[:, :5])  # causal: what comes before position 5 can't know of it


@pytest.mark.parametrize("change", [replace(0.5), add(np.linspace(-1, 1, 32)), scale(-2), apply(lambda x: x * x), lambda x: 3 - x])
def test_every_kind_of_edit_gives_the_same_logits_on_both_sides(change):
    model, params = random_pair(TWO)
    ours, theirs = both(model, params, random_ids(TWO, (2, 16)), {"trf_blocks.1.ff.out": change}, TWO)
    assert_close("edits", ours, theirs, 2e-6, where=str(change))


def test_a_function_for_every_block_learns_which_one_it_edits():
    model, params = random_pair(CFG)
    tokens_BT = random_ids(CFG, (1, 16))
    ours, theirs = both(model, params, tokens_BT, {"trf_blocks.{}.att.out": lambda x, layer: x * (layer + 1)})
    assert_close("edits", ours, theirs, 2e-6)
    one_by_one = {f"trf_blocks.{i}.att.out": scale(i + 1) for i in range(3)}
    assert_close("edits", ours, forward(params, CFG, tokens_BT, edits=one_by_one), 2e-6)


def test_a_head_taken_away_by_its_weights_or_by_its_context_is_the_same():
    _, params = random_pair(TWO)
    tokens_BT = random_ids(TWO, (2, 16))
    by_weights, by_context = (
        forward(params, TWO, tokens_BT, edits={f"trf_blocks.1.att.{name}": scale(0, heads=3)}) for name in ("weights", "context")
    )
    assert_close("edits", by_weights, by_context, 2e-6)
    H = TWO.emb_dim // TWO.n_heads
    by_hand = forward(params, TWO, tokens_BT, edits={"trf_blocks.1.att.context": lambda x: x.at[..., 3 * H :].set(0)})
    assert_equal_bits(by_context, by_hand)


def test_a_raised_logit_becomes_the_prediction_and_leaves_no_trace():
    model, params = random_pair(TWO)
    tokens_BT, token = random_ids(TWO, (1, 9)), 41
    step = jax.jit(lambda params, edits=None: forward(params, TWO, tokens_BT, edits=edits))
    before = step(params)
    assert before[0, -1].argmax() != token

    def raised(logits_BTV):
        return logits_BTV.at[..., token].set(logits_BTV.max(-1) + 10)

    within = step(params, {"logits": apply(raised, positions=-1)})  # also as an argument
    assert within[0, -1].argmax() == token
    assert within[0, -1, token] == before[0, -1].max() + 10
    assert_equal_bits(within[:, :-1], before[:, :-1])
    assert_equal_bits(step(params), before)

    def raised_in_place(logits_BTV):
        logits_BTV = logits_BTV.clone()
        logits_BTV[..., token] = logits_BTV.amax(-1) + 10
        return logits_BTV

    with torch.no_grad():
        inputs = torch.from_numpy(tokens_BT)
        before = model(inputs)
        with edited(model, {"logits": apply(raised_in_place, positions=-1)}):
            assert model(inputs)[0, -1].argmax() == token
        assert torch.equal(model(inputs), before)


def test_after_an_exception_within_neither_side_knows_of_the_edit():
    model, params = random_pair(CFG)
    tokens_BT = random_ids(CFG, (2, 16))
    inputs, ours, theirs = torch.from_numpy(tokens_BT), forward(params, CFG, tokens_BT), model(torch.from_numpy(tokens_BT))

    def failing(x):
        raise ZeroDivisionError

    edits = {"trf_blocks.0.att.out": scale(2), "trf_blocks.1.ff.out": failing}
    with pytest.raises(ZeroDivisionError):
        forward(params, CFG, tokens_BT, edits=edits)
    assert_equal_bits(forward(params, CFG, tokens_BT), ours)
    with pytest.raises(ZeroDivisionError), edited(model, edits):
        model(inputs)
    with pytest.raises(InputError, match="no site nowhere"), edited(model, {"embedding": scale(2), "nowhere": scale(2)}):
        pass
    with pytest.raises(AttributeError), tapped(model, ["drop_emb.output", "nowhere.output"]):
        pass
    assert hooks_of(model) == []
    assert torch.equal(model(inputs), theirs)


def test_without_edits_the_program_is_the_one_that_knows_nothing_of_them():
    params = jax.eval_shape(lambda: init_params(CFG, jax.random.key(0)))
    tokens_BT = jax.ShapeDtypeStruct((2, 16), jnp.int32)

    def program(edits=None, bare=False):
        def run(params, tokens_BT):
            return GPT(CFG).apply({"params": params}, tokens_BT) if bare else forward(params, CFG, tokens_BT, edits=edits)

        return jax.jit(run).lower(params, tokens_BT).as_text()

    assert program() == program(edits={}) == program(bare=True)
    assert program(edits={"logits": scale(2)}) != program(), "this test could not fail"


def test_edits_are_differentiated_and_vmapped_like_everything_else():
    model, params = random_pair(TWO)
    tokens_BT = random_ids(TWO, (2, 16))
    steer_D = np.random.default_rng(0).normal(size=32).astype(np.float32)

    def loss(steer_D):
        edits = {"trf_blocks.1.shortcut1": add(steer_D, positions=(2, 7))}
        return jnp.square(forward(params, TWO.replace(remat="block"), tokens_BT, edits=edits)).mean()

    ours = jax.jit(jax.grad(loss))(steer_D)
    steer = torch.tensor(steer_D, requires_grad=True)
    with edited(model, {"trf_blocks.1.shortcut1": apply(lambda x: x + steer, positions=(2, 7))}):
        model(torch.from_numpy(tokens_BT)).square().mean().backward()
    assert_close("gradient of an edit", ours, steer.grad.numpy(), 2e-5)
    batch = jax.vmap(loss)(np.stack([steer_D, 2 * steer_D]))
    assert_close("edits", batch, [loss(steer_D), loss(2 * steer_D)], 2e-6)


def test_recorded_activations_are_those_after_the_edits():
    model, params = random_pair(CFG)
    tokens_BT = random_ids(CFG, (2, 16))
    names = ["embedding", "trf_blocks.{}.shortcut2", "trf_blocks.2.att.weights", "logits"]
    edits = {"trf_blocks.1.shortcut2": replace(1.0, positions=3)}
    logits_BTV, ours = activations(params, CFG, tokens_BT, names, edits=edits)
    points = ["drop_emb.output", *(f"trf_blocks.{i}.output" for i in range(3)), "trf_blocks.2.att.dropout.input", "output"]
    with torch.no_grad(), edited(model, edits), tapped(model, points) as taps:
        model(torch.from_numpy(tokens_BT))
    embedding, *blocks, weights, logits = (taps[point].numpy() for point in points)
    for name, theirs in zip(names, (embedding, np.stack(blocks), weights, logits), strict=True):
        assert_close("recorded activations", ours[name], theirs, 2e-6, where=name)
    assert_equal_bits(ours["logits"], logits_BTV)
    assert (ours["trf_blocks.{}.shortcut2"][1, :, 3] == 1).all()


def test_patching_every_layer_and_position_is_one_call_and_equals_hooks_one_at_a_time():
    model, params = random_pair(CFG)
    clean_T, other_T = random_ids(CFG, (2, 8))

    def metric(logits_V):
        return logits_V[3] - logits_V[5]

    _, taken = activations(params, CFG, other_T[None], ["trf_blocks.{}.shortcut2"])
    other_LTD = taken["trf_blocks.{}.shortcut2"][:, 0]
    before = patch_each._cache_size()
    ours = patch_each(params, CFG, clean_T, other_LTD, metric, rows=5)
    assert patch_each._cache_size() == before + 1
    theirs = torch_patch_each(model, torch.from_numpy(clean_T), torch.from_numpy(np.array(other_LTD)), metric)
    assert_close("activation patching", ours, theirs.numpy(), 2e-6)
    whole = forward(params, CFG, other_T[None])[0, -1]
    assert_close("activation patching", ours[-1, -1], metric(whole), 2e-6)  # the last block's last position is all that the head reads
    assert np.ptp(ours) > 1e-2, "patches that change nothing compare nothing"
    assert hooks_of(model) == []


@pytest.mark.parametrize("positions", [None, (0, 2, 9)])
def test_steered_generation_is_the_same_cached_recomputed_and_in_the_reference(positions):
    model, params = random_pair(CFG)
    rng = np.random.default_rng(1)
    edits = {
        "trf_blocks.1.shortcut2": add(3 * rng.normal(size=32), positions=positions),
        "trf_blocks.{}.att.context": scale(0.5, heads=(0, 2), positions=positions),
        "embedding": scale(1.5, positions=positions),
        "logits": add(rng.normal(size=97), positions=positions),
    }
    prompt_BT = random_ids(CFG, (2, 5))
    ours = generate(params, CFG, prompt_BT, 26, edits=edits)  # to twice the context, past which the window slides
    assert (ours != generate(params, CFG, prompt_BT, 26)).any(), "the edits steered nothing"
    with edited(model, edits):
        theirs = torch_generate(model, torch.from_numpy(prompt_BT), 26, 16, use_cache=True)
    np.testing.assert_array_equal(ours, theirs.numpy())
    logits_BTV = forward(params, CFG, ours[:, :16], edits=edits)  # all at once, without a cache
    np.testing.assert_array_equal(logits_BTV[:, 4:].argmax(-1), ours[:, 5:17])


def test_rows_of_different_lengths_are_steered_as_if_alone_and_another_value_compiles_nothing():
    _, params = random_pair(TWO)
    prompts = [[5, 6, 7], [1, 2, 3, 4, 8, 9, 10], [11]]

    def steered(prompts, size):
        direction_D = np.random.default_rng(2).normal(size=32)
        return complete(params, TWO, prompts, 6, edits={"trf_blocks.0.shortcut2": add(size * direction_D, positions=(1, 4))}).ids_BT

    together = steered(prompts, 2)
    before = compiled.prefill._cache_size(), compiled.decode._cache_size()
    other = steered(prompts, 5)
    assert (compiled.prefill._cache_size(), compiled.decode._cache_size()) == before
    assert (other != together).any()
    for row, prompt in zip(together, prompts, strict=True):
        np.testing.assert_array_equal(row, steered([prompt], 2)[0])


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        ({"trf_blocks.0.att.outs": scale(0)}, r"no site trf_blocks\.0\.att\.outs: there are embedding, .*att\.out, "),
        ({"trf_blocks.3.att.out": scale(0)}, r"no site trf_blocks\.3\.att\.out: .*N from 0 to 2"),
        ({"embedding": scale(0, positions=9)}, r"positions=9 of embedding: the text has 9 tokens, so they go from 0 to 8"),
        ({"embedding": scale(0, positions=-10)}, r"positions=-10 of embedding"),
        ({"embedding": scale(0, positions=1.5)}, r"positions=1\.5: expected whole numbers"),
        ({"logits": scale(0, heads=0)}, r"heads=0: logits is not divided into heads"),
        ({"trf_blocks.0.att.weights": scale(0, heads=4)}, r"heads=4: trf_blocks\.0\.att\.weights has heads 0 to 3"),
        ({"embedding": add(np.zeros(31))}, r"embedding has a value of shape \[31\], .* \[1, 9, 32\]"),
        ({"embedding": add(np.zeros((2, 9, 32)))}, r"embedding has a value of shape \[2, 9, 32\]"),
        ({"logits": lambda x: x[..., :5]}, r"the edit of logits makes .*\[1, 9, 5\] of .*\[1, 9, 97\]: it must keep shape and dtype"),
        ({"logits": lambda x: x > 0}, r"the edit of logits makes .*bool.* of .*float32"),
        ({"logits": lambda x: 3.0}, r"the edit of logits makes float of .*float32"),
        ({"logits": lambda x: None}, r"the edit of logits makes NoneType of .*float32"),
        ({"logits": lambda x: np.zeros(x.shape)}, r"the edit of logits makes float64\[1, 9, 97\] of .*float32"),
        ({"logits": 3.0}, r"the edit of logits is 3\.0: expected a function, or"),
        ({"logits": add(None)}, "the edit of logits has no value to add with"),
        ({"logits": "add"}, "the edit of logits is 'add': expected a function, or"),
        ({"embedding": scale(0, positions=jnp.array([9]))}, r"positions=.*9.* of embedding: the text has 9 tokens"),
        ({"embedding": scale(0, positions=jnp.array([1.5]))}, r"positions=.*1\.5.*: expected whole numbers"),
        ({"trf_blocks.0.att.weights": scale(0, heads=jnp.array([4]))}, r"heads=.*4.* has heads 0 to 3"),
    ],
)
def test_an_edit_that_makes_no_sense_is_refused_on_both_sides(edits, said):
    model, params = random_pair(CFG)
    tokens_BT = random_ids(CFG, (1, 9))
    with pytest.raises(InputError, match=said):
        forward(params, CFG, tokens_BT, edits=edits)
    with pytest.raises(InputError, match=said), edited(model, edits):
        model(torch.from_numpy(tokens_BT))
    assert hooks_of(model) == []


def test_what_can_t_be_edited_where_it_is_asked_for_is_refused():
    _, params = random_pair(CFG)
    with pytest.raises(InputError, match="positions=-1 of embedding: while text is generated its end is unknown"):
        generate(params, CFG, [[1, 2]], 3, edits={"embedding": scale(0, positions=-1)})
    with pytest.raises(InputError, match="positions=16 of embedding: the context is 16 tokens long"):
        generate(params, CFG, [[1, 2]], 3, edits={"embedding": scale(0, positions=16)})
    with pytest.raises(InputError, match="logits: they are not computed here"):
        hidden(params, CFG, np.ones((1, 3), int), edits={"logits": scale(0)})


def test_values_and_positions_may_be_of_any_kind():
    model, params = random_pair(TWO)
    tokens_BT = random_ids(TWO, (2, 16))
    array = np.linspace(-1, 1, 32)
    array.flags.writeable = False

    def edits(value, positions):
        return {"trf_blocks.1.shortcut2": add(value, positions=positions)}

    expected = forward(params, TWO, tokens_BT, edits=edits(array, np.array([3, 15])))
    text = generate(params, TWO, [[1, 2, 3]], 8, edits=edits(array, np.array([3, 15])))
    values = array.tolist(), array, jnp.asarray(array), torch.from_numpy(array.copy())
    for value, positions in zip(values, ([3, -1], range(3, 16, 12), jnp.array([3, -1]), torch.tensor([3, 15])), strict=True):
        with warnings.catch_warnings(action="error"):
            ours, theirs = both(model, params, tokens_BT, edits(value, positions), TWO)
        assert_close("edits", ours, expected, 2e-6, where=f"{type(value)} {positions}")
        assert_close("edits", theirs, expected, 2e-6, where=f"{type(value)} {positions}")
        np.testing.assert_array_equal(generate(params, TWO, [[1, 2, 3]], 8, edits=edits(value, [3, 15])), text)
    as_argument = jax.jit(lambda edits: forward(params, TWO, tokens_BT, edits=edits))(edits(array.tolist(), [3, -1]))
    assert_close("edits", as_argument, expected, 2e-6)
    np.testing.assert_array_equal(forward(params, TWO, tokens_BT, edits=edits(array, [])), forward(params, TWO, tokens_BT))


def test_a_function_may_write_to_the_tensor_that_it_is_given():
    model, params = random_pair(CFG)

    def emptied(x):
        return x.zero_()

    with torch.no_grad(), edited(model, {"trf_blocks.1.shortcut2": apply(emptied, positions=3)}):
        inputs = torch.from_numpy(random_ids(CFG, (2, 16)))
        theirs = model(inputs)
    assert_close("edits", forward(params, CFG, inputs.numpy(), edits={"trf_blocks.1.shortcut2": scale(0, positions=3)}), theirs, 2e-6)


def test_positions_are_counted_however_the_model_is_called():
    model, _ = random_pair(CFG)
    inputs = torch.from_numpy(random_ids(CFG, (2, 9)))
    with torch.no_grad(), edited(model, {"embedding": scale(0, positions=5)}):
        whole = model(tokens_BT=inputs)
        cached = [model(part, True) for part in inputs.split(3, dim=1)]
    model.reset_kv_cache()
    assert_close("edits", torch.cat(cached, dim=1), whole, 2e-6)


def test_a_compiled_model_is_refused():
    model, _ = random_pair(CFG)
    compiled_model = torch.compile(model, backend="eager")
    with pytest.raises(InputError, match="compiled by torch"), edited(compiled_model, {"embedding": scale(0)}):
        pass
    model.compile(backend="eager")
    with pytest.raises(InputError, match="compiled by torch"), edited(model, {"embedding": scale(0)}):
        pass


def test_activations_of_another_number_of_blocks_or_positions_are_refused():
    _, params = random_pair(CFG)
    for shape in ((2, 8, 32), (3, 1, 32), (3, 9, 32)):
        with pytest.raises(InputError, match=r"expected the activations of 3 blocks at 8 positions"):
            patch_each(params, CFG, jnp.ones(8, jnp.int32), jnp.zeros(shape), jnp.max)
