"""What is called what on the two sides: a table that the user writes, and what follows from it.

    names = {
        "model.embed_tokens": "embed",                          # a module: what it returns, and everything below it
        "model.layers.{}.self_attn.q_proj": "blocks.{}.attn.q", # {} is a number, the same on both sides
        "h.{}.attn.c_attn": ["blocks.{}.q", "blocks.{}.k", "blocks.{}.v"],         # one here, three side by side there
        ("gate_proj", "up_proj"): "gate_up",                                       # and the other way round
        "h.{}.mlp.c_fc.weight": ("blocks.{}.mlp.up.kernel", "d f -> d f"),         # a layout that is not the usual one
    }

What is not in the table has the same name on both sides, and what is below a module that is, the same name below it. A "weight" may
also be a "kernel", "scale" or "embedding" there. A kernel is the weight with its axes in JAX's order, (in, out); axes that are merged on
one side and not on the other are reshaped; what a module returns may have its channels last there, if the shapes show that. Everything
else is said by a pattern (`flaxgpt.port.arrange`); with several names on a side, they follow one another on the last axis in the port's
layout, or, where there is a pattern, on the first axis of what it makes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from flaxgpt.errors import InputError
from flaxgpt.port.arrange import arranged, regrouped, undone
from flaxgpt.port.recorder import OUTPUT

Target: TypeAlias = "str | list[str] | tuple[str | list[str], str]"
"""A name, several, or either with a pattern."""

Names: TypeAlias = "Mapping[str | tuple[str, ...], Target]"
"""The reference's names -> the port's."""

Shapes: TypeAlias = "Mapping[str, tuple[int, ...]]"


@dataclass(frozen=True)
class Link:
    """One array on one side and one on the other, or one and several side by side."""

    reference: tuple[str, ...]
    port: tuple[str, ...]
    pattern: str | None = None

    @property
    def name(self) -> str:
        """What to call it in a table: the reference's name."""
        return " + ".join(self.reference)

    def of_output(self, shape: tuple[int, ...], there: tuple[int, ...], square: bool = False) -> Link:
        """The link of a module's output of these shapes: with channels last in the port, if its shape is that and no pattern is given.

        Args:
            shape: in the reference.
            there: in the port.
            square: whether they are last even where that is no other shape.
        """
        last = (*shape[:1], *shape[2:], *shape[1:2])
        if self.pattern is not None or len(shape) < 3 or last != tuple(there) or (tuple(shape) == last and not square):
            return self
        first, channels, *window = "abcdefgh"[: len(shape)]
        return replace(self, pattern=f"{' '.join((first, channels, *window))} -> {' '.join((first, *window, channels))}")

    def rows(self) -> list[str]:
        """A name for each array of the port."""
        return [self.name] if len(self.port) == 1 else [f"{self.name} ({port})" for port in self.port]

    def to_port(self, arrays: Sequence[np.ndarray], shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """The reference's arrays as the port's, of these shapes.

        Raises:
            InputError: they do not fit; both shapes are in it.
        """
        if len(self.port) > 1:
            return self._split(arrays[0], shapes)
        if len(self.reference) > 1:
            if self.pattern is not None:
                joined = np.stack(arrays)
            else:
                joined = np.concatenate([_usual(x, self.reference[i], self.port[0]) for i, x in enumerate(arrays)], axis=-1)
                return [self._reshaped(joined, shapes[0], joined.shape)]
        else:
            joined = arrays[0]
        if self.pattern is not None:
            return [self._arranged(joined, self.pattern, shapes[0])]
        return [self._reshaped(_usual(joined, self.reference[0], self.port[0]), shapes[0], joined.shape)]

    def to_reference(self, arrays: Sequence[np.ndarray], shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """The inverse of `to_port`."""
        back = Link(self.port, self.reference, None if self.pattern is None else undone(self.pattern))
        if len(self.port) == 1 and len(self.reference) == 1:
            return _unusual(back, arrays, shapes)
        if self.pattern is not None:
            if len(self.port) > 1:
                return [back._arranged(np.stack([x.reshape(_same(arrays)) for x in arrays]), back.pattern, shapes[0])]
            whole = back._arranged(arrays[0], back.pattern, (len(shapes), *shapes[0]))
            return [*whole]
        if len(self.port) > 1:
            flat = _usual_shape(shapes[0], self.reference[0], self.port[0])
            joined = np.concatenate([x.reshape(*flat[:-1], -1) for x in arrays], axis=-1)
            return [_usual(joined, self.port[0], self.reference[0], back=True).reshape(shapes[0])]
        flats = [_usual_shape(shape, name, self.port[0]) for shape, name in zip(shapes, self.reference, strict=True)]
        ends = np.cumsum([flat[-1] for flat in flats])[:-1]
        whole = arrays[0].reshape(*flats[0][:-1], -1)
        parts = np.split(whole, ends, axis=-1)
        return [
            _usual(part, self.port[0], name, back=True).reshape(shape)
            for part, name, shape in zip(parts, self.reference, shapes, strict=True)
        ]

    def _split(self, x: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        if self.pattern is not None:
            return [*self._arranged(x, self.pattern, (len(shapes), *shapes[0]))]
        whole = _usual(x, self.reference[0], self.port[0])
        rest = max(1, int(np.prod(whole.shape[:-1])))
        widths = [int(np.prod(shape)) // rest for shape in shapes]
        if sum(widths) != whole.shape[-1]:
            raise InputError(f"{self.name} is {list(x.shape)}, and {', '.join(self.port)} are {', '.join(str(list(s)) for s in shapes)}")
        parts = np.split(whole, np.cumsum(widths)[:-1], axis=-1)
        return [self._reshaped(part, shape, x.shape) for part, shape in zip(parts, shapes, strict=True)]

    def _arranged(self, x: np.ndarray, pattern: str, shape: tuple[int, ...]) -> np.ndarray:
        try:
            return arranged(x, pattern, shape)
        except InputError as error:
            raise InputError(f"{self.name} -> {', '.join(self.port)}: {error}") from None

    def _reshaped(self, x: np.ndarray, shape: tuple[int, ...], before: tuple[int, ...]) -> np.ndarray:
        if x.shape == tuple(shape) or (x.size == np.prod(shape) and regrouped(x.shape, shape)):
            return x.reshape(shape)
        hint = ""
        if x.ndim == len(shape) and sorted(x.shape) == sorted(shape):
            letters = "abcdefgh"[: len(before)]
            pattern = f"{' '.join(letters)} -> {' '.join(letters[i] for i in _order(before, shape))}"
            hint = f'; if its axes are in another order, say so: ("{self.port[0]}", "{pattern}")'
        raise InputError(f"{self.name} is {list(before)}, and {self.port[0]} is {list(shape)}{hint}")


class Table:
    """A user's names, for the names that there are on both sides."""

    def __init__(self, names: Names) -> None:
        if not isinstance(names, Mapping):
            raise InputError(f"names: expected a dict of the reference's names and the port's, not a {type(names).__name__}")
        for key in names:
            if not isinstance(key, str) and not (isinstance(key, tuple) and key and all(isinstance(name, str) for name in key)):
                raise InputError(f"names: {key!r} is neither a name of the reference nor a tuple of names")
        self.rows = [(key if isinstance(key, tuple) else (key,), *_target(value)) for key, value in names.items()]

    def parameters(self, reference: Shapes, port: Shapes) -> list[Link]:
        """A link for each parameter of the reference.

        Raises:
            InputError: a parameter that is missing or left over on either side, or one that does not fit; each is named.
        """
        links, faults = self._links(reference, port, complete=True)
        linked = [name for link in links for name in link.port]
        faults += [f"{name} of the port has no parameter of the reference{closest(name, reference)}" for name in port if name not in linked]
        faults += [f"{name} of the port has several" for name in sorted({name for name in linked if linked.count(name) > 1})]
        for link in links:
            try:
                link.to_port([np.empty(reference[name], np.bool_) for name in link.reference], [port[name] for name in link.port])
            except InputError as error:
                faults.append(str(error))
        if faults:
            raise InputError("the table of names does not fit the parameters: " + "; ".join(faults))
        return links

    def outputs(self, reference: Collection[str], port: Collection[str], others: Collection[str] = ()) -> list[Link]:
        """A link for each module of the reference whose counterpart there is, in the order of the reference.

        Args:
            reference: the names of its outputs.
            port: those of the port's.
            others: other names that the table may have: those of parameters.

        Raises:
            InputError: the table has a name that is on neither side.
        """
        links, _ = self._links(dict.fromkeys(reference, ()), dict.fromkeys(port, ()), complete=False)
        faults = []
        for ours, theirs, _ in self.rows:
            for pattern, known, side in [(p, reference, "reference") for p in ours] + [(p, port, "port") for p in theirs]:
                if not any(_below(pattern, name) is not None for name in (*known, *others)):
                    faults.append(f"{pattern}: there is no such name in the {side}{closest(pattern, [*known, *others])}")
        if faults:
            raise InputError("the table of names does not fit the models: " + "; ".join(faults))
        return links

    def has(self, name: str, side: str) -> bool:
        """Whether a row is about this module, of the "reference" or of the "port", and not only about what it is part of."""
        patterns = [pattern for ours, theirs, _ in self.rows for pattern in (ours if side == "reference" else theirs)]
        return any(_below(pattern, name) is not None and _below(pattern, name)[1] == "" for pattern in patterns)

    def counterpart(self, name: str, port: Collection[str]) -> str:
        """What the port calls a parameter of the reference."""
        return self._link(name, {}, dict.fromkeys(port, ())).port[0]

    def whole(self) -> Link:
        """What the models return."""
        return self._link(OUTPUT, {OUTPUT: ()}, {OUTPUT: ()})

    def _links(self, reference: Shapes, port: Shapes, complete: bool) -> tuple[list[Link], list[str]]:
        links: dict[tuple[str, ...], Link] = {}
        faults = []
        for name in reference:
            link = self._link(name, reference, port)
            if not all(other in port for other in link.port):
                if complete:
                    wanted = f" (looked for: {', '.join(link.port)})"
                    faults.append(f"{name} of the reference has no parameter of the port{wanted}{closest(link.port[0], port)}")
            elif all(other in reference for other in link.reference):
                links.setdefault(link.reference, link)
        last = {link: max([*reference].index(name) for name in link.reference) for link in links.values()} if len(links) else {}
        return sorted(links.values(), key=last.__getitem__), faults

    def _link(self, name: str, reference: Shapes, port: Shapes) -> Link:
        """What the row that says most about this name makes of it."""
        matches = [
            (len(ours[i]), ours, theirs, pattern, *found)
            for ours, theirs, pattern in self.rows
            for i in range(len(ours))
            if (found := _below(ours[i], name)) is not None
        ]
        if not matches:
            return Link((name,), (_leaf(name, port),))
        _, ours, theirs, pattern, numbers, rest = max(matches, key=lambda match: (match[5] == "", match[0]))
        ours_full = tuple(_filled(one, numbers) + rest for one in ours)
        theirs_full = tuple(_leaf(_filled(one, numbers) + rest, port) for one in theirs)
        return Link(ours_full, theirs_full, pattern if rest == "" else None)


SAME_LEAF = ({"weight", "kernel", "scale", "embedding", "gamma"}, {"bias", "shift", "beta"})


def _target(value: Target) -> tuple[tuple[str, ...], str | None]:
    pattern = None
    if isinstance(value, tuple):
        if len(value) != 2 or "->" not in str(value[1]):
            raise InputError(f'names: {value!r} is neither a name, nor a list of names, nor (either, "a b -> b a")')
        value, pattern = value
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        raise InputError(f'names: {value!r} is neither a name, nor a list of names, nor (either, "a b -> b a")')
    return tuple(names), pattern


def _below(pattern: str, name: str) -> tuple[tuple[str, ...], str] | None:
    """The numbers for {} and what of the name is below the pattern (".weight"); None: it is not below it."""
    match = re.match(re.escape(pattern).replace(re.escape("{}"), r"(\d+)") + r"(?![^.@])", name)
    return None if match is None else (match.groups(), name[match.end() :])


def _filled(pattern: str, numbers: Sequence[str]) -> str:
    for number in numbers:
        pattern = pattern.replace("{}", number, 1)
    return pattern


def _leaf(name: str, port: Shapes) -> str:
    """That name, or the one of the same meaning that the port has ("kernel" for "weight")."""
    module, _, leaf = name.rpartition(".")
    if name in port:
        return name
    group = next((group for group in SAME_LEAF if leaf in group), ())
    found = [other for other in port if other.rpartition(".")[0] == module and other.rpartition(".")[2] in group]
    return found[0] if len(found) == 1 else name


def _usual(x: np.ndarray, reference: str, port: str, back: bool = False) -> np.ndarray:
    """With the axes of a kernel in the other framework's order, where one of them is a kernel and the other is not."""
    axes = _axes(x.ndim, reference, port)
    return x if axes is None else x.transpose(np.argsort(axes) if back else axes)


def _usual_shape(shape: tuple[int, ...], reference: str, port: str) -> tuple[int, ...]:
    axes = _axes(len(shape), reference, port)
    return tuple(shape) if axes is None else tuple(shape[i] for i in axes)


def _axes(ndim: int, reference: str, port: str) -> tuple[int, ...] | None:
    kernels = [name.rpartition(".")[2] == "kernel" for name in (reference, port)]
    if kernels[0] == kernels[1] or ndim < 2:
        return None
    # torch: (out, in, *window); JAX: (*window, in, out)
    return (*range(2, ndim), 1, 0) if kernels[1] else (ndim - 1, ndim - 2, *range(ndim - 2))


def _unusual(back: Link, arrays: Sequence[np.ndarray], shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """One array of the port as the reference's: reshaped to what its weight would be in JAX's order, and put into torch's."""
    (x,), (shape,) = arrays, shapes
    if back.pattern is not None:
        return [back._arranged(x, back.pattern, shape)]
    axes = _axes(len(shape), back.port[0], back.reference[0])
    if axes is None:
        return [back._reshaped(x, shape, x.shape)]
    flat = back._reshaped(x, tuple(shape[i] for i in axes), x.shape)
    return [flat.transpose(np.argsort(axes))]


def _same(arrays: Sequence[np.ndarray]) -> tuple[int, ...]:
    return arrays[0].shape


def _order(before: tuple[int, ...], after: tuple[int, ...]) -> list[int]:
    left = [*range(len(before))]
    order = []
    for size in after:
        i = next(i for i in left if before[i] == size)
        left.remove(i)
        order.append(i)
    return order


def closest(name: str, known: Iterable[str]) -> str:
    """The names most like this one, for the end of a message."""
    found = difflib.get_close_matches(name, [*known], n=3, cutoff=0.4)
    return f" (closest: {', '.join(found)})" if found else ""
