"""The ladder of comparisons, from the first activation to generated text. Knows no framework: both sides are handed in.

A side is a module with the functions of `flaxgpt.parity.flax_side` (`ours`) or `torch_ref.parity.torch_side` (`theirs`);
one that has been changed can stand in for it. Each rung runs both sides in the precision under test and in float64.
The reference in float64 is the truth: so each side's own error is known, and flaxgpt in float64 shows what is left of a
difference when rounding is gone.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flaxgpt.config import GPTConfig, TrainConfig
from flaxgpt.convert.params import parameter_shapes
from flaxgpt.errors import InputError
from flaxgpt.parity.compare import BOUNDS, Result, Row, Tensors, bfloat16_error, check_finite, compare

Batch = tuple[np.ndarray, np.ndarray]
Side = Any

RUNGS = ("activations", "loss", "gradients", "clipping", "adamw", "accumulation", "training", "dropout", "generation")
"""In order; rung n of the report is the n-th, from 1."""


@dataclass(frozen=True)
class Problem:
    """What both sides are given."""

    cfg: TrainConfig
    weights: Tensors
    """float32, by the names of the reference's parameters."""
    batches: tuple[Batch, ...]
    """(inputs_BT, targets_BT) for each update of the training rungs; the first one also serves the single passes."""
    seed: int
    moments: tuple[int, dict[str, Tensors]] | None = None
    """The number of updates that an optimizer has made, and its moments "exp_avg" and "exp_avg_sq", to start one more update from."""


def make_problem(
    cfg: TrainConfig,
    weights: Tensors | None = None,
    *,
    moments: tuple[int, dict[str, Tensors]] | None = None,
    seed: int = 0,
    batch: int = 2,
    length: int | None = None,
    steps: int = 5,
) -> Problem:
    """Random tokens for a model, and random weights if it has none.

    Args:
        cfg: the model, and the options of the optimizer.
        weights: its parameters; None: random ones, with nothing at a default that hides a bug (norms and biases are random too).
        moments: of an optimizer, for one more variant of the rung adamw.
        seed: of all that is random.
        batch: rows of a batch.
        length: tokens of a row; None: the context length.
        steps: updates of the training rungs.

    Raises:
        InputError: weights that are not finite, a length beyond the context, or sizes that leave nothing to compare.
    """
    length = cfg.model.context_length if length is None else length
    for name, value, least in (("batch", batch, 1), ("length", length, 1), ("steps", steps, 2)):
        if value < least:
            raise InputError(f"{name}={value}: expected at least {least}")
    if length > cfg.model.context_length:
        raise InputError(f"length={length}: expected at most the model's context_length={cfg.model.context_length}")
    rng = np.random.default_rng(seed)
    weights = random_weights(cfg.model, seed) if weights is None else weights
    check_finite(weights, "the weights")
    windows = rng.integers(0, cfg.model.vocab_size, (steps, batch, length + 1))
    cfg = cfg.replace(seed=seed, fsdp=1, model=cfg.model.replace(dtype="float32"))  # the precision under test is chosen later
    return Problem(cfg, weights, tuple((w[:, :-1].copy(), w[:, 1:].copy()) for w in windows), seed, moments)


def random_weights(cfg: GPTConfig, seed: int) -> Tensors:
    """Weights that keep every layer's output of order 1, with nothing at its default: norms and biases are random too."""
    rng = np.random.default_rng([seed, 1])

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if "emb" in name:
            return rng.normal(size=shape) * shape[1] ** -0.5
        if len(shape) == 2:
            return rng.uniform(-1, 1, shape) * shape[1] ** -0.5
        return name.endswith("scale") + 0.3 * rng.normal(size=shape)

    return {name: draw(name, shape).astype(np.float32) for name, shape in parameter_shapes(cfg).items()}


