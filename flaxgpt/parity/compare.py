"""Comparing what two implementations computed: named arrays in, relative differences and verdicts out.

A side records what it computes as arrays by the reference's names (see `flaxgpt.parity.side`). Two records can be compared
whatever they come from: two frameworks, two versions of one model, two devices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from flaxgpt.errors import InputError


@dataclass(frozen=True)
class Measurement:
    """How one tensor of both sides compares. Each figure is a relative norm; None where it was not computed."""

    name: str
    difference: float | None
    """flaxgpt against the reference, in the precision under test."""
    error_flaxgpt: float | None = None
    """flaxgpt's own error: against the truth, the reference in float64."""
    error_reference: float | None = None
    """The reference's own error, against the same."""
    exact: float | None = None
    """flaxgpt in float64 against the truth: what is left when rounding is all but gone."""
    bound: float = 0.0
    """Of `difference`."""
    exact_bound: float = 0.0
    """Of `exact`."""

    @property
    def passed(self) -> bool:
        """Both differences are within their bounds (nan never is)."""
        return self.share_of_bound <= 1

    @property
    def share_of_bound(self) -> float:
        """The difference over its bound, of the two that is larger: above 1 it fails; inf for nan.

        In the precision under test it is enough to be near the reference or near the truth: flaxgpt does not answer for the reference's
        rounding. (torch adds up a gradient's squares in float32 one after the other, which at 38 million elements is wrong by 2e-4.)
        """
        near = self.difference
        if near is not None and self.error_flaxgpt is not None and not np.isnan(near):
            near = min(near, self.error_flaxgpt)
        pairs = ((near, self.bound), (self.exact, self.exact_bound))
        return max((share(value, bound) for value, bound in pairs if value is not None), default=0.0)

    @property
    def kind(self) -> str:
        """The first word of the name: the kind of tensor, which BOUNDS has a bound for."""
        return re.match("[a-z_]*", self.name)[0]


@dataclass(frozen=True)
class Result:
    """What a rung of the ladder measured."""

    rung: str
    rows: tuple[Measurement, ...]
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Every tensor is within its bounds."""
        return all(row.passed for row in self.rows)

    @property
    def failures(self) -> tuple[Measurement, ...]:
        """The rows that are not, in the order of computation: the first is where the sides diverge."""
        return tuple(row for row in self.rows if not row.passed)


def share(value: float, bound: float) -> float:
    """A difference over its bound; inf for nan, and for any difference where none is allowed."""
    if np.isnan(value):
        return np.inf
    return float(value / bound) if bound else (0.0 if value == 0 else np.inf)


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


def first_divergence(results: Iterable[Result]) -> dict[str, str | None]:
    """The first tensor of the "forward" and of the "backward" pass at which the two sides diverge; None where they don't."""
    failed = {result.rung: [row.name for row in result.failures] for result in results}
    backward = [*failed.get("loss", []), *failed.get("gradients", [])]
    return {"forward": next(iter(failed.get("activations", [])), None), "backward": next(iter(backward), None)}
