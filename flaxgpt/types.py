"""Names for what is passed around."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import jax
    import numpy as np

Params: TypeAlias = Mapping[str, "Params | jax.Array | np.ndarray"]
