"""Changing the layout of an array: its axes merged, split, in another order. An arrangement can be undone."""

from __future__ import annotations

import math
import re

import numpy as np

from flaxgpt.errors import InputError


def arranged(x: np.ndarray, pattern: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array in another layout.

    Args:
        x: any array.
        pattern: "(n h) d -> d n h": names of the axes of x, and the same names in their new order. Those in parentheses are one axis.
        shape: of the result; where an axis of x is split, it says into what.

    Raises:
        InputError: the pattern does not fit x or the shape.
    """
    sides = [_groups(side) for side in pattern.split("->")]
    names = [[axis for group in side for axis in group] for side in sides]
    if len(names) != 2 or sorted(names[0]) != sorted(names[1]) or len(set(names[0])) < len(names[0]):
        raise InputError(
            f'"{pattern}" is no arrangement: expected the same names, each once, on both sides of ->, as in "(n h) d -> d n h"'
        )
    both = list(zip(sides, (x.shape, shape), strict=True))
    sizes: dict[str, int] = {}
    known = -1
    while len(sizes) > known:
        known = len(sizes)
        for groups, dims in both:
            for group, size in zip(groups, dims, strict=False):
                unknown = [axis for axis in group if axis not in sizes]
                if len(unknown) == 1:
                    sizes[unknown[0]] = size // max(1, math.prod(sizes[axis] for axis in group if axis in sizes))
    fits = len(sizes) == len(names[0])
    if not fits or any(tuple(math.prod(sizes[axis] for axis in group) for group in groups) != tuple(dims) for groups, dims in both):
        raise InputError(f'"{pattern}" does not make {list(shape)} of {list(x.shape)}')
    axes = x.reshape([sizes[axis] for axis in names[0]])
    return axes.transpose([names[0].index(axis) for axis in names[1]]).reshape(shape)


def undone(pattern: str) -> str:
    """The pattern of the way back."""
    left, _, right = pattern.partition("->")
    return f"{right.strip()} -> {left.strip()}"


def regrouped(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether one shape is the other with neighbouring axes merged, so that a reshape is all it takes. (An axis of 1 is no axis.)"""
    fewer, more = sorted(([s for s in a if s != 1], [s for s in b if s != 1]), key=len)
    i = 0
    for size in fewer:
        product = 1
        while product < size and i < len(more):
            product, i = product * more[i], i + 1
        if product != size:
            return False
    return i == len(more)


def _groups(side: str) -> list[list[str]]:
    return [part.strip("()").split() for part in re.findall(r"\([^()]*\)|[^\s()]+", side)]
