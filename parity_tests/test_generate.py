"""Cached = recomputed = the reference, token by token."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import ONE_LAYER, SMALL, assert_close, forward, random_ids, random_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampling import EVERYTHING

from flaxgpt.cache import Cache
from flaxgpt.config import GREEDY, GPTConfig, SamplingConfig
from flaxgpt.generation import decode as decoding
from flaxgpt.generation.decode import State, decode, prefill, unstack
from flaxgpt.generation.generate import Request, complete, generate
from flaxgpt.generation.sampling import gumbel_noise
from torch_ref.generation import generate as torch_generate

V, C = SMALL.vocab_size, SMALL.context_length
TIED = GPTConfig(vocab_size=61, context_length=24, emb_dim=24, n_heads=2, n_layers=2, drop_rate=0.0, qkv_bias=True, tie_embeddings=True)
next_logits = jax.jit(decoding.next_logits, static_argnames="cfg")  # one program in place of one for each operation


@pytest.fixture(scope="module")
def pair():
    return random_pair(SMALL)


@pytest.fixture(scope="module")
def params(pair):
    return unstack(pair[1], SMALL)


@pytest.fixture(scope="module")
def shallow():
    return unstack(random_pair(ONE_LAYER)[1], ONE_LAYER)


def reference(model, cfg, prompts, new, key, *, use_cache, **options):
    """The reference's new tokens, each row alone, with the noise that the rows of a batch of these prompts draw."""
    noise = [np.asarray(gumbel_noise(key, t, (len(prompts), cfg.vocab_size))) for t in range(new)] if options else None
    rows = []
    for b, prompt in enumerate(prompts):
        row_noise = (lambda t, b=b: noise[t][b : b + 1]) if noise else None
        idx = torch.tensor(prompt)[None]
        ids = torch_generate.generate(model, idx, new, cfg.context_length, noise=row_noise, use_cache=use_cache, **options)
        rows.append(ids[0, len(prompt) :].numpy())
    return np.stack(rows)


# Hypothesis chooses numbers that don't compile anew: lengths within and beyond the context, ids, penalties, temperatures.
lengths = st.lists(st.integers(1, 40), min_size=3, max_size=3).filter(lambda lengths: max(lengths) > 8)
numbers = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.3, 3.0),
        "repetition_penalty": st.floats(0.7, 1.5),
        "presence_penalty": st.floats(-0.5, 0.5),
        "frequency_penalty": st.floats(-0.5, 0.5),
        "top_p": st.floats(0.3, 0.99),
        "min_p": st.floats(0.0, 0.1),
    }
)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(lengths, st.integers(0, 2**31), st.integers(1, 30), numbers)
def test_ragged_rows_with_every_processor_are_the_references(pair, params, lengths, seed, new, numbers):
    prompts = [random_ids(SMALL, (length,), seed + b).tolist() for b, length in enumerate(lengths)]
    options, key = EVERYTHING | numbers, jax.random.key(seed)
    ours = complete(params, SMALL, prompts, new, SamplingConfig(**options), key=key).ids_BT
    np.testing.assert_array_equal(ours, reference(pair[0], SMALL, prompts, new, key, use_cache=False, **options))
    np.testing.assert_array_equal(ours, reference(pair[0], SMALL, prompts, new, key, use_cache=True, **options))


@pytest.mark.parametrize("cfg", [TIED, SMALL.replace(n_heads=1, n_layers=1, context_length=9)], ids=["tied", "one layer"])
def test_other_models_within_and_beyond_the_context(cfg):
    model, params = random_pair(cfg, seed=1)
    prompts = [random_ids(cfg, (length,), length).tolist() for length in (3, 8, 1)]
    key = jax.random.key(0)
    for options in ({}, {"temperature": 1.0}):
        ours = complete(params, cfg, prompts, 30, GREEDY.replace(**options), key=key).ids_BT
        np.testing.assert_array_equal(ours, reference(model, cfg, prompts, 30, key, use_cache=True, **options))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40, 64, 65])
def test_prompts_of_any_length_continue_as_the_reference_does(pair, length):
    prompt = random_ids(SMALL, (2, length))
    expected = torch_generate.generate_text_simple(pair[0], torch.from_numpy(prompt), 20, C)
    np.testing.assert_array_equal(generate(pair[1], SMALL, prompt, 20), expected)
    cached = torch_generate.generate_text_simple_cached(pair[0], torch.from_numpy(prompt), 20, C)
    np.testing.assert_array_equal(cached, expected)


