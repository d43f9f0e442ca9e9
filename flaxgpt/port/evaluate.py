"""Running a function in JAX piece by piece.

XLA takes longer to compile a pass with all its activations as results the deeper the model is. So a program is cut into pieces of some
operations each; pieces that are equal, as those of equal layers are, are compiled once. And nothing is held that is no longer needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal, Var

from flaxgpt.port.kept import LARGE, Keep, Kept
from flaxgpt.port.tap import to_numpy

Tree = Any
"""A pytree; its leaves are said where it is used."""

LENGTH = 32
"""A piece ends with the first product of matrices, or the first result, after so many operations: so equal layers are cut at equal places.
One operation alone takes 40 ms to compile, and each that is added 3 ms."""

QUICK = {"xla_backend_optimization_level": 0}
"""A piece is run for some layers only: of GPT-2 with two layers, a pass is compiled in 2.8 s in place of 4.5 s."""

VIEWS = {"convert_element_type", "copy", "reshape", "slice", "squeeze", "transpose"}
"""What only shows an input in another precision or layout is computed in each piece that needs it: so there is no second copy of all."""


class Program:
    """A function that is traced once, to be run any number of times."""

    def __init__(self, function: Callable[..., Tree], *shapes: Tree, apart: bool = False) -> None:
        """Trace it, and cut it into pieces.

        Args:
            function: of trees of arrays.
            *shapes: those trees, of `jax.ShapeDtypeStruct`.
            apart: compute one result after the other, and end a piece where a large one is there or a large array has been
                summed up: an update, one parameter at a time.
        """
        closed, result = jax.make_jaxpr(function, return_shape=True)(*shapes)
        self.jaxpr, self.structure = closed.jaxpr, jax.tree.structure(result)
        self.consts = dict(zip(self.jaxpr.constvars, closed.consts, strict=True))
        results = [v for v in self.jaxpr.outvars if isinstance(v, Var)]

        def at_product(eqn: JaxprEqn, length: int) -> bool:
            return length >= LENGTH and (eqn.primitive.name == "dot_general" or any(v in results for v in eqn.outvars))

        def at_large(eqn: JaxprEqn, length: int) -> bool:
            if any(map(_large, eqn.outvars)):
                return any(v in results for v in eqn.outvars)
            return any(map(_large, eqn.invars))

        eqns = (_one_by_one if apart else _needed)(self.jaxpr.eqns, results)
        self.pieces = _pieces(eqns, self.jaxpr.invars, results, at_large if apart else at_product)

    def __call__(self, *inputs: Tree, keep: Keep) -> Tree:
        """Run it.

        Args:
            *inputs: the function's arguments; each leaf is asked for its array whenever that is needed.
            keep: takes each result as soon as it is there, and whatever is large.

        Returns:
            The function's result, of what `keep` has made of each array.
        """
        sources: dict[Var, Kept] = dict(zip(self.jaxpr.invars, jax.tree.leaves(inputs), strict=True))
        values: dict[Var, jax.Array] = {**self.consts}
        results = {v for v in self.jaxpr.outvars if isinstance(v, Var)}
        kept: dict[Var, Kept] = {}

        def read(v: Var) -> jax.Array:
            return values[v] if v in values else jnp.asarray(sources[v](), v.aval.dtype)

        def run(piece: Piece) -> None:
            # Nothing is queued: what waits to be run holds what it is to be run on.
            for v, x in zip(piece.makes, jax.block_until_ready(piece.function(*map(read, piece.reads))), strict=True):
                if v in results or x.nbytes >= LARGE:
                    sources[v] = _put_away(x, keep)
                if v in results:
                    kept[v] = sources[v]
                if x.nbytes < LARGE:
                    values[v] = x

        for piece in self.pieces:
            run(piece)
            for v in piece.dead:
                values.pop(v, None)
                if v not in results:
                    sources.pop(v, None)
        for v in results - kept.keys():
            kept[v] = keep(to_numpy(read(v)))
        return jax.tree.unflatten(
            self.structure, [keep(np.asarray(v.val)) if isinstance(v, Literal) else kept[v] for v in self.jaxpr.outvars]
        )


def _large(v: Var | Literal) -> bool:
    return v.aval.size * v.aval.dtype.itemsize >= LARGE


def _put_away(x: jax.Array, keep: Keep) -> Kept:
    return (lambda: x) if jnp.issubdtype(x.dtype, jax.dtypes.extended) else keep(to_numpy(x))


@dataclass(frozen=True)
class Piece:
    """Some operations that follow one another."""

    function: Callable[..., list[jax.Array]]
    reads: tuple[Var, ...]
    """Its arguments."""
    makes: tuple[Var, ...]
    """What it returns: what comes later needs it, or it is a result."""
    dead: tuple[Var, ...]
    """What nothing after it needs."""


class Operation(NamedTuple):
    """One operation of a piece. Those of equal pieces are equal."""

    primitive: Any
    params: tuple[tuple[str, Any], ...]
    inputs: tuple[int | Constant, ...]
    """Numbers of values, those of the piece's arguments first, or constants."""


