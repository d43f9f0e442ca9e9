import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats

from flaxgpt.config import SamplingConfig
from flaxgpt.generation import processors
from flaxgpt.generation.processors import keep_min_p, keep_top_k, keep_top_p
from flaxgpt.generation.sampling import Chain, Seen, choose, gumbel_noise, row_keys
from torch_ref.generation.sampling import process_logits

# The toy vocabulary: closer every effort forward inches moves pizza toward you.
TOY = np.array([4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79], np.float32)
EVERYTHING = {
    "logit_bias": {3: 1.5, 40: -2.0},
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
    "banned": (7, 11),
    "temperature": 0.8,
    "top_k": 30,
    "top_p": 0.9,
    "min_p": 0.02,
}


def sample(logits_BV, key, temperature=1.0, *, functions=(), **settings):
    """One token id for each row, as `generate` chooses its first new token."""
    sampling = SamplingConfig(temperature=temperature, **settings)
    sampling.check_vocabulary(logits_BV.shape[-1])
    return choose(Chain.of(sampling, functions)(jnp.asarray(logits_BV)), row_keys(sampling, key, len(logits_BV)), t=0)


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


def test_top_p_keeps_the_fewest_that_reach_p_and_ties_together():
    logits = jnp.log(jnp.array([[0.5, 0.2, 0.2, 0.1]]))
    for top_p, kept in ((1e-9, 1), (0.49, 1), (0.51, 3), (0.89, 3), (0.91, 4)):
        assert np.isfinite(keep_top_p(logits, top_p)).sum() == kept, top_p
    excluded = jnp.array([[-jnp.inf, 0.0, -1e30, -jnp.inf]])
    assert np.isfinite(keep_top_p(excluded, 0.999)).tolist() == [[False, True, False, False]]
    assert np.isfinite(keep_top_p(jnp.full((1, 4), -0.0), 0.3)).all()


def test_min_p_is_relative_to_the_likeliest():
    logits = jnp.log(jnp.array([[0.5, 0.26, 0.24]]))
    assert np.isfinite(keep_min_p(logits, 0.5)).tolist() == [[True, True, False]]
    assert np.isfinite(keep_min_p(logits, 1.0)).tolist() == [[True, False, False]]


def exact(logits, temperature, top_k=None, top_p=None, min_p=None):
    """The probabilities that these settings mean, by NumPy in float64."""
    logits = logits.astype(np.float64) / temperature
    if top_k:
        logits[np.argsort(logits)[:-top_k]] = -np.inf
    p = np.exp(logits) / np.exp(logits).sum()
    if top_p:
        order = np.argsort(-p)
        p[order[np.cumsum(p[order]) - p[order] >= top_p]] = 0
        p /= p.sum()
    if min_p:
        p[p < min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 6, "top_p": 0.95, "min_p": 0.01}], ids=str
)
def test_draws_have_the_exact_probabilities(temperature, settings):
    n = 10_000
    draws = sample(jnp.tile(TOY, (n, 1)), jax.random.key(0), temperature, **settings)
    assert fits(draws, exact(TOY, temperature, **settings))


def test_draws_with_other_probabilities_would_be_noticed():
    draws = sample(jnp.tile(TOY, (10_000, 1)), jax.random.key(0), 1.0)
    assert not fits(draws, exact(TOY, 1.15))
    assert not fits(draws, exact(TOY, 1.0, top_k=2))


def fits(draws, probabilities):
    expected = len(draws) * probabilities
    counts = np.bincount(draws, minlength=len(expected))
    if counts[expected == 0].any():
        return False
    common = expected >= 5  # where the chi-square approximation holds; the others are put together
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    held = wanted > 0
    return held.sum() == 1 or stats.chisquare(observed[held], wanted[held]).pvalue > 1e-3


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


@pytest.fixture(scope="module")
def written():
    """Logits, a prompt and new tokens in which some ids occur, some several times."""
    rng = np.random.default_rng(0)
    return 3 * rng.standard_normal((4, 50), np.float32), rng.integers(0, 50, (4, 12)), rng.integers(0, 50, (4, 30))