def test_logits_of_the_cached_path_are_those_of_the_full_pass(pair, params):
    tokens = random_ids(SMALL, (2, C))
    full = forward(pair[1], SMALL, tokens)
    padded = np.concatenate([np.zeros((2, 3), int), tokens], axis=1)  # three slots of padding, which must change nothing
    logits, cache = next_logits(params, SMALL, padded[:, :8], Cache.empty(SMALL, np.array([3, 3], np.int32), C + 3))
    assert_close("logits, cached against the full pass", logits, full[:, 4], 2e-6, where="prefill")
    for t in range(5, C):
        logits, cache = next_logits(params, SMALL, tokens[:, t : t + 1], cache)
        assert_close("logits, cached against the full pass", logits, full[:, t], 2e-6, where=f"position {t}")


def off_by_one(self, T):
    return jnp.maximum(self.filled + jnp.arange(T) - self.first_B[:, None] - 1, 0)


def padding_in_sight(self, T):
    return jnp.arange(self.slots) <= (self.filled + jnp.arange(T))[None, :, None]


def own_slot_hidden(self, T):
    slots_S, own_T1 = jnp.arange(self.slots), (self.filled + jnp.arange(T))[:, None]
    return (slots_S < own_T1) & (slots_S >= self.first_B[:, None, None]) | (slots_S == self.first_B[:, None, None])


@pytest.mark.parametrize(
    ("name", "bug"),
    [("positions_BT", off_by_one), ("visible_BTS", padding_in_sight), ("visible_BTS", own_slot_hidden)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_bug_in_the_cache_is_caught(monkeypatch, name, bug):
    # A config of its own for each, since what is compiled with the bug stays; and no window that slides, which has no cache.
    cfg = ONE_LAYER.replace(vocab_size=100 + len(bug.__name__), context_length=128)
    model, params = random_pair(cfg)
    prompts = [random_ids(cfg, (length,), length).tolist() for length in (3, 7)]
    monkeypatch.setattr(Cache, name, bug)
    ours = complete(params, cfg, prompts, 9).ids_BT
    assert not np.array_equal(ours, reference(model, cfg, prompts, 9, None, use_cache=False))


def test_rows_of_a_batch_decode_as_if_alone(shallow):
    prompts = [random_ids(SMALL, (length,), length).tolist() for length in (9, 12, 1, 30)]
    key, sampling = jax.random.key(0), SamplingConfig(repetition_penalty=1.2, top_p=0.99)
    together = complete(shallow, ONE_LAYER, prompts, 30, sampling, key=key)
    for b, prompt in enumerate(prompts):
        alone = complete(shallow, ONE_LAYER, [prompt], 30, sampling, key=jax.random.fold_in(key, b)[None])
        np.testing.assert_array_equal(alone.ids_BT[0], together.ids_BT[b])
    others = complete(shallow, ONE_LAYER, [prompts[0], [1], [2], [3]], 30, sampling, key=key)
    np.testing.assert_array_equal(others.ids_BT[0], together.ids_BT[0])


def test_a_list_and_a_padded_array_with_a_mask_mean_the_same(params):
    prompts = [random_ids(SMALL, (length,), length).tolist() for length in (5, 3)]
    padded = np.array([prompts[0], [55, 66, *prompts[1]]])
    mask = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    as_list = generate(params, SMALL, prompts, 10)
    as_array = generate(params, SMALL, padded, 10, prompt_mask=mask)
    assert as_list[1, :2].tolist() == [0, 0]
    np.testing.assert_array_equal(as_array[:, :5], padded)
    np.testing.assert_array_equal(as_list[:, 5:], as_array[:, 5:])
    assert not np.array_equal(generate(params, SMALL, padded, 10)[1, 5:], as_list[1, 5:]), "without the mask, padding is text"


def prefilled(cfg, params, length, new):
    """A request, and its state with the prompt read: shapes alone, for which nothing is compiled."""
    request = Request.of(params, cfg, random_ids(cfg, (1, length)), new)
    return request, jax.eval_shape(request.prefill)


def compiled_decode(cfg, params, length, new):
    request, state = prefilled(cfg, params, length, new)
    lowered = decode.lower(params, cfg, state, np.int32(new), request.chain, None, request.eos_id)
    return lowered.compile(), state


def test_the_cache_is_sized_by_need():
    cfg = SMALL.replace(context_length=512)
    params = unstack(random_pair(cfg)[1], cfg)

    def slots(length, new):
        return prefilled(cfg, params, length, new)[1].cache.slots

    assert slots(5, 20) == 8 + 64
    assert slots(60, 100) == 64 + 128
    assert slots(5, 5000) == 8 + 512


def test_memory_beyond_the_cache_does_not_grow_with_the_number_of_tokens(shallow):
    (few, small), (many, large) = (compiled_decode(ONE_LAYER, shallow, 5, new) for new in (64, 64_000))
    assert small.cache.slots == large.cache.slots
    buffer = 4 * (large.new_BT.size - small.new_BT.size)  # four bytes a token: the result itself
    grown = many.memory_analysis().temp_size_in_bytes - few.memory_analysis().temp_size_in_bytes
    assert grown <= 2 * buffer


def test_no_weight_is_copied_converted_or_transposed_while_decoding():
    cfg = SMALL.replace(emb_dim=36, n_heads=3, context_length=512, dtype="bfloat16")
    converted = jax.eval_shape(lambda params: unstack(params, cfg), random_pair(cfg)[1])

    def made_in_the_loop(params):
        """The primitives whose results have the shape of a weight matrix."""
        request, state = prefilled(cfg, params, 5, 10)
        jaxpr = str(decode.trace(params, cfg, state, np.int32(10), request.chain, None, request.eos_id).jaxpr)
        D, F = cfg.emb_dim, 4 * cfg.emb_dim
        return set(re.findall(rf":\w+\[(?:{D},{D}|{D},{F}|{F},{D}|{V},{D}|{D},{V})\] = (\w+)", jaxpr))

    assert made_in_the_loop(converted) == set()
    in_float32 = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), converted)
    assert "convert_element_type" in made_in_the_loop(in_float32), "what this test looks for"


