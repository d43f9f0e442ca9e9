"""The ladder of comparisons, whole: on random small configs, on the 124M reference, in every precision."""

import inspect
import os

import numpy as np
import pytest
from conftest import ONE_LAYER, SMALL, remember

from flaxgpt.config import GPTConfig, TrainConfig
from flaxgpt.parity import flax_side, ladder
from flaxgpt.parity.bounds import BOUNDS
from flaxgpt.parity.compare import Measurement, compare, relative
from flaxgpt.parity.problem import make_problem
from flaxgpt.parity.side import NoiseDrivenSide, SeededSide
from torch_ref.parity.huggingface_side import HuggingFaceSide
from torch_ref.parity.torch_side import TorchSide

REFERENCE, HUGGING_FACE = TorchSide(), HuggingFaceSide()
THEIRS = {"torch_ref": REFERENCE, "transformers": HUGGING_FACE}
MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


against_each = pytest.mark.parametrize("theirs", THEIRS.values(), ids=THEIRS.keys())


def random_config(seed: int) -> TrainConfig:
    """Small, and of no particular shape."""
    rng = np.random.default_rng(seed)
    n_heads = int(rng.integers(1, 5))
    model = GPTConfig(
        vocab_size=int(rng.integers(20, 90)),
        context_length=int(rng.integers(2, 14)),
        emb_dim=n_heads * int(rng.integers(2, 12)),
        n_heads=n_heads,
        n_layers=int(rng.integers(1, 4)),
        drop_rate=float(rng.uniform(0.05, 0.4)),
        qkv_bias=bool(rng.integers(2)) and bool(seed % 3),
        bias=bool(seed % 3),
        activation="gelu_tanh" if seed % 2 else "gelu",
        tie_embeddings=bool(seed % 2),
        remat=str(rng.choice(["none", "dots", "block"])),
    )
    return TrainConfig(model=model, beta2=float(rng.choice([0.95, 0.999])), decay=str(rng.choice(["all", "matrices"])))


def climb(problem, rungs=ladder.RUNGS, dtype="float32", ours=flax_side, theirs=REFERENCE):
    results = list(ladder.climb(ours, theirs, problem, rungs, dtype))
    for result in results:
        remember(f"{dtype}: {result.rung}{', transformers' if theirs is HUGGING_FACE else ''}", result)
    return results


def assert_passed(results, what):
    for result in results:
        for row in result.failures:
            raise AssertionError(
                f"{what}, rung {result.rung}: {row.name} differs by {row.difference} (bound {row.bound}), "
                f"in float64 by {row.exact} (bound {row.exact_bound}); {len(result.failures)} of {len(result.rows)} rows fail"
            )


@pytest.mark.parametrize(("side", "protocol"), [(flax_side, SeededSide), (REFERENCE, NoiseDrivenSide), (HUGGING_FACE, NoiseDrivenSide)])
def test_each_side_has_the_functions_that_are_asked_of_it(side, protocol):
    name_of_side = getattr(side, "__name__", type(side).__name__)
    asked = {name: method for name, method in inspect.getmembers(protocol, inspect.isfunction) if not name.startswith("_")}
    assert {"passes", "clip", "adamw", "train", "generate", "draw"} <= set(asked)
    for name, method in asked.items():
        signature = inspect.signature(method)
        expected = signature.replace(parameters=[p for p in signature.parameters.values() if p.name != "self"])
        assert inspect.signature(getattr(side, name)) == expected, f"{name_of_side}.{name} is not as side.py documents it"


@pytest.mark.parametrize(
    "seed",
    # without biases on query, key and value, and untied; and others, about 40 s on two cores for each, among them with biases and tied
    [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))],
)
def test_the_whole_ladder_passes_for_random_small_configs(seed):
    cfg = random_config(seed)
    for name, theirs in THEIRS.items():  # in one test, since what flaxgpt compiles for the one serves the other
        assert_passed(climb(make_problem(cfg, seed=seed, batch=3), theirs=theirs), f"{name}, {cfg.model}")


def test_bfloat16_differs_by_no_more_than_its_rounding_explains():
    cfg = TrainConfig(model=ONE_LAYER.replace(qkv_bias=True))
    results = climb(make_problem(cfg), ("activations", "loss", "gradients"), "bfloat16")
    assert_passed(results, "bfloat16")
    assert results[0].rows[-1].difference > 1e-3, "it was not bfloat16 that was compared"


def test_200_updates_with_dropout_agree_in_float64_to_1e_9():
    cfg = TrainConfig(model=SMALL.replace(drop_rate=0.2, qkv_bias=True), batch_size=4, warmup_steps=10, max_steps=200)
    problem = make_problem(cfg, batch=4, steps=200)
    expected, masks = REFERENCE.train(problem.cfg, problem.weights, problem.batches, "float64")
    ours, _ = flax_side.train(problem.cfg, problem.weights, problem.batches, "float64", masks)
    np.testing.assert_allclose(ours["loss"], expected["loss"], rtol=1e-9)
    differences = compare(ours, expected)
    for name in [name for name in differences if name.startswith("exp_avg") and name.endswith("W_key.bias")]:
        del differences[name]  # the gradient is zero, and this its rounding
    assert max(differences.values()) < 1e-9, max(differences, key=differences.get)
    assert np.ptp(expected["loss"]) > 0.1, "nothing was learnt, so nothing was compared"


