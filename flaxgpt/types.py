"""Names for what is passed around."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    import jax
    import numpy as np

Index: TypeAlias = "slice | tuple[slice, ...]"


class Indexable(Protocol):
    """An array, of whatever kind, or something that is read where it is indexed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        ...

    def __getitem__(self, index: Index) -> Indexable:
        """A part of it; `()` is all of it."""
        ...


Params: TypeAlias = "Mapping[str, Params | tuple[Params, ...] | jax.Array | np.ndarray]"
"""The model's parameters, or anything shaped like them: nested dicts of arrays, those of the blocks stacked along a leading L axis
(or, as `flaxgpt.generation.decode.unstack` returns them, a tuple of the blocks)."""

Batch: TypeAlias = "tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]"
"""inputs_BT and targets_BT, int32; the targets are the inputs one token later."""