@dataclass(frozen=True)
class Constant:
    """A number in a program."""

    bits: bytes
    """0.0 and -0.0 are equal, and are not the same."""
    type: str
    value: Any = field(compare=False)


def _pieces(eqns: Sequence[JaxprEqn], inputs: Sequence[Var], results: Sequence[Var], ends: Callable[[JaxprEqn, int], bool]) -> list[Piece]:
    shown = {*inputs}
    views: dict[Var, JaxprEqn] = {}
    for eqn in eqns:
        if eqn.primitive.name in VIEWS and isinstance(eqn.invars[0], Var) and eqn.invars[0] in shown and eqn.outvars[0] not in results:
            views[eqn.outvars[0]] = eqn
            shown.add(eqn.outvars[0])
    groups: list[list[JaxprEqn]] = [[]]
    for eqn in eqns:
        if eqn.outvars[0] in views:
            continue
        groups[-1].append(eqn)
        if ends(eqn, len(groups[-1])):
            groups.append([])
    later: set[Var] = set()
    pieces = []
    for group in reversed(groups):
        whole = [*_viewed(group, views), *group]
        made = {v for eqn in whole for v in eqn.outvars}
        reads = tuple(dict.fromkeys(v for eqn in whole for v in eqn.invars if isinstance(v, Var) and v not in made))
        makes = tuple(v for eqn in group for v in eqn.outvars if v in later or v in results)
        pieces.append(Piece(_compiled(whole, reads, makes), reads, makes, tuple(v for v in (*reads, *makes) if v not in later)))
        later |= {*reads}
    return pieces[::-1]


def _needed(eqns: Sequence[JaxprEqn], results: Sequence[Var]) -> list[JaxprEqn]:
    """The operations that the results depend on, in order."""
    needed = {*results}
    found = []
    for eqn in reversed(eqns):
        if not needed.isdisjoint(eqn.outvars):
            needed |= {v for v in eqn.invars if isinstance(v, Var)}
            found.append(eqn)
    return found[::-1]


def _one_by_one(eqns: Sequence[JaxprEqn], results: Sequence[Var]) -> list[JaxprEqn]:
    """The same, those of the first result first."""
    makers = {v: eqn for eqn in eqns for v in eqn.outvars}
    found: dict[int, JaxprEqn] = {}
    waiting = [makers[v] for v in reversed(results) if v in makers]
    while waiting:
        eqn = waiting[-1]
        before = [makers[v] for v in eqn.invars if isinstance(v, Var) and v in makers and id(makers[v]) not in found]
        if before:
            waiting += before[::-1]
        else:
            found[id(waiting.pop())] = eqn
    return [*found.values()]


def _viewed(eqns: Sequence[JaxprEqn], views: Mapping[Var, JaxprEqn]) -> list[JaxprEqn]:
    """The views that these operations need, in order."""
    found: dict[Var, JaxprEqn] = {}

    def add(v: Var | Literal) -> None:
        if isinstance(v, Var) and v in views:
            add(views[v].invars[0])
            found[v] = views[v]

    for eqn in eqns:
        for v in eqn.invars:
            add(v)
    return [*found.values()]


def _compiled(eqns: Sequence[JaxprEqn], reads: Sequence[Var], makes: Sequence[Var]) -> Callable[..., list[jax.Array]]:
    """A function of what these operations read that returns what they make; the same one for equal operations."""
    numbers = {v: i for i, v in enumerate(reads)}
    operations = []
    for eqn in eqns:
        given = (numbers[v] if isinstance(v, Var) else Constant(np.asarray(v.val).tobytes(), str(v.aval), v.val) for v in eqn.invars)
        operations.append(Operation(eqn.primitive, tuple(sorted(eqn.params.items())), tuple(given)))
        numbers |= {v: len(numbers) + i for i, v in enumerate(eqn.outvars)}
    of = tuple(operations), tuple(numbers[v] for v in makes)
    try:
        return _jitted(*of)
    except TypeError:  # a parameter that has no hash
        return _jitted.__wrapped__(*of)


@functools.lru_cache(maxsize=4096)
def _jitted(operations: tuple[Operation, ...], makes: tuple[int, ...]) -> Callable[..., list[jax.Array]]:
    def run(*values: jax.Array) -> list[jax.Array]:
        known = [*values]
        for primitive, params, inputs in operations:
            found = primitive.bind(
                *(known[i] if isinstance(i, int) else i.value for i in inputs), **primitive.get_bind_params(dict(params))
            )
            known += found if primitive.multiple_results else [found]
        return [known[i] for i in makes]

    return jax.jit(run, compiler_options=QUICK)
