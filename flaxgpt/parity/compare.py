"""Comparing what two implementations computed: named arrays in, relative differences and verdicts out. Imports no framework.

A side records what it computes as arrays by the reference's names (`flaxgpt.parity.flax_side`,
`torch_ref.parity.torch_side`). Two records can be compared whatever they come from: two frameworks, two versions of one model, two devices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flaxgpt.errors import InputError

Tensors = dict[str, np.ndarray]
"""Arrays by name, in the order in which they are computed."""


class Bounds(NamedTuple):
    """What a kind of tensor may differ by, and the largest that was measured: a bound is at most ten times that."""

    float32: float
    measured32: float
    float64: float = 0.0
    measured64: float = 0.0


BOUNDS: dict[str, Bounds] = {
    "activations": Bounds(2e-6, 6.3e-7, 1e-14, 2.8e-15),
    "loss": Bounds(2e-6, 2.1e-7, 3e-15, 3.8e-16),
    "gradients": Bounds(7e-5, 1.8e-5, 2e-13, 3.4e-14),
    "clipping": Bounds(3e-6, 3.8e-7, 1e-13, 1.7e-14),
    "adamw/parameter": Bounds(4e-4, 5.3e-5, 7e-13, 9.0e-14),
    "adamw/exp_avg": Bounds(7e-7, 9.8e-8, 1e-15, 1.6e-16),
    "adamw/exp_avg_sq": Bounds(1e-6, 1.3e-7, 1e-15, 2.0e-16),
    "accumulation/loss": Bounds(1e-6, 1.3e-7, 3e-15, 3.0e-16),
    "accumulation/grad_norm": Bounds(2e-6, 2.6e-7, 2e-14, 2.5e-15),
    "accumulation/parameter": Bounds(7e-3, 7.7e-4, 7e-10, 8.5e-11),
    "accumulation/exp_avg": Bounds(9e-5, 1.3e-5, 2e-13, 3.3e-14),
    "accumulation/exp_avg_sq": Bounds(9e-5, 1.3e-5, 2e-13, 3.3e-14),
    "training/loss": Bounds(1e-6, 1.4e-7, 2e-15, 2.7e-16),
    "training/grad_norm": Bounds(3e-6, 4.1e-7, 1e-13, 2.3e-14),
    "training/parameter": Bounds(9e-3, 9.5e-4, 1e-9, 1.1e-10),
    "training/exp_avg": Bounds(9e-5, 1.7e-5, 6e-13, 6.5e-14),
    "training/exp_avg_sq": Bounds(9e-5, 1.4e-5, 6e-13, 6.3e-14),
    "dropout/loss": Bounds(1e-6, 1.4e-7, 3e-15, 3.3e-16),
    "dropout/grad_norm": Bounds(4e-6, 4.4e-7, 1e-13, 2.4e-14),
    "dropout/parameter": Bounds(2e-2, 2.9e-3, 1e-9, 1.4e-10),
    "dropout/exp_avg": Bounds(3e-4, 3.2e-5, 2e-13, 3.1e-14),
    "dropout/exp_avg_sq": Bounds(3e-4, 3.9e-5, 5e-13, 5.6e-14),
    "dropout/chance": Bounds(7.0, 4.5),  # standard deviations: beyond 7 once in 4e11 draws
    "generation/text": Bounds(0.0, 0.0),
    "generation/draws": Bounds(0.0, 0.0),
}
"""By rung and the first word of a row's name. Measured on an x86-64 CPU: the worst of three small configs with 100, 20 and 20 seeds, and
of the 124M reference (there flaxgpt's own error, where that is smaller than the difference: see Row.used)."""


def bfloat16_error(float32_error: float) -> float:
    """The error to expect in bfloat16, from the error in float32 against float64.

    bfloat16 has 8 bits of significand and float32 has 24, so each rounding is 2**16 times as large, and to first order so is what they
    add up to. A float32 error below one rounding, 2**-24, is luck, and counts as one.
    """
    return 2.0**16 * max(float32_error, 2.0**-24)


@dataclass(frozen=True)
class Row:
    """One tensor on both sides. Each figure is a relative norm; None where it was not computed."""

    name: str
    difference: float | None
    """flaxgpt against the reference, in the precision under test."""
    ours: float | None = None
    """flaxgpt's own error: against the truth, the reference in float64."""
    theirs: float | None = None
    """The reference's own error, against the same."""
    exact: float | None = None
    """flaxgpt in float64 against the truth: what is left when rounding is all but gone."""
    bound: float = 0.0
    """Of `difference`."""
    exact_bound: float = 0.0
    """Of `exact`."""

    @property
    def passed(self) -> bool:
        """Both differences are within their bounds, as `used` tells (nan never is)."""
        return self.used <= 1

    @property
    def used(self) -> float:
        """How much of its bound the larger difference uses up: above 1 it fails; inf for nan.

        In the precision under test it is enough to be near the reference or near the truth: flaxgpt does not answer for the reference's
        rounding. (torch adds up a gradient's squares in float32 one after the other, which at 38 million elements is wrong by 2e-4.)
        """
        near = self.difference
        if near is not None and self.ours is not None and not np.isnan(near):
            near = min(near, self.ours)
        pairs = ((near, self.bound), (self.exact, self.exact_bound))
        shares = [value / bound if bound else (0.0 if value == 0 else np.inf) for value, bound in pairs if value is not None]
        return max((np.inf if np.isnan(share) else float(share) for share in shares), default=0.0)

    @property
    def kind(self) -> str:
        """The first word of the name: what BOUNDS has a bound for."""
        return re.match("[a-z_]+", self.name)[0]


@dataclass(frozen=True)
class Result:
    """A rung of the ladder, climbed."""

    rung: str
    rows: tuple[Row, ...]
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Every tensor is within its bounds."""
        return all(row.passed for row in self.rows)

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that are not, in the order of computation: the first is where the sides part."""
        return tuple(row for row in self.rows if not row.passed)

    @property
    def kinds(self) -> list[tuple[Row, ...]]:
        """The rows in groups that share their bounds, where the rung has more than one such kind."""
        if f"{self.rung}/{self.rows[0].kind}" not in BOUNDS:
            return [self.rows]
        names = dict.fromkeys(row.kind for row in self.rows)
        return [tuple(row for row in self.rows if row.kind == name) for name in names]


class Update(NamedTuple):
    """One update of a recorded run, with all that another implementation needs to repeat it."""

    step: int
    batch: tuple[np.ndarray, np.ndarray]
    masks: Tensors
    """What dropout kept, by the names of the reference's dropout modules."""
    loss: float
    grad_norm: float
    evaluation: Evaluation | None
    sample: list[int] | None
    """Token ids, prompt included, decoded greedily after this update."""


class Evaluation(NamedTuple):
    """Losses after an update, dropout off, and the batches they are means over."""

    train_batches: list[tuple[np.ndarray, np.ndarray]]
    val_batches: list[tuple[np.ndarray, np.ndarray]]
    train_loss: float
    val_loss: float


def relative(a: np.ndarray, b: np.ndarray, scale: float | None = None) -> float:
    """||a - b|| / ||b||, or / scale, in float64. 0 for equal arrays, inf if only b is zero, nan if either has one."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
    distance = float(np.linalg.norm((a - b).ravel()))
    if distance == 0:
        return 0.0
    size = float(np.linalg.norm(b.ravel())) if scale is None else scale
    return distance / size if size else float("inf")


def compare(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], scales: Mapping[str, float] | None = None) -> dict[str, float]:
    """Relative difference of each tensor of two records, in the order of b.

    Args:
        a: arrays by name.
        b: what they are measured against.
        scales: what to divide by, for names where that is not ||b||.

    Raises:
        InputError: the records hold other names or shapes than each other.
    """
    faults = [f"{name} is only in one of them" for name in sorted(set(a) ^ set(b))]
    faults += [f"{name} is {a[name].shape} and {b[name].shape}" for name in b if name in a and a[name].shape != b[name].shape]
    if faults:
        raise InputError("the two records can't be compared: " + "; ".join(faults))
    return {name: relative(a[name], b[name], (scales or {}).get(name)) for name in b}


def first_parting(results: Iterable[Result]) -> dict[str, str | None]:
    """The first tensor of the forward pass, and the first of the backward pass, at which the two sides part; None where they don't."""
    failed = {result.rung: [row.name for row in result.failures] for result in results}
    backward = [*failed.get("loss", []), *failed.get("gradients", [])]
    return {"forward": next(iter(failed.get("activations", [])), None), "backward": next(iter(backward), None)}


def check_finite(tensors: Mapping[str, np.ndarray], what: str) -> None:
    """Refuse arrays with nan or inf.

    Raises:
        InputError: naming the first tensor that has one, and where in it.
    """
    bad = {name: ~np.isfinite(array) for name, array in tensors.items() if not np.isfinite(array).all()}
    if bad:
        name, where = next(iter(bad.items()))
        place = tuple(int(i) for i in np.argwhere(where)[0])
        value = tensors[name][place]
        raise InputError(f"{what} are not finite: {len(bad)} of {len(tensors)} tensors, the first {name} with {value} at {list(place)}")
