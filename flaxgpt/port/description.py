"""How a difference looks, where no suspect explains it: a factor, a shift, a permutation, one position, noise of some precision."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from flaxgpt.port.suspects import distance, rounded

Look = Callable[[np.ndarray, np.ndarray, float], "str | None"]
"""(reference, port, limit) -> what the difference looks like; None where it looks otherwise. What is within the limit is equal."""

AXES = {1: ("index",), 2: ("row", "feature"), 3: ("row", "position", "feature"), 4: ("row", "head or channel", "position", "key or column")}
"""What the axes of an activation usually are, by their number: (B, T, D), (B, N, T, S) or an image."""


def describe(reference: np.ndarray, port: np.ndarray, noise: float = 1e-9) -> str:
    """One sentence on how port differs from the reference.

    Args:
        reference: an array.
        port: what should be the same.
        noise: what rounding may leave, relative.
    """
    if np.iscomplexobj(reference) or np.iscomplexobj(port):
        if np.shape(reference) == np.shape(port) and distance(port, np.conj(reference)) <= noise:
            return "the port is the reference's complex conjugate"
        reference, port = (np.stack([np.real(x), np.imag(x)], -1) for x in (reference, port))
    a, b = np.asarray(reference, np.float64), np.asarray(port, np.float64)
    if a.shape != b.shape:
        return f"the port's shape is {b.shape}, the reference's is {a.shape}"
    broken = ~np.isfinite(b) & np.isfinite(a)
    if broken.any():
        return f"the port has nan or infinity in {broken.sum()} of {b.size} places{_where(broken)}"
    if (difference := distance(b, a)) == 0:
        return "no difference"
    if b.size == 1:
        return f"the port is {b.item():.6g}, the reference {a.item():.6g}" + (f": {b.item() / a.item():.6g} times" if a.any() else "")
    limit = min(difference / 5, max(noise, min(difference / 1000, 1e-6)))
    looks = (look for kind in LOOKS if (look := kind(a, b, limit)))
    return next(looks, f"no pattern: it differs by {difference:.1e} all over, with a cosine of {_cosine(a, b):.4f}")


def _constant(a: np.ndarray, b: np.ndarray, limit: float) -> str | None:
    if not b.any():
        return "the port is zero everywhere"
    return f"the port is {b.flat[0]:.4g} everywhere" if b.size > 1 and (b == b.flat[0]).all() else None


def _factor(a: np.ndarray, b: np.ndarray, limit: float) -> str | None:
    factor = float((a * b).sum() / ((a * a).sum() or 1))
    if b.size > 1 and distance(factor * a, b) <= limit:
        return f"the port is {factor:.6g} times the reference"
    offset = float((b - a).mean())
    return f"the port is the reference {offset:+.6g}" if b.size > 1 and distance(a + offset, b) <= limit else None


def _moved(a: np.ndarray, b: np.ndarray, limit: float) -> str | None:
    """The same slices in another order, along one axis; or axes exchanged."""
    for order in itertools.permutations(range(a.ndim)):
        if list(order) != sorted(order) and a.transpose(order).shape == b.shape and distance(a.transpose(order), b) <= limit:
            return f"the port is the reference with its axes in the order {order}"
    for axis, size in enumerate(a.shape):
        if size == 1:
            continue
        rows_a, rows_b = (np.moveaxis(x, axis, 0).reshape(size, -1) for x in (a, b))
        for by in (1, -1):
            inner = slice(1, None), slice(None, -1)
            if size > 2 and distance(rows_a[inner[by > 0]], rows_b[inner[by < 0]]) <= limit:
                return f"the port is the reference {abs(by)} {_axis(a, axis)} {'later' if by > 0 else 'earlier'}"
        weights = np.random.default_rng(0).normal(size=rows_a.shape[1])  # rows are sorted by a number that tells them apart
        order = np.empty(size, int)
        order[np.argsort(rows_b @ weights)] = np.argsort(rows_a @ weights)
        if distance(rows_a[order], rows_b) <= limit:
            return f"the port is the reference with its {_axis(a, axis)}s in another order: {_listed(order)}"
    return None


def _along(a: np.ndarray, b: np.ndarray, limit: float) -> str | None:
    """A factor, or something added, for each index of the last axis."""
    others = tuple(range(a.ndim - 1))
    if a.ndim < 2 or np.prod(a.shape[:-1]) < 3:
        return None
    with np.errstate(all="ignore"):
        factors = np.nan_to_num((a * b).sum(others) / (a * a).sum(others))
    if distance(a * factors, b) <= limit:
        return f"each {_axis(a, -1)} has a factor of its own, from {factors.min():.4g} to {factors.max():.4g}"
    offsets = (b - a).mean(others)
    if distance(a + offsets, b) <= limit:
        return f"each {_axis(a, -1)} has a number of its own added to it, from {offsets.min():.4g} to {offsets.max():.4g}: a bias?"
    return None


def _local(largest_share: float) -> Look:
    """Right but for a part of some axes, which is at most so large a share of all."""

    def look(a: np.ndarray, b: np.ndarray, limit: float) -> str | None:
        off = np.abs(b - a) > limit * np.sqrt((a * a).mean())
        part = np.ix_(*(np.flatnonzero(off.any(tuple(i for i in range(a.ndim) if i != axis))) for axis in range(a.ndim)))
        if not (where := _where(off)) or a[part].size > largest_share * a.size:
            return None
        inner = next((found for kind in (_constant, _factor, _moved) if (found := kind(a[part], b[part], limit))), None)
        return f"the port differs{where}" + (f"; there {inner}" if inner else "")

    return look


def _dropped(a: np.ndarray, b: np.ndarray, limit: float) -> str | None:
    kept = (b != 0) | (a == 0)
    factor = _factor(a[kept], b[kept], limit) if 0 < kept.mean() < 1 else None
    return (
        f"the port is zero in {1 - kept.mean():.0%} of all places, and elsewhere {factor.removeprefix('the port ')}: dropout?"
        if factor
        else None
    )


def _precision(a: np.ndarray, b: np.ndarray, limit: float) -> str | None:
    for name, bits in (("bfloat16", 8), ("float16 or TF32", 11), ("float32", 24)):
        if (b == rounded(b, bits)).all() and not (a == rounded(a, bits)).all():
            return f"every number of the port is one of {name}: it was rounded to it, by {distance(b, a):.1e}"
    difference, error = distance(b, a), b - a
    if abs(_cosine(a, error)) > 0.3:
        return None
    for name, bits in (("bfloat16", 8), ("float16 or TF32", 11), ("float32", 24)):
        if 2.0 ** -(bits + 3) <= difference < 2.0 ** -(bits - 2):
            return f"noise of {difference:.1e}, as rounding to {name} makes"
    return None


LOOKS = (_constant, _factor, _moved, _local(1 / 2), _along, _dropped, _local(1), _precision)


def _where(off: np.ndarray) -> str:
    """On which part of the axes something is; empty where that is all of each."""
    parts = []
    for axis, size in enumerate(off.shape):
        hit = np.flatnonzero(off.any(tuple(i for i in range(off.ndim) if i != axis)))
        if len(hit) < size:
            name = _axis(off, axis)
            parts.append(f"{name.replace(' or', 's or') + 's' if len(hit) > 1 else name} {_listed(hit)} (of {size})")
    return ", only in " + ", ".join(parts) if parts else ""


def _axis(x: np.ndarray, axis: int) -> str:
    names = AXES.get(x.ndim)
    return names[axis] if names else f"axis {axis % x.ndim} index"


def _listed(numbers: np.ndarray) -> str:
    numbers = [int(number) for number in numbers]
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / ((np.linalg.norm(a) * np.linalg.norm(b)) or 1))