def seen_of(prompt, new, V):
    counts = [np.stack([np.bincount(row, minlength=V) for row in ids]) for ids in (prompt, new)]
    return Seen(jnp.asarray(counts[0] > 0), jnp.asarray(counts[1], jnp.int32))


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ({"logit_bias": {3: 1.5, 40: -2.0}}, lambda hf: [hf.SequenceBiasLogitsProcessor({(3,): 1.5, (40,): -2.0})]),
        ({"repetition_penalty": 1.7}, lambda hf: [hf.RepetitionPenaltyLogitsProcessor(1.7)]),
        ({"repetition_penalty": 0.6}, lambda hf: [hf.RepetitionPenaltyLogitsProcessor(0.6)]),
        ({"banned": (7, 11)}, lambda hf: [hf.NoBadWordsLogitsProcessor([[7], [11]])]),
        ({"temperature": 0.3}, lambda hf: [hf.TemperatureLogitsWarper(0.3)]),
        ({"top_k": 5}, lambda hf: [hf.TopKLogitsWarper(5)]),
        ({"top_k": 99}, lambda hf: [hf.TopKLogitsWarper(99)]),
        ({"top_p": 0.7}, lambda hf: [hf.TopPLogitsWarper(0.7)]),
        ({"top_p": 1e-6}, lambda hf: [hf.TopPLogitsWarper(1e-6)]),
        ({"min_p": 0.05}, lambda hf: [hf.MinPLogitsWarper(0.05)]),
        (
            {name: value for name, value in EVERYTHING.items() if name not in ("presence_penalty", "frequency_penalty")},
            lambda hf: [
                hf.SequenceBiasLogitsProcessor({(3,): 1.5, (40,): -2.0}),
                hf.RepetitionPenaltyLogitsProcessor(1.3),
                hf.NoBadWordsLogitsProcessor([[7], [11]]),
                hf.TemperatureLogitsWarper(0.8),
                hf.TopKLogitsWarper(30),
                hf.TopPLogitsWarper(0.9),
                hf.MinPLogitsWarper(0.02),
            ],
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_each_processor_and_the_chain_do_as_hugging_face_does(written, settings, theirs):
    hf = pytest.importorskip("transformers")
    logits, prompt, new = written
    expected = torch.from_numpy(logits.copy())
    for processor in theirs(hf):
        expected = processor(torch.from_numpy(np.concatenate([prompt, new], axis=1)), expected)
    ours = Chain.of(SamplingConfig(**settings))(jnp.asarray(logits), seen_of(prompt, new, 50))
    np.testing.assert_allclose(ours, expected, rtol=2e-6)
    assert not np.array_equal(ours, logits) or settings == {"top_k": 99}


def test_the_order_in_which_they_act_is_noticed(written):
    logits, prompt, new = written
    seen = seen_of(prompt, new, 50)
    ours = Chain.of(SamplingConfig(logit_bias={3: 1.5}, repetition_penalty=1.3))(jnp.asarray(logits), seen)
    other = processors.penalise_repetition(jnp.asarray(logits), seen.prompt_BV | (seen.counts_BV > 0), 1.3)
    other = processors.add_bias(other, jnp.array([3]), jnp.array([1.5]))
    assert not np.allclose(ours, other, rtol=1e-3)


def test_presence_and_frequency_penalties_count_the_new_tokens_only(written):
    logits, prompt, new = written
    ours = Chain.of(SamplingConfig(presence_penalty=0.4, frequency_penalty=0.3))(jnp.asarray(logits), seen_of(prompt, new, 50))
    counts = np.stack([np.bincount(row, minlength=50) for row in new])
    np.testing.assert_allclose(ours, logits - 0.4 * (counts > 0) - 0.3 * counts, rtol=2e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_reference_processes_logits_alike(written, temperature):
    logits, prompt, new = written
    config = SamplingConfig(**EVERYTHING | {"temperature": temperature})
    theirs = process_logits(*map(torch.from_numpy, written), config)
    np.testing.assert_allclose(Chain.of(config)(jnp.asarray(logits), seen_of(prompt, new, 50)), theirs, rtol=2e-6)


def test_top_p_keeps_or_drops_equal_tokens_together_on_both_sides():
    logits = np.log(np.array([[0.3, 0.2, 0.2, 0.2, 0.1]], np.float32))
    for top_p, kept in ((0.2, [0]), (0.4, [0, 1, 2, 3]), (0.95, [0, 1, 2, 3, 4])):
        config, nothing = SamplingConfig(top_p=top_p), torch.zeros(1, 0, dtype=torch.int64)
        assert np.flatnonzero(np.isfinite(Chain.of(config)(jnp.asarray(logits))[0])).tolist() == kept
        assert np.flatnonzero(np.isfinite(process_logits(torch.from_numpy(logits), nothing, nothing, config)[0])).tolist() == kept


def test_functions_of_the_users_come_last():
    def only_even(logits_BV):
        return jnp.where(jnp.arange(logits_BV.shape[1]) % 2 == 0, logits_BV, -jnp.inf)

    draws = sample(jnp.tile(TOY, (100, 1)), jax.random.key(0), functions=(only_even,))
    assert set(draws.tolist()) <= {0, 2, 4, 6, 8}
    assert sample(TOY[None], None, temperature=0, functions=(only_even,)).tolist() == [0]


def test_a_row_draws_from_its_own_key_whatever_its_neighbours():
    key, logits = jax.random.key(3), jax.random.normal(jax.random.key(4), (6, 97))
    together = sample(logits, key)
    np.testing.assert_array_equal(sample(logits[:2], key), together[:2])
    alone = [sample(logits[b : b + 1], jax.random.fold_in(key, b)[None])[0] for b in range(6)]
    np.testing.assert_array_equal(together, alone)


def test_the_noise_is_what_categorical_adds():
    key, logits = jax.random.key(5), jax.random.normal(jax.random.key(6), (4, 97))
    rows = [jax.random.fold_in(jax.random.fold_in(key, b), 7) for b in range(4)]
    drawn = [jax.random.categorical(k, row) for k, row in zip(rows, logits, strict=True)]
    np.testing.assert_array_equal(jnp.argmax(logits + gumbel_noise(key, 7, (4, 97)), axis=-1), drawn)
    assert not np.array_equal(gumbel_noise(key, 7, (4, 97)), gumbel_noise(key, 8, (4, 97)))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 1.0, "key": None}, "key"),
        ({"key": jax.random.split(jax.random.key(0), 3)}, "key"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-39}, "repetition_penalty"),  # no number of float32, as those below
        ({"frequency_penalty": 1e39}, "frequency_penalty"),
        ({"logit_bias": {0: 1e39}}, "logit_bias"),
        ({"temperature": 1e39}, "temperature"),
        ({"presence_penalty": float("inf")}, "presence_penalty"),
        ({"logit_bias": {9: 1.0}}, "logit_bias"),
        ({"logit_bias": {0: float("-inf")}}, "logit_bias"),
        ({"banned": (-1,)}, "banned"),
        ({"banned": tuple(range(9))}, "banned"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(settings, named):
    with pytest.raises(ValueError, match=named):
        sample(TOY[None], **{"key": jax.random.key(0)} | settings)