def climb(ours: Side, theirs: Side, problem: Problem, rungs: Sequence[str] = RUNGS, dtype: str = "float32") -> Iterator[Result]:
    """Climb these rungs, one result each.

    Args:
        ours: flaxgpt.parity.flax_side, or a module with its functions.
        theirs: torch_ref.parity.torch_side, or a module with its functions.
        problem: what both are given.
        rungs: some of RUNGS.
        dtype: the precision under test: "float32", "bfloat16" or "float64".

    Raises:
        InputError: there is no such rung.
    """
    if unknown := [rung for rung in rungs if rung not in RUNGS]:
        raise InputError(f"rungs: {', '.join(unknown)} is none of {', '.join(f'{i} {name}' for i, name in enumerate(RUNGS, 1))}")
    passes = functools.cache(lambda side, dtype: side.passes(problem.cfg.model, problem.weights, problem.batches[0], dtype))
    gradients = functools.cache(lambda: passes(theirs, "float32")["gradients"])
    climbers = {
        "activations": lambda: _measure(ours, theirs, dtype, lambda side, d: passes(side, d)["activations"]),
        "loss": lambda: _measure(ours, theirs, dtype, lambda side, d: passes(side, d)["loss"]),
        "gradients": lambda: _measure(ours, theirs, dtype, lambda side, d: _prefixed(passes(side, d), "backward", "gradients")),
        "clipping": lambda: _clipping(ours, theirs, problem, dtype, gradients()),
        "adamw": lambda: _adamw(ours, theirs, problem, dtype, gradients()),
        "accumulation": lambda: _accumulation(ours, theirs, problem, dtype),
        "training": lambda: _training(ours, theirs, problem, dtype),
        "dropout": lambda: _dropout(ours, theirs, problem, dtype),
        "generation": lambda: _generation(ours, theirs, problem, dtype),
    }
    for rung in rungs:
        started = time.perf_counter()
        if rung in ("clipping", "adamw"):
            gradients()
        if rung not in ("activations", "loss", "gradients"):
            passes.cache_clear()  # at 124M these are gigabytes
        rows = [_bounded(row, rung, dtype) for row in climbers[rung]()]
        yield Result(rung, tuple(rows), time.perf_counter() - started)


Run = Callable[[Side, str], Tensors]


def _measure(ours: Side, theirs: Side, dtype: str, run: Run, start: Tensors | None = None, *, own_gradients: bool = False) -> list[Row]:
    """Run both sides in float64 and in the precision under test; a row for each tensor.

    Args:
        ours: one side.
        theirs: the other.
        dtype: the precision under test.
        run: what to compute.
        start: the parameters before an update; parameters after it are compared by how far they moved.
        own_gradients: the updates were made from each side's own gradients. The one of the key's bias is rounding, of which AdamW
            makes steps of full size, so that parameter is compared in float64 alone.
    """
    truth = run(theirs, "float64")
    scales = _scales(truth, start)
    exact = compare(run(ours, "float64"), truth, scales)
    if dtype == "float64":
        return [Row(name, difference=exact[name], exact=exact[name]) for name in truth]
    reference, record = run(theirs, dtype), run(ours, dtype)
    difference, their_error, our_error = (compare(*pair, scales) for pair in ((record, reference), (reference, truth), (record, truth)))
    rows = [Row(name, difference[name], our_error[name], their_error[name], exact[name]) for name in truth]
    if dtype == "bfloat16":
        per_side = [compare(run(side, "float32"), truth, scales) for side in (ours, theirs)]
        rows = [dataclasses.replace(row, bound=sum(bfloat16_error(errors[row.name]) for errors in per_side)) for row in rows]
    noise = [own_gradients and row.name.startswith("parameter/") and row.name.endswith("W_key.bias") for row in rows]
    return [Row(row.name, None, exact=row.exact) if hides else row for row, hides in zip(rows, noise, strict=True)]


def _scales(truth: Tensors, start: Tensors | None) -> dict[str, float]:
    """What differences are divided by, where that is not the tensor's norm.

    - The gradient of the key's bias is zero, since softmax ignores what all keys have in common: what both sides hold there is
      rounding, measured by the query's bias.
    - A parameter after an update is measured by how far it moved, and a thousandth of its own size: float32 holds no more.
    """
    scales = {}
    for name in truth:
        yardstick = name.replace("W_key.bias", "W_query.bias")
        if start is not None and name.startswith("parameter/"):
            before = start[yardstick.removeprefix("parameter/").split(" ")[0]].astype(np.float64)
            scales[name] = float(np.linalg.norm(truth[yardstick] - before) + 1e-3 * np.linalg.norm(before))
        elif yardstick != name and yardstick in truth:
            scales[name] = float(np.linalg.norm(truth[yardstick].astype(np.float64)))
    return scales


def _clipping(ours: Side, theirs: Side, problem: Problem, dtype: str, gradients: Tensors) -> Iterator[Row]:
    """A limit that the norm exceeds, and one that it doesn't reach."""
    norm = float(np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in gradients.values())))
    for limit in (norm / 2, norm * 2):
        cfg = problem.cfg.replace(clip_norm=limit)
        for row in _measure(ours, theirs, _at_least_float32(dtype), lambda side, d, cfg=cfg: side.clip(gradients, cfg, d)):
            yield dataclasses.replace(row, name=f"{row.name} (limit {limit / norm:g} of the norm)")


