import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import SMALL, random_ids, random_pair
from scipy import stats

from flaxgpt.decode import decode
from flaxgpt.generate import generate
from flaxgpt.processors import keep_top_k
from flaxgpt.sampling import sample
from torch_ref import generate as torch_generate

# The toy vocabulary: closer every effort forward inches moves pizza toward you.
TOY = np.array([4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79], np.float32)


@pytest.fixture(scope="module")
def pair():
    return random_pair(SMALL)


def test_rows_of_a_batch_decode_as_if_alone(pair):
    prompt = random_ids(SMALL, (3, 5))
    together = generate(pair[1], SMALL, prompt, 30)
    for i in range(3):
        np.testing.assert_array_equal(generate(pair[1], SMALL, prompt[i : i + 1], 30)[0], together[i])


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40, 64, 65])
def test_prompts_of_any_length_continue_as_the_reference_does(pair, length):
    prompt = random_ids(SMALL, (2, length))
    expected = torch_generate.generate_text_simple(pair[0], torch.from_numpy(prompt), 20, SMALL.context_length)
    np.testing.assert_array_equal(generate(pair[1], SMALL, prompt, 20), expected)


def test_one_compilation_serves_all_prompts_of_a_bucket(pair):
    decode.clear_cache()
    for length, new in ((3, 10), (4, 50), (20, 44)):
        generate(pair[1], SMALL, random_ids(SMALL, (1, length)), new)
    assert decode._cache_size() == 1


def test_an_ended_row_holds_only_the_end_token(pair):
    prompt = random_ids(SMALL, (4, 5))
    free = np.asarray(generate(pair[1], SMALL, prompt, 20))
    eos = int(free[0, 8])
    ended = np.asarray(generate(pair[1], SMALL, prompt, 20, eos_id=eos))
    assert ended.shape == free.shape
    for row, wanted in zip(ended, free, strict=True):
        stops = np.flatnonzero(wanted[5:] == eos)
        length = 5 + (stops[0] if len(stops) else 20)
        np.testing.assert_array_equal(row[:length], wanted[:length])
        assert (row[length:] == eos).all()
    theirs = torch_generate.generate(pair[0], torch.from_numpy(prompt), 20, 16, eos_id=eos).numpy()
    np.testing.assert_array_equal(ended[:, : theirs.shape[1]], theirs)


def test_the_same_key_gives_the_same_text_and_another_key_another(pair):
    prompt = random_ids(SMALL, (2, 5))

    def text(seed):
        return np.asarray(generate(pair[1], SMALL, prompt, 20, temperature=1.0, key=jax.random.key(seed)))

    np.testing.assert_array_equal(text(0), text(0))
    assert not np.array_equal(text(0), text(1))


def test_no_new_tokens_gives_the_prompt_back(pair):
    prompt = random_ids(SMALL, (2, 5))
    np.testing.assert_array_equal(generate(pair[1], SMALL, prompt, 0), prompt)


def test_greedy_takes_the_likeliest_of_the_toy_vocabulary():
    assert sample(TOY[None], None, temperature=0).tolist() == [3]  # "forward"


def test_top_3_of_the_toy_vocabulary_has_the_published_probabilities():
    kept = keep_top_k(jnp.asarray(TOY)[None], 3)[0]
    assert np.flatnonzero(np.isfinite(kept)).tolist() == [0, 3, 7]
    np.testing.assert_allclose(jax.nn.softmax(kept)[jnp.array([0, 3, 7])], [0.0615, 0.5775, 0.3610], atol=5e-5)


def test_top_k_keeps_ties_and_is_clamped_to_the_vocabulary():
    logits = jnp.array([[1.0, 2.0, 2.0, 0.0]])
    assert np.isfinite(keep_top_k(logits, 1)).tolist() == [[False, True, True, False]]
    np.testing.assert_array_equal(keep_top_k(logits, 99), logits)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("top_k", [None, 3])
def test_draws_have_the_exact_probabilities(temperature, top_k):
    n = 10_000
    draws = sample(jnp.tile(TOY, (n, 1)), jax.random.key(0), temperature, top_k)
    logits = TOY.astype(np.float64) / temperature
    if top_k:
        logits[np.argsort(logits)[:-top_k]] = -np.inf
    expected = n * np.exp(logits) / np.exp(logits).sum()
    counts = np.bincount(draws, minlength=9)
    assert counts[expected == 0].sum() == 0
    common = expected >= 5  # where the chi-square approximation holds; the others are put together
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    held = wanted > 0
    assert stats.chisquare(observed[held], wanted[held]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (1, [4.19729385e-02, 7.68761185e-04, 1.14094276e-01, 1.14982549e-04, 3.49017038e-08, 8.43049007e-01]),
        (0.1, [9.35762295e-14, 3.97544973e-31, 2.06115362e-09, 2.22736356e-39, 1.47889750e-74, 9.99999998e-01]),
        (10, [0.20299317, 0.13607039, 0.22434215, 0.11252466, 0.0500575, 0.27401212]),
    ],
)
def test_softmax_with_temperature_in_float64_has_the_published_values(temperature, expected):
    with jax.enable_x64(True):
        logits = jnp.array([6, 2, 7, 0.1, -8, 9], jnp.float64)
        np.testing.assert_allclose(jax.nn.softmax(logits / temperature), expected, rtol=1e-7)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1.0, "key": None}, "key"),
        ({"top_k": 0}, "top_k"),
        ({"eos_id": 97}, "eos_id"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"prompt_ids": [[1, 97]]}, "prompt_ids"),
        ({"prompt_ids": [[-1]]}, "prompt_ids"),
        ({"prompt_ids": [[]]}, "prompt_ids"),
        ({"prompt_ids": [1, 2]}, "prompt_ids"),
    ],
)
def test_bad_arguments_are_refused_by_name(pair, options, named):
    arguments = {"prompt_ids": [[1, 2]], "max_new_tokens": 3, "key": jax.random.key(0), **options}
    with pytest.raises(ValueError, match=named):
        generate(pair[1], SMALL, **arguments)
