"""Arrays that are made, or read from a file, when they are asked for: a check of 100 million parameters holds few of them at a time."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np

T = TypeVar("T")

Kept: TypeAlias = Callable[[], np.ndarray]
"""Gives back an array that was put away."""

Keep: TypeAlias = Callable[[np.ndarray], Kept]
"""Puts an array away."""


LARGE = 2**20
"""Bytes: what is that large lies in a file whenever it can, and is mapped where it is read, so that only its pages in use are in memory."""


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
    """Keep arrays in files of their own in this empty folder, each as long as somebody can ask for it. Large ones are mapped, read-only."""
    numbers = itertools.count()

    def keep(x: np.ndarray) -> Kept:
        path = folder / f"{next(numbers)}.npy"
        np.save(path, x, allow_pickle=False)
        kept = functools.partial(np.load, path, "r" if x.nbytes >= LARGE else None)
        weakref.finalize(kept, path.unlink, missing_ok=True)
        return kept

    return keep


def opened(kept: Mapping[str, Kept]) -> Lazy[np.ndarray]:
    """The arrays that were kept by those names."""
    return Lazy(kept, lambda name: kept[name]())