MOMENTS = ("exp_avg", "exp_avg_sq")
_VARIANTS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("warm-up, matrices decay", 3, {"decay": "matrices", "warmup_steps": 10, "decay_steps": 100}),
    ("cosine, all decay", 60, {"decay": "all", "warmup_steps": 10, "decay_steps": 100}),
    ("after the cosine, matrices decay", 200, {"decay": "matrices", "warmup_steps": 10, "decay_steps": 100}),
)
_PLAIN = {"learning_rate": 1e-3, "min_learning_rate": 1e-4, "weight_decay": 0.1, "warmup_steps": 2, "decay_steps": 100, "clip_norm": 1.0}
"""Rates at which a parameter moves by more than float32 rounds it, whatever the run's own schedule. The betas and eps are the run's."""


def _adamw(ours: Side, theirs: Side, problem: Problem, dtype: str, gradients: Tensors) -> Iterator[Row]:
    """One update from the same gradients, weights and moments, for every kind of decay and part of the schedule."""
    rng = np.random.default_rng([problem.seed, 2])
    sizes = {name: float(np.sqrt(np.mean(np.square(g, dtype=np.float64)))) for name, g in gradients.items()}
    floor = 1e-3 * max(sizes.values())  # so that squares of gradients that are only rounding don't underflow

    def moment(power: int) -> Tensors:
        return {n: (max(sizes[n], floor) * rng.standard_normal(g.shape, np.float32)) ** power for n, g in gradients.items()}

    def cases() -> Iterator[tuple[str, int, dict[str, Any], dict[str, Tensors]]]:
        zeros = {name: np.zeros_like(g) for name, g in gradients.items()}
        yield "first update, all decay", 0, {"decay": "all", "warmup_steps": 0, "min_learning_rate": None}, dict.fromkeys(MOMENTS, zeros)
        for variant in _VARIANTS:
            yield *variant, {part: moment(power) for power, part in enumerate(MOMENTS, 1)}
        if problem.moments:
            step, given = problem.moments
            yield "the checkpoint's moments", step, {"weight_decay": problem.cfg.weight_decay}, given

    for label, step, options, moments in cases():
        cfg = problem.cfg.replace(**_PLAIN | {"clip_norm": None} | options)

        def run(side: Side, d: str, cfg: TrainConfig = cfg, moments: Any = moments, step: int = step) -> Tensors:
            return side.adamw(cfg, problem.weights, gradients, moments, step, d)

        for row in _measure(ours, theirs, _at_least_float32(dtype), run, problem.weights):
            yield dataclasses.replace(row, name=f"{row.name} ({label})")


def _accumulation(ours: Side, theirs: Side, problem: Problem, dtype: str) -> list[Row]:
    """Two updates, each of two microbatches."""
    cfg = _plain(problem, drop_rate=0.0)
    pairs = zip(problem.batches[0::2], problem.batches[1::2], strict=False)
    batches = [tuple(np.concatenate(sides) for sides in zip(*pair, strict=True)) for pair in itertools.islice(pairs, 2)]
    cfg = cfg.replace(batch_size=2 * cfg.batch_size, grad_accum_steps=2)
    return _measure(
        ours, theirs, dtype, lambda side, d: side.train(cfg, problem.weights, batches, d)[0], problem.weights, own_gradients=True
    )


def _training(ours: Side, theirs: Side, problem: Problem, dtype: str) -> list[Row]:
    """An update for each batch, without dropout."""
    cfg = _plain(problem, drop_rate=0.0)

    def run(side: Side, d: str) -> Tensors:
        return side.train(cfg, problem.weights, problem.batches, d)[0]

    return _measure(ours, theirs, dtype, run, problem.weights, own_gradients=True)


def _dropout(ours: Side, theirs: Side, problem: Problem, dtype: str) -> Iterator[Row]:
    """An update for each batch with dropout, each side once drawing the masks and once replaying the other's."""
    cfg = _plain(problem, problem.cfg.model.drop_rate or 0.1)
    for drawing, whose in ((theirs, "the reference's masks"), (ours, "flaxgpt's masks")):
        drawn, masks = drawing.train(cfg, problem.weights, problem.batches, dtype)

        def run(side: Side, d: str, drawing: Side = drawing, drawn: Tensors = drawn, masks: list[Tensors] = masks) -> Tensors:
            return drawn if (side, d) == (drawing, dtype) else side.train(cfg, problem.weights, problem.batches, d, masks)[0]

        yield from (
            dataclasses.replace(row, name=f"{row.name} ({whose})")
            for row in _measure(ours, theirs, dtype, run, problem.weights, own_gradients=True)
        )
        yield Row(f"chance ({whose})", difference=improbability(masks, 1 - cfg.model.drop_rate))