def test_two_versions_of_one_model_can_be_compared_without_the_reference():
    problem = make_problem(TrainConfig(model=SMALL))
    before = flax_side.passes(SMALL, problem.weights, problem.batches[0], "float32")["activations"]
    moved = problem.weights | {"trf_blocks.1.att.W_value.weight": problem.weights["trf_blocks.1.att.W_value.weight"] * 1.001}
    after = flax_side.passes(SMALL, moved, problem.batches[0], "float32")["activations"]
    changed = [name for name, difference in compare(after, before).items() if difference > 0]
    assert changed[0] == "trf_blocks.1.att.value"


def test_dropout_masks_that_are_not_independent_draws_are_noticed():
    rng = np.random.default_rng(0)
    fair = [{"a": rng.random((40, 50)) > 0.1, "b": rng.random((40, 50)) > 0.1} for _ in range(3)]
    assert ladder.max_z_score(fair, 0.9) < 5
    assert ladder.max_z_score([{"a": rng.random((40, 50)) > 0.2}], 0.9) > 7, "the wrong rate"
    assert ladder.max_z_score([fair[0], {"a": fair[0]["b"]}], 0.9) > 7, "a mask used twice"


def test_masks_that_do_not_fit_are_refused_on_both_sides():
    cfg = TrainConfig(model=SMALL.replace(drop_rate=0.2), batch_size=2)
    problem = make_problem(cfg, steps=2)
    _, masks = REFERENCE.train(problem.cfg, problem.weights, problem.batches, "float32")
    for side in (flax_side, REFERENCE, HUGGING_FACE):
        wrong = [mask | {"drop_emb": mask["drop_emb"][:1]} for mask in masks]
        with pytest.raises(ValueError, match=r"dropout mask of drop_emb is \(1, 16, 32\), expected \(2, 16, 32\)"):
            side.train(problem.cfg, problem.weights, problem.batches, "float32", wrong)


@pytest.mark.parametrize(
    ("sizes", "named"),
    [({"steps": 1}, "steps=1"), ({"batch": 0}, "batch=0"), ({"length": 0}, "length=0"), ({"length": 17}, "length=17")],
)
def test_a_problem_that_leaves_nothing_to_compare_is_refused(sizes, named):
    with pytest.raises(ValueError, match=named):
        make_problem(TrainConfig(model=SMALL), **sizes)


def test_records_with_other_names_or_shapes_are_not_compared():
    with pytest.raises(ValueError, match=r"y is only in one of them; x is \(2,\) and \(3,\)"):
        compare({"x": np.ones(2)}, {"x": np.ones(3), "y": np.ones(1)})


def test_a_rung_that_can_t_be_compared_does_not_keep_the_others_from_it():
    class Incomplete:
        @staticmethod
        def passes(*given):
            record = REFERENCE.passes(*given)
            record["gradients"].popitem()
            return record

    results = ladder.climb(flax_side, Incomplete, make_problem(TrainConfig(model=ONE_LAYER)), dtype="float64")
    assert [next(results).passed, next(results).passed] == [True, True]
    with pytest.raises(ValueError, match="is only in one of them"):
        next(results)


def test_nan_is_never_within_bounds():
    assert not Measurement("loss", float("nan"), bound=1.0).passed
    assert not Measurement("loss", 0.0, exact=float("nan"), bound=1.0, exact_bound=1.0).passed
    assert Measurement("parameter", None, error_flaxgpt=0.5, exact=0.0, exact_bound=1.0).passed, "what is not compared can't fail"
    assert np.isnan(relative(np.array([np.nan]), np.ones(1)))


def test_bounds_are_within_ten_times_of_what_was_measured():
    for rung, bounds in BOUNDS.items():
        assert bounds.measured32 <= bounds.float32 <= 10 * bounds.measured32, rung
        assert bounds.measured64 <= bounds.float64 <= 10 * bounds.measured64, rung


@pytest.mark.slow  # about two minutes on two cores
@against_each
def test_nothing_fails_in_100_seeds(theirs):
    cfg = TrainConfig(model=SMALL.replace(qkv_bias=True, drop_rate=0.1))
    for seed in range(100):
        assert_passed(climb(make_problem(cfg, seed=seed), theirs=theirs), f"seed {seed}")


@pytest.mark.slow  # about a minute of one core
def test_the_whole_ladder_passes_in_bfloat16_for_10_seeds():
    cfg = TrainConfig(model=SMALL.replace(qkv_bias=True, drop_rate=0.1))
    for seed in range(10):
        for name, theirs in THEIRS.items():
            assert_passed(climb(make_problem(cfg, seed=seed), dtype="bfloat16", theirs=theirs), f"{name}, seed {seed}")


@pytest.mark.large  # about ten minutes on two cores
@pytest.mark.skipif(MEMORY < 20 * 2**30, reason=f"takes 17 GiB of memory, and this machine has {MEMORY / 2**30:.0f} in all")
def test_the_whole_ladder_passes_for_the_124m_reference(all_cores):
    cfg = TrainConfig.preset("verdict-124m")
    assert_passed(climb(make_problem(cfg, batch=1, length=32, steps=2)), "verdict-124m")
