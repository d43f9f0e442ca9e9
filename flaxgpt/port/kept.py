"""Arrays that are made, or read from a file, when they are asked for: a check of 100 million parameters holds few of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np

T = TypeVar("T")

Kept: TypeAlias = Callable[[], np.ndarray]
"""Gives back an array that was put away."""

Keep: TypeAlias = Callable[[np.ndarray], Kept]
"""Puts an array away."""


class Lazy(Mapping[str, T]):
    """Values by name, each made when it is asked for."""

    def __init__(self, names: Iterable[str], make: Callable[[str], T]) -> None:
        self.names, self.make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> T:
        if name not in self.names:
            raise KeyError(name)
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def in_memory(x: np.ndarray) -> Kept:
    """Keep an array as it is."""
    return lambda: x


def in_files(folder: Path) -> Keep:
    """Keep arrays in files of their own in this empty folder."""
    count = 0

    def keep(x: np.ndarray) -> Kept:
        nonlocal count
        path = folder / f"{count}.npy"
        count += 1
        np.save(path, x, allow_pickle=False)
        return lambda: np.load(path, allow_pickle=False)

    return keep


def opened(kept: Mapping[str, Kept]) -> Lazy[np.ndarray]:
    """The arrays that were kept by those names."""
    return Lazy(kept, lambda name: kept[name]())