def improbability(masks: list[Tensors], keep_rate: float) -> float:
    """Largest number of standard deviations by which the masks differ from independent draws.

    Looked at are the share of elements that each mask keeps, and the share at which two masks of one shape, of any layers and of the first
    three updates, agree.
    """
    arrays = [keep for update in masks[:3] for keep in update.values()]
    pairs = [(a, b) for a, b in itertools.combinations(arrays, 2) if a.shape == b.shape]
    shares = [(keep, keep_rate) for keep in arrays]
    shares += [(a == b, keep_rate**2 + (1 - keep_rate) ** 2) for a, b in pairs]
    # Below an expectation of 25 either way, a share is too far from normally distributed.
    shares = [(hits, p) for hits, p in shares if hits.size * min(p, 1 - p) >= 25]
    return max((abs(hits.mean() - p) / np.sqrt(p * (1 - p) / hits.size) for hits, p in shares), default=0.0)


_SAMPLERS = ((0.0, None), (1.0, None), (0.7, 5), (1.5, 40))
"""(temperature, top_k)"""


def _generation(ours: Side, theirs: Side, problem: Problem, dtype: str) -> Iterator[Row]:
    """Text to twice the context, greedy and drawn with the same noise; and draws from logits with many ties.

    Text is made in float32 (in bfloat16 the likeliest token is soon another). The context is cut to the length of the batches.
    """
    prompts = problem.batches[0][0]
    T = prompts.shape[1]
    cfg = problem.cfg.model.replace(context_length=T, drop_rate=0.0)
    weights = problem.weights | {"pos_emb.weight": problem.weights["pos_emb.weight"][:T]}
    start = prompts[:, : max(1, T // 4)]
    noise = ours.noise(problem.seed, (len(prompts), cfg.vocab_size))
    for temperature, top_k in _SAMPLERS:
        options = (cfg, weights, start, 2 * T - start.shape[1], temperature, top_k)
        text, expected = ours.generate(*options, seed=problem.seed), theirs.generate(*options, noise=noise)
        parted = [
            row
            for row, (a, b) in enumerate(zip(text, expected, strict=True))
            if (a != b).any() and not _is_tie(theirs, options, noise, row, a, b)
        ]
        yield Row(f"text, {_sampler(temperature, top_k)}", difference=len(parted) / len(text))
    ties = np.round(np.random.default_rng([problem.seed, 3]).normal(size=(256, 50)) * 2).astype(np.float32) / 2
    for temperature, top_k in _SAMPLERS[1:]:
        ids = ours.draw(ties, temperature, top_k, problem.seed), theirs.draw(ties, temperature, top_k, ours.noise(problem.seed, ties.shape))
        yield Row(f"draws among ties, {_sampler(temperature, top_k)}", difference=float(np.mean(ids[0] != ids[1])))


def _is_tie(theirs: Side, options: tuple, noise: Callable[[int], np.ndarray], row: int, a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two texts part where rounding decides: where the scores of the two tokens are, in truth, within 1e-5 of the largest logit."""
    cfg, weights, start, _, temperature, _ = options
    place = int(np.flatnonzero(a != b)[0])
    window = b[None, max(0, place - cfg.context_length) : place]
    logits = theirs.passes(cfg, weights, (window, window), "float64")["activations"]["logits"][0, -1]
    scores = logits / temperature + noise(place - start.shape[1])[row] if temperature else logits
    return abs(scores[a[place]] - scores[b[place]]) <= 1e-5 * np.abs(logits).max()


def _sampler(temperature: float, top_k: int | None) -> str:
    return f"temperature {temperature:g}" + (f", top-k {top_k}" if top_k else "")


def _at_least_float32(dtype: str) -> str:
    """What gradients are clipped and parameters updated in, in a model of this precision."""
    return "float64" if dtype == "float64" else "float32"


def _plain(problem: Problem, drop_rate: float) -> TrainConfig:
    cfg, rows = problem.cfg, len(problem.batches[0][0])
    return cfg.replace(**_PLAIN, batch_size=rows, grad_accum_steps=1, model=cfg.model.replace(drop_rate=drop_rate))


def _prefixed(record: dict[str, Tensors], *parts: str) -> Tensors:
    return {f"{part}/{name}": value for part in parts for name, value in record[part].items()}


def _bounded(row: Row, rung: str, dtype: str) -> Row:
    kind = f"{rung}/{row.kind}"
    bounds = BOUNDS[kind if kind in BOUNDS else rung]
    bound = bounds.float64 if dtype == "float64" and row.exact is not None else row.bound or bounds.float32
    # A relative bound of 1 or more says nothing: such a tensor is compared in float64 alone.
    difference = row.difference if bound < 1 or row.exact is None else None
    return dataclasses.replace(row, difference=difference, bound=bound, exact_bound=bounds.float64)