def test_an_ended_row_holds_only_the_end_token():
    model, params = random_pair(ONE_LAYER)
    prompt = random_ids(SMALL, (4, 5))
    free = generate(params, ONE_LAYER, prompt, 20)
    eos = int(free[0, 8])
    ended = generate(params, ONE_LAYER, prompt, 20, eos_id=eos)
    assert ended.shape == free.shape
    lengths = complete(params, ONE_LAYER, prompt, 20, eos_id=eos).lengths_B
    for row, wanted, length in zip(ended, free, lengths, strict=True):
        stops = np.flatnonzero(wanted[5:] == eos)
        assert length == (stops[0] + 1 if len(stops) else 20)
        np.testing.assert_array_equal(row[: 5 + length], wanted[: 5 + length])
        assert (row[5 + length :] == eos).all()
    theirs = torch_generate.generate(model, torch.from_numpy(prompt), 20, 16, eos_id=eos).numpy()
    np.testing.assert_array_equal(ended[:, : theirs.shape[1]], theirs)


def test_decoding_ends_when_every_row_has_ended(shallow):
    prompt = random_ids(SMALL, (1, 5))
    eos = int(generate(shallow, ONE_LAYER, prompt, 4)[0, -1])
    request = Request.of(shallow, ONE_LAYER, prompt, 60, eos_id=eos)
    state = request.decode(request.prefill(), 60)
    assert isinstance(state, State)
    assert int(state.t) <= 4


def test_samples_of_one_prompt_share_its_prefill_and_differ(shallow):
    prompts, key = [[1, 2, 3], [4]], jax.random.key(0)
    many = generate(shallow, ONE_LAYER, prompts, 12, temperature=1.0, key=key, num_samples=3)
    repeated = [prompt for prompt in prompts for _ in range(3)]
    np.testing.assert_array_equal(many, generate(shallow, ONE_LAYER, repeated, 12, temperature=1.0, key=key))
    assert len({tuple(row) for row in many}) == 6
    request = Request.of(shallow, ONE_LAYER, prompts, 12, num_samples=3)
    text = str(prefill.trace(*prefill_arguments(request), room=64, num_samples=3).jaxpr)
    assert f"f32[2,8,{SMALL.emb_dim}]" in text
    assert f"f32[6,8,{SMALL.emb_dim}]" not in text, "the prompt is read once for all its samples"


def prefill_arguments(request):
    ids, first = np.zeros((2, 8), np.int32), np.array([5, 7], np.int32)
    return request.params, request.cfg, ids, first, request.chain, None, request.eos_id, None


