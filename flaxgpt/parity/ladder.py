"""The ladder of comparisons, from the first activation to generated text.

Each rung runs both sides in the precision under test and in float64. The reference in float64 is the truth: so each side's own
error is known, and flaxgpt in float64 shows what is left of a difference when rounding is gone.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from flaxgpt.config import GPTConfig, TrainConfig
from flaxgpt.edits import Edit, Edits, add, replace, scale
from flaxgpt.errors import InputError
from flaxgpt.parity.bounds import BOUNDS, bfloat16_error
from flaxgpt.parity.compare import Measurement, Result, compare
from flaxgpt.parity.problem import Problem
from flaxgpt.parity.side import Moments, NoiseDrivenSide, SeededSide, Side, Tensors
from flaxgpt.parity.text_rung import measure_draws, measure_text
from flaxgpt.sites import sites_meant

RUNGS = ("activations", "loss", "gradients", "clipping", "adamw", "accumulation", "training", "dropout", "generation", "edits")
"""In order, the methods of Ladder; rung n of the report is the n-th, from 1."""


def climb(
    ours: SeededSide, theirs: NoiseDrivenSide, problem: Problem, rungs: Sequence[str] = RUNGS, dtype: str = "float32"
) -> Iterator[Result]:
    """Climb these rungs, one result each.

    Args:
        ours: `flaxgpt.parity.flax_side`, or what stands in for it.
        theirs: the reference: a `torch_ref.parity.torch_side.TorchSide`, or what stands in for it.
        problem: what both are given.
        rungs: some of RUNGS, by name or number.
        dtype: the precision under test: "float32", "bfloat16" or "float64".

    Raises:
        InputError: there is no such rung.
    """
    ladder = Ladder(ours, theirs, problem, dtype)
    for rung in select_rungs(rungs):
        started = time.perf_counter()
        rows = tuple(_bounded(row, rung, dtype) for row in getattr(ladder, rung)())
        yield Result(rung, rows, time.perf_counter() - started)


def select_rungs(wanted: Sequence[str]) -> list[str]:
    """The rungs with these names or numbers, in their order.

    Raises:
        InputError: there is no such rung.
    """
    by_number = {str(i): name for i, name in enumerate(RUNGS, 1)}
    names = [by_number.get(rung, rung) for rung in wanted]
    if unknown := [name for name in names if name not in RUNGS]:
        raise InputError(f"rungs: {', '.join(unknown)} is none of {', '.join(f'{i} {name}' for i, name in by_number.items())}")
    return [rung for rung in RUNGS if rung in names]


class Ladder:
    """Two sides, and what they are given; each method is a rung, and measures the tensors that it compares."""

    def __init__(self, ours: SeededSide, theirs: NoiseDrivenSide, problem: Problem, dtype: str) -> None:
        self.ours, self.theirs, self.problem, self.dtype = ours, theirs, problem, dtype

    def activations(self) -> Iterable[Measurement]:
        """Every activation of the forward pass."""
        return self._of_pass("activations")

    def loss(self) -> Iterable[Measurement]:
        """Nats per token."""
        return self._of_pass("loss")

    def gradients(self) -> Iterable[Measurement]:
        """With respect to every activation, the last one first, and to every parameter."""
        return self._of_pass("gradients")

    def clipping(self) -> Iterable[Measurement]:
        """A limit that the norm of the gradients exceeds, and one that it doesn't reach."""
        for share in (0.5, 2.0):
            yield from _labelled(self._clipped(share), f"limit {share:g} of the norm")

    def adamw(self) -> Iterable[Measurement]:
        """One update from the same gradients, weights and moments, for every kind of decay and part of the schedule."""
        for label, step, options, moments in self._optimizers():
            yield from _labelled(self._updated(step, options, moments), label)

    def accumulation(self) -> Iterable[Measurement]:
        """Two updates, each of two microbatches."""
        pairs = itertools.islice(zip(self.problem.batches[0::2], self.problem.batches[1::2], strict=False), 2)
        batches = [tuple(np.concatenate(parts) for parts in zip(*pair, strict=True)) for pair in pairs]
        cfg = self._training_config(drop_rate=0.0)
        cfg = cfg.replace(batch_size=2 * cfg.batch_size, grad_accum_steps=2)
        return self._measure_training(lambda side, dtype: side.train(cfg, self.problem.weights, batches, dtype)[0])

    def training(self) -> Iterable[Measurement]:
        """An update for each batch, without dropout."""
        cfg = self._training_config(drop_rate=0.0)
        return self._measure_training(lambda side, dtype: side.train(cfg, self.problem.weights, self.problem.batches, dtype)[0])

    def dropout(self) -> Iterable[Measurement]:
        """An update for each batch with dropout, each side once drawing the masks and once replaying the other's."""
        yield from _labelled(self._replayed(self.theirs), "the reference's masks")
        yield from _labelled(self._replayed(self.ours), "flaxgpt's masks")

    def generation(self) -> Iterable[Measurement]:
        """Text to twice the context, greedy and drawn with the same noise; and draws from logits with many ties."""
        yield from measure_text(self.ours, self.theirs, self.problem)
        yield from measure_draws(self.ours, self.theirs, self.problem.seed)

    def edits(self) -> Iterable[Measurement]:
        """A pass, forward and backward, in which every activation that can be is edited; and one when the edits are gone."""
        cfg, weights, batch = self.problem.cfg.model, self.problem.weights, self.problem.batches[0]
        names = [name for name in self.ours.editable(cfg) if name in self.theirs.editable(cfg)]
        edits = random_edits(cfg, names, batch[0].shape[1], self.problem.seed)
        return self._measure(lambda side, dtype: side.edited(cfg, weights, batch, edits, dtype), _at_least_float32(self.dtype))

    def _of_pass(self, rung: str) -> list[Measurement]:
        rows = self._pass[rung]
        if isinstance(rows, InputError):
            raise rows
        return rows

    @functools.cached_property
    def _pass(self) -> dict[str, list[Measurement] | InputError]:
        """Of one forward and backward pass, for rungs 1 to 3: at 124M its tensors are gigabytes, so only what was measured is kept.

        A rung that can't be compared has the reason in place of its rows: the other rungs can.
        """
        given = self.problem.cfg.model, self.problem.weights, self.problem.batches[0]
        passes = functools.cache(lambda side, dtype: side.passes(*given, dtype))

        def tensors(rung: str, side: Side, dtype: str) -> Tensors:
            parts = passes(side, dtype)
            if rung != "gradients":
                return parts[rung]
            return {f"{part}/{name}": array for part in ("backward", "gradients") for name, array in parts[part].items()}

        def measure(rung: str) -> list[Measurement] | InputError:
            try:
                return self._measure(functools.partial(tensors, rung), self.dtype)
            except InputError as error:
                return error.with_traceback(None)  # which would hold the tensors

        return {rung: measure(rung) for rung in ("activations", "loss", "gradients")}

    @functools.cached_property
    def _given_gradients(self) -> Tensors:
        """What both sides clip and update with, on rungs 4 and 5: the reference's."""
        return self.theirs.passes(self.problem.cfg.model, self.problem.weights, self.problem.batches[0], "float32")["gradients"]

    def _clipped(self, share: float) -> list[Measurement]:
        norm = float(np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in self._given_gradients.values())))
        cfg = self.problem.cfg.replace(clip_norm=share * norm)
        return self._measure(lambda side, dtype: side.clip(self._given_gradients, cfg, dtype), _at_least_float32(self.dtype))

    def _optimizers(self) -> Iterator[tuple[str, int, dict[str, Any], Moments]]:
        """What an update starts from: its name, the number of updates made, options, moments."""
        gradients, rng = self._given_gradients, np.random.default_rng([self.problem.seed, 2])
        sizes = {name: float(np.sqrt(np.mean(np.square(g, dtype=np.float64)))) for name, g in gradients.items()}
        floor = 1e-3 * max(sizes.values())  # so that squares of gradients that are only rounding don't underflow

        def moment(power: int) -> Tensors:
            return {n: (max(sizes[n], floor) * rng.standard_normal(g.shape, np.float32)) ** power for n, g in gradients.items()}

        zeros = {name: np.zeros_like(g) for name, g in gradients.items()}
        options = {"decay": "all", "warmup_steps": 0, "min_learning_rate": None}
        yield "first update, all decay", 0, options, {"exp_avg": zeros, "exp_avg_sq": zeros}
        for variant in _VARIANTS:
            yield *variant, {"exp_avg": moment(1), "exp_avg_sq": moment(2)}
        if self.problem.moments:
            step, moments = self.problem.moments
            yield "the checkpoint's moments", step, {"weight_decay": self.problem.cfg.weight_decay}, moments

    def _updated(self, step: int, options: dict[str, Any], moments: Moments) -> list[Measurement]:
        cfg, weights = self.problem.cfg.replace(**_PLAIN | {"clip_norm": None} | options), self.problem.weights

        def compute(side: Side, dtype: str) -> Tensors:
            return side.adamw(cfg, weights, self._given_gradients, moments, step, dtype)

        return self._measure(compute, _at_least_float32(self.dtype), start=weights)

    def _training_config(self, drop_rate: float) -> TrainConfig:
        cfg, rows = self.problem.cfg, len(self.problem.batches[0][0])
        return cfg.replace(**_PLAIN, batch_size=rows, grad_accum_steps=1, model=cfg.model.replace(drop_rate=drop_rate))

    def _replayed(self, drawing: Side) -> Iterator[Measurement]:
        """Training with the masks that one side draws, and how likely those are."""
        cfg = self._training_config(self.problem.cfg.model.drop_rate or 0.1)
        drawn, masks = drawing.train(cfg, self.problem.weights, self.problem.batches, self.dtype)

        def compute(side: Side, dtype: str) -> Tensors:
            if (side, dtype) == (drawing, self.dtype):
                return drawn
            return side.train(cfg, self.problem.weights, self.problem.batches, dtype, masks)[0]

        yield from self._measure_training(compute)
        yield Measurement("chance", difference=max_z_score(masks, 1 - cfg.model.drop_rate))

    def _measure_training(self, compute: Computation) -> list[Measurement]:
        """Measure updates that each side made from its own gradients.

        The gradient of the key's bias is rounding, of which AdamW makes steps of full size: that parameter is compared in float64 alone.
        """
        rows = self._measure(compute, self.dtype, start=self.problem.weights)
        if self.dtype == "float64":
            return rows
        key_bias = re.compile(r"parameter/.*W_key\.bias")
        return [Measurement(row.name, None, exact=row.exact) if key_bias.fullmatch(row.name) else row for row in rows]

    def _measure(self, compute: Computation, dtype: str, start: Tensors | None = None) -> list[Measurement]:
        """Run both sides in float64 and in the precision under test, and measure each tensor.

        Args:
            compute: what to run.
            dtype: the precision under test.
            start: the parameters before an update; parameters after it are compared by how far they moved.
        """
        truth = compute(self.theirs, "float64")
        scales = _scales(truth, start)
        exact = compare(compute(self.ours, "float64"), truth, scales)
        if dtype == "float64":
            return [Measurement(name, difference=exact[name], exact=exact[name]) for name in truth]
        theirs, ours = compute(self.theirs, dtype), compute(self.ours, dtype)
        difference, error_reference, error_flaxgpt = (compare(*pair, scales) for pair in ((ours, theirs), (theirs, truth), (ours, truth)))
        rows = [Measurement(name, difference[name], error_flaxgpt[name], error_reference[name], exact[name]) for name in truth]
        if dtype == "bfloat16":
            per_side = [compare(compute(side, "float32"), truth, scales) for side in (self.ours, self.theirs)]
            rows = [dataclasses.replace(row, bound=sum(bfloat16_error(errors[row.name]) for errors in per_side)) for row in rows]
        return rows


