"""Looking into a function in JAX: `tap(name, x)` is x, and, while something records, a place that it sees.

A pass is traced with `jax.disable_jit`, where scans are Python loops: so there is one trace, whose values can be collected and returned.
A tap is an identity whose backward rule collects the gradient that goes through it.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxgpt.errors import InputError
from flaxgpt.port.recorder import Take, kind_of, taken, taker


def tap(name: str, x: jax.Array) -> jax.Array:
    """The array itself, recorded by that name if `FunctionRecorder` is recording; outside of that, nothing.

    Args:
        name: what to call it. "{}" in it becomes the number of the call, from 0: that of the layer, in a scan over layers.
        x: any array.
    """
    tape = _TAPE.get()
    return x if tape is None or not tape.sees(x) else tape.watched(tape.numbered(name), x)


@dataclass
class Tape:
    """What is seen in a pass, while it is traced."""

    anchor: jax.Array
    """Any value of the trace."""
    take: Take
    only: tuple[str, tuple[np.ndarray, ...]] | None = None
    """A module, and inputs that it is to be given."""
    outputs: dict[str, jax.Array] = field(default_factory=dict)
    inputs: dict[str, tuple[jax.Array, ...]] = field(default_factory=dict)
    gradients: dict[str, jax.Array] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)
    calls: collections.Counter = field(default_factory=collections.Counter)

    def sees(self, structure: Any) -> bool:
        """Whether all arrays in it are of this trace.

        Those in a function that is traced once more by itself are not: in the body of Flax's scan before it is run, under vmap.
        """
        values = (jax.lax.stop_gradient(x) for x in jax.tree.leaves(structure) if _is_array(x))
        return all(getattr(x, "_trace", None) in (None, self.anchor._trace) for x in values)

    def called(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module of that name, and write down what goes into it and comes out."""
        leaves, treedef = jax.tree.flatten((args, kwargs))
        arrays = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
        self.inputs[name] = tuple(jax.lax.stop_gradient(leaves[i]) for i in arrays)
        if self.only and self.only[0] == name:
            given = [*self.only[1]]
            for i in arrays:
                match = next((k for k, x in enumerate(given) if x.shape == leaves[i].shape), None)
                if match is not None:
                    leaves[i] = jnp.asarray(given.pop(match), leaves[i].dtype)
            args, kwargs = treedef.unflatten(leaves)
        return self._watched_element(name, call(*args, **kwargs))

    def watched(self, name: str, x: jax.Array) -> jax.Array:
        """The array, written down with the gradient with respect to it."""
        self.outputs[name] = jax.lax.stop_gradient(x)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x

        @jax.custom_vjp
        def identity(x: jax.Array) -> jax.Array:
            return x

        def backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
            self.gradients[name] = gradient.conj()  # torch's convention; the same array where it is real
            return (gradient,)

        identity.defvjp(lambda x: (x, None), backward)
        return identity(x)

    def numbered(self, name: str) -> str:
        """The name of this call of it: with its number for {}, or, from the second on, behind @."""
        call = self.calls[name]
        self.calls[name] += 1
        if "{}" in name:
            return name.replace("{}", str(call), 1)
        return f"{name}@{call}" if call else name

    def _watched_element(self, name: str, result: Any) -> Any:
        leaves, treedef = jax.tree.flatten(result)
        how = taker(name, self.take)
        wanted = next(filter(_is_array, leaves), None) if how is None else taken(name, result, how)
        place = next((i for i, leaf in enumerate(leaves) if leaf is wanted), None)
        if wanted is None or place is None:
            if how is not None:
                raise InputError(f"take: element {how!r} of what {name} returns is no array of it: it is {kind_of(wanted)}")
            self.unusable[name] = kind_of(result)
            return result
        leaves[place] = self.watched(name, wanted)
        return treedef.unflatten(leaves)


@contextlib.contextmanager
def recording(tape: Tape) -> Iterator[None]:
    """Within it, taps write to the tape."""
    token = _TAPE.set(tape)
    try:
        yield
    finally:
        _TAPE.reset(token)


def to_numpy(x: jax.Array) -> np.ndarray:
    """On the host; bfloat16 as float32."""
    array = np.asarray(x)
    return array.astype(np.float32) if array.dtype == jnp.bfloat16 else array


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray) and not jnp.issubdtype(x.dtype, jax.dtypes.extended)


_TAPE: ContextVar[Tape | None] = ContextVar("tape", default=None)