def test_log_probabilities_are_the_models_own(shallow):
    prompt = random_ids(SMALL, (2, 5))
    key = jax.random.key(0)
    done = complete(shallow, ONE_LAYER, prompt, 11, SamplingConfig(temperature=0.7, top_k=20), key=key, top_log_probs=4)
    np.testing.assert_array_equal(done.ids_BT, generate(shallow, ONE_LAYER, prompt, 11, temperature=0.7, top_k=20, key=key)[:, 5:])
    whole = np.concatenate([prompt, done.ids_BT], axis=1)
    expected = jax.nn.log_softmax(forward(random_pair(ONE_LAYER)[1], ONE_LAYER, whole[:, :-1]))[:, 4:]
    chosen = np.take_along_axis(np.asarray(expected), done.ids_BT[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(done.log_probs_BT, chosen, rtol=1e-5)
    top, ids = jax.lax.top_k(expected, 4)
    np.testing.assert_allclose(done.top_log_probs_BTK, top, rtol=1e-5)
    np.testing.assert_array_equal(done.top_ids_BTK, ids)
    assert complete(shallow, ONE_LAYER, prompt, 0, top_log_probs=4).top_ids_BTK.shape == (2, 0, 4)


def test_the_same_key_gives_the_same_text_and_another_key_another(shallow):
    prompt = random_ids(SMALL, (2, 5))

    def text(seed):
        return generate(shallow, ONE_LAYER, prompt, 20, temperature=0.7, top_k=20, key=jax.random.key(seed))

    np.testing.assert_array_equal(text(0), text(0))
    assert not np.array_equal(text(0), text(1))


def test_settings_are_one_value_or_keywords_or_both(shallow):
    prompt, key = random_ids(SMALL, (2, 5)), jax.random.key(0)
    expected = generate(shallow, ONE_LAYER, prompt, 20, SamplingConfig(temperature=0.7, top_k=20), key=key)
    np.testing.assert_array_equal(generate(shallow, ONE_LAYER, prompt, 20, temperature=0.7, top_k=20, key=key), expected)
    np.testing.assert_array_equal(
        generate(shallow, ONE_LAYER, prompt, 20, sampling=SamplingConfig(temperature=0.7), top_k=20, key=key), expected
    )


def test_no_new_tokens_gives_the_prompt_back(params):
    prompt = random_ids(SMALL, (2, 5))
    np.testing.assert_array_equal(generate(params, SMALL, prompt, 0), prompt)
    assert generate(params, SMALL, [[1, 2], [3]], 0).tolist() == [[1, 2], [0, 3]]


def test_bfloat16_weights_are_converted_once_and_change_no_logit():
    cfg = ONE_LAYER.replace(dtype="bfloat16")
    params = random_pair(cfg)[1]
    converted = unstack(params, cfg)
    assert converted["trf_blocks"][0]["ff"]["layers_0"]["kernel"].dtype == jnp.bfloat16
    assert converted["final_norm"]["scale"].dtype == jnp.float32
    tokens = random_ids(cfg, (2, 9))
    full = forward(params, cfg, tokens)[:, -1]
    logits, _ = next_logits(converted, cfg, tokens, Cache.empty(cfg, np.zeros(2, np.int32), 9))
    # Both round to eight bits after each operation, in the order that suits the compiler.
    assert_close("logits in bfloat16, cached against the full pass", logits, full, 2e-2)
    assert generate(params, cfg, tokens, 20).shape == (2, 29)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1.0, "key": None}, "key"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"eos_id": 97}, "eos_id"),
        ({"logit_bias": {97: 1.0}}, "logit_bias"),
        ({"banned": (97,)}, "banned"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 2**31}, "max_new_tokens"),
        ({"num_samples": 0}, "num_samples"),
        ({"prompts": [[1, 97]]}, "prompts"),
        ({"prompts": [[-1]]}, "prompts"),
        ({"prompts": [[]]}, "prompts"),
        ({"prompts": []}, "prompts"),
        ({"prompts": [1, 2]}, "prompts"),
        ({"prompts": 5}, "prompts"),
        ({"prompts": [[0.5]]}, "prompts"),
        ({"prompt_mask": [[1, 0]]}, "prompt_mask"),
        ({"prompt_mask": [[1, 1, 1]]}, "prompt_mask"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_by_name(pair, options, named):
    arguments = {"prompts": [[1, 2]], "max_new_tokens": 3, "key": jax.random.key(0), **options}
    with pytest.raises(ValueError, match=named):
        generate(pair[1], SMALL, **arguments)


@pytest.mark.parametrize("top_log_probs", [-1, 98])
def test_a_number_of_log_probabilities_outside_the_vocabulary_is_refused(params, top_log_probs):
    with pytest.raises(ValueError, match=f"top_log_probs={top_log_probs}: expected 0 to the vocabulary's 97"):
        complete(params, SMALL, [[1, 2]], 3, top_log_probs=top_log_probs)


def test_more_tokens_than_the_cache_holds_are_refused(params):
    with pytest.raises(ValueError, match="9 tokens do not fit in a cache of 8"):
        next_logits(params, SMALL, np.zeros((1, 9), int), Cache.empty(SMALL, np.zeros(1, np.int32), 8))


def test_one_compilation_serves_all_prompts_of_a_bucket(shallow):
    prefill.clear_cache()
    decode.clear_cache()
    settings = [
        {"temperature": 0.5, "top_p": 0.5, "repetition_penalty": 1.2},
        {"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 0.8},
    ]
    for length, new in ((9, 10), (16, 50), (40, 64)):  # past the context the last 16 tokens count
        for options in settings:
            generate(shallow, ONE_LAYER, random_ids(SMALL, (1, length)), new, key=jax.random.key(length), **options)
    assert (prefill._cache_size(), decode._cache_size()) == (1, 1)
    generate(shallow, ONE_LAYER, random_ids(SMALL, (1, 8)), 10, key=jax.random.key(0), **settings[0])
    assert (prefill._cache_size(), decode._cache_size()) == (2, 2), "a shorter prompt has a smaller cache"