Computation = Callable[[Side, str], Tensors]
"""Something that a side computes in a precision."""

_PLAIN = {"learning_rate": 1e-3, "min_learning_rate": 1e-4, "weight_decay": 0.1, "warmup_steps": 2, "decay_steps": 100, "clip_norm": 1.0}
"""Rates at which a parameter moves by more than float32 rounds it, whatever the run's own schedule. The betas and eps are the run's."""

_VARIANTS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("warm-up, matrices decay", 3, {"decay": "matrices", "warmup_steps": 10, "decay_steps": 100}),
    ("cosine, all decay", 60, {"decay": "all", "warmup_steps": 10, "decay_steps": 100}),
    ("after the cosine, matrices decay", 200, {"decay": "matrices", "warmup_steps": 10, "decay_steps": 100}),
)


def random_edits(cfg: GPTConfig, names: Sequence[str], length: int, seed: int) -> Edits:
    """For each of these sites another kind of edit in turn, of random size, at some positions and in some heads, where it has any."""
    rng = np.random.default_rng([seed, 3])
    width = {"D": cfg.emb_dim, "E": cfg.emb_dim, "F": 4 * cfg.emb_dim, "V": cfg.vocab_size, "S": 1}
    kinds = itertools.cycle((scale, add, replace))

    def draw(name: str, kind: Callable[..., Edit]) -> Edit:
        (site,) = sites_meant(name, cfg.n_layers)
        value = rng.normal(size=width[site.axes[-1]]).astype(np.float32)
        positions = rng.choice(length, size=max(1, length // 3), replace=False)
        heads = rng.choice(cfg.n_heads, size=max(1, cfg.n_heads // 2), replace=False) if set(site.axes) & set("NE") else None
        return kind(value, positions=positions, heads=heads)

    return {name: draw(name, kind) for name, kind in zip(names, kinds, strict=False)}


def max_z_score(masks: Sequence[Tensors], keep_rate: float) -> float:
    """Largest number of standard deviations by which dropout masks differ from independent draws.

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
            before = start[yardstick.removeprefix("parameter/")].astype(np.float64)
            scales[name] = float(np.linalg.norm(truth[yardstick] - before) + 1e-3 * np.linalg.norm(before))
        elif yardstick != name and yardstick in truth:
            scales[name] = float(np.linalg.norm(truth[yardstick].astype(np.float64)))
    return scales


def _labelled(rows: Iterable[Measurement], label: str) -> Iterator[Measurement]:
    return (dataclasses.replace(row, name=f"{row.name} ({label})") for row in rows)


def _at_least_float32(dtype: str) -> str:
    """What gradients are clipped and parameters updated in, in a model of this precision."""
    return "float64" if dtype == "float64" else "float32"


def _bounded(row: Measurement, rung: str, dtype: str) -> Measurement:
    kind = f"{rung}/{row.kind}"
    bounds = BOUNDS[kind if kind in BOUNDS else rung]
    bound = bounds.float64 if dtype == "float64" and row.exact is not None else row.bound or bounds.float32
    # A relative bound of 1 or more implies nothing: such a tensor is compared in float64 alone.
    difference = row.difference if bound < 1 or row.exact is None else None
    return dataclasses.replace(row, difference=difference, bound=bound, exact_bound=bounds.float64)
