"""Edits of activations, as data: the same ones change the model of either side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_fields
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from flaxgpt.config import GPTConfig
from flaxgpt.errors import InputError
from flaxgpt.sites import sites_meant

Function = Callable[..., Any]
"""An activation -> what it becomes, of its shape and dtype; an array of JAX or a tensor of torch. Under a name for all blocks it is
also given the number of the block: `function(x, layer)`."""


@dataclass(frozen=True, eq=False)
class Edit:
    """What becomes of an activation, at some positions, in some heads. Made by `replace`, `add`, `scale` and `apply`."""

    change: Literal["replace", "add", "scale"] | Function
    value: ArrayLike | None = None
    """What with; converted to the activation's dtype, broadcast to its shape."""
    positions: int | ArrayLike | None = None
    """Those of the tokens; None: all. Negative ones count from the end of the text, and are unknown while text is generated."""
    heads: int | ArrayLike | None = None
    """None: all."""


Edits = Mapping[str, Edit | Function]
"""Name of a site (`flaxgpt.sites`) -> what becomes of that activation; "trf_blocks.{}.att.out" is that of every block."""


def replace(value: ArrayLike, *, positions: int | ArrayLike | None = None, heads: int | ArrayLike | None = None) -> Edit:
    """The activation becomes this, for instance that of another run."""
    return _edit("replace", value, positions, heads)


def add(value: ArrayLike, *, positions: int | ArrayLike | None = None, heads: int | ArrayLike | None = None) -> Edit:
    """This is added to the activation, for instance a direction to steer by."""
    return _edit("add", value, positions, heads)


def scale(factor: ArrayLike, *, positions: int | ArrayLike | None = None, heads: int | ArrayLike | None = None) -> Edit:
    """The activation is multiplied by this: `scale(0, heads=3)` of "trf_blocks.5.att.context" takes a head away."""
    return _edit("scale", factor, positions, heads)


def apply(function: Function, *, positions: int | ArrayLike | None = None, heads: int | ArrayLike | None = None) -> Edit:
    """The activation becomes what the function makes of it."""
    return _edit(function, None, positions, heads)


def checked_edits(edits: Edits, cfg: GPTConfig, length: int | None) -> dict[str, Edit]:
    """The edits in one form, positions counted from the beginning; of two of one activation, that of its own block is made first.

    Args:
        edits: as a caller gives them.
        cfg: the model.
        length: tokens of the text; None: not known, since it is still being generated.

    Raises:
        InputError: there is no such site, head or position.
    """
    return {name: _checked(name, Edit(edit) if callable(edit) else edit, cfg, length) for name, edit in sorted(edits.items())}


def check_value(name: str, value: ArrayLike, shape: tuple[int, ...]) -> None:
    """Refuse a value that is not of an activation's shape, nor can be broadcast to it.

    Raises:
        InputError: it is.
    """
    with contextlib.suppress(ValueError):
        if np.broadcast_shapes(np.shape(value), shape) == tuple(shape):
            return
    raise InputError(f"the edit of {name} has a value of shape {[*np.shape(value)]}, which can't be broadcast to {[*shape]}")


def check_result(name: str, before: Any, after: Any) -> None:
    """Refuse what an edit has made of an activation if it is no array, or of another shape or dtype.

    Raises:
        InputError: it is.
    """
    if _described(after) != _described(before):
        raise InputError(f"the edit of {name} makes {_described(after)} of {_described(before)}: it must keep shape and dtype")


def _edit(change: Any, value: ArrayLike | None, *places: int | ArrayLike | None) -> Edit:
    """With arrays for lists and ranges, so that JAX, too, takes each of them for one thing."""
    return Edit(change, *(np.asarray(given) if isinstance(given, Sequence) else given for given in (value, *places)))


def _described(x: Any) -> str:
    return f"{x.dtype}{[*x.shape]}" if hasattr(x, "dtype") and hasattr(x, "shape") else type(x).__name__


def _checked(name: str, edit: Edit, cfg: GPTConfig, length: int | None) -> Edit:
    site = sites_meant(name, cfg.n_layers)[0]
    change = getattr(edit, "change", None)
    if not callable(change) and change not in ("replace", "add", "scale"):
        raise InputError(
            f"the edit of {name} is {change or edit!r}: expected a function, or replace, add or scale of a value (flaxgpt.edits)"
        )
    if not callable(change) and edit.value is None:
        raise InputError(f"the edit of {name} has no value to {change} with")
    if edit.heads is not None and not set(site.axes) & set("NE"):
        raise InputError(f"heads={edit.heads}: {name} is not divided into heads; att.query, key, value, weights and context are")
    heads = _whole_numbers("heads", edit.heads)
    if isinstance(heads, np.ndarray) and not ((heads >= 0) & (heads < cfg.n_heads)).all():
        raise InputError(f"heads={edit.heads}: {name} has heads 0 to {cfg.n_heads - 1}")
    return with_fields(edit, positions=_checked_positions(name, edit.positions, cfg, length), heads=heads)


def _checked_positions(name: str, positions: int | ArrayLike | None, cfg: GPTConfig, length: int | None) -> ArrayLike | None:
    given = _whole_numbers("positions", positions)
    if given is None:
        return None
    if not isinstance(given, np.ndarray):
        return given if length is None else given + length * (given < 0)
    if length is None and (given < 0).any():
        raise InputError(f"positions={positions} of {name}: while text is generated its end is unknown, so they count from the beginning")
    end = cfg.context_length if length is None else length
    if (given < -end).any() or (given >= end).any():
        what = f"the context is {end} tokens long" if length is None else f"the text has {end} tokens"
        raise InputError(f"positions={positions} of {name}: {what}, so they go from 0 to {end - 1}")
    return np.where(given < 0, given + end, given)


def _whole_numbers(what: str, given: int | ArrayLike | None) -> ArrayLike | None:
    """As an array; None and what JAX is tracing, whose values are not known yet, as they are."""
    if given is None:
        return None
    try:
        numbers = np.atleast_1d(np.asarray(given))
    except TypeError:  # JAX's, which has no values yet
        return given
    numbers = numbers if numbers.size else numbers.astype(int)
    if not np.issubdtype(numbers.dtype, np.integer) or numbers.ndim != 1:
        raise InputError(f"{what}={given}: expected whole numbers")
    return numbers
