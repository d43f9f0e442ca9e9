"""Why two sides part: the place is found that goes wrong first, and the usual suspects are tried there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flaxgpt.port.description import describe
from flaxgpt.port.suspects import Cause, Place, Tensors, distance, find_cause

if TYPE_CHECKING:
    from flaxgpt.port.recorder import Batch, Recording

NOISE = {"float64": 1e-9, "float32": 3e-6, "bfloat16": 3e-2}
"""What rounding may leave in one module, relative."""

ROUNDING = """what differs elsewhere is rounding: products of less precision than was asked for (jax_default_matmul_precision,
torch.backends.cuda.matmul.allow_tf32), or casts""".replace("\n", " ")

Inputs = Mapping[str, tuple[np.ndarray, ...]]
"""What each module is called with."""

Run = Callable[[str, tuple[np.ndarray, ...]], "np.ndarray | None"]
"""(name, inputs) -> what the port's module of that name returns for them, None where this can't be found out."""


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong at the first tensor that parts."""

    where: str
    """The place, and what is right about it."""
    cause: Cause | None
    """The suspect that explains both sides."""
    look: str
    """How the difference looks."""

    @property
    def lines(self) -> list[str]:
        """For a person to read: the place; then the cause, or the look where there is none."""
        if self.look == ROUNDING:
            return [f"{self.where} in the precision of the diagnosis; {ROUNDING}"]
        if self.cause is None:
            return [self.where, f"none of the usual suspects explains it; {self.look}"]
        changes = "; ".join(f"{option}: {port} in the port, {reference} in the reference" for option, port, reference in self.cause.changes)
        agreement = f"agrees with the port to {self.cause.agreement:.0e}" if self.cause.agreement else "is the port's to the last bit"
        return [self.where, f"{changes} (so computed, it {agreement})"]


def diagnose(
    name: str, reference: Recording, port: Recording, *, parameters: Tensors, batch: Batch, run: Run | None = None, dtype: str = "float64"
) -> Diagnosis:
    """What is wrong at the first output that parts.

    Args:
        name: of that output.
        reference: what the reference recorded.
        port: what the port recorded, by the reference's names.
        parameters: the reference's, by name.
        batch: what both were called with; an entry (B, T) called a mask tells the padding.
        run: applies a module of the port. Without it, a module is judged by whether it was given the same as in the reference.
        dtype: the precision of the recordings.
    """
    given, output = reference.inputs.get(name, ()), reference.outputs[name]
    output_of_port = _run_or_recorded(name, reference, port, given, run)
    noise = NOISE[dtype]
    if output_of_port is not None and output_of_port.shape == output.shape and distance(output_of_port, output) > noise:
        target, places = (output, output_of_port), _inside(name, reference, port, parameters)
        where = f"{name}: given the reference's input, the port's output differs by {_far(*target)}"
    elif (differing := _differing_input(name, reference, port, noise)) is not None:
        target = given[differing], port.inputs[name][differing]
        name = _outermost(name, reference.inputs, port.inputs, target)
        places = _before(name, reference, port)
        untried = f"{name}: what goes into it differs by {_far(*target)} (it can't be run with the reference's input)"
        where = f"{name} is right, but what goes into it differs by {_far(*target)}" if output_of_port is not None else untried
    else:
        target, places = (output, port.outputs[name]), _inside(name, reference, port, parameters)
        where = f"{name}: the output differs by {_far(*target)}"
        if output.shape == port.outputs[name].shape and distance(port.outputs[name], output) <= noise:
            return Diagnosis(where, None, ROUNDING)
    a, b = map(_exact, target)
    cause = None
    if a.shape == b.shape:
        others = {other: np.asarray(value, np.float64) for other, value in parameters.items() if other.rpartition(".")[0] != name}
        whole = Place({}, {}, a, b, others=others, keep_BT=_padding(batch, a), noise=noise)
        causes = (find_cause(_few_rows(dataclasses.replace(whole, **place))) for place in places)
        cause = next((cause for cause in causes if cause), None)
    return Diagnosis(where, cause, describe(*target, noise))


def _far(reference: np.ndarray, port: np.ndarray) -> str:
    if not np.isfinite(port).all():
        return "nan or infinity"
    return f"{distance(port, reference):.1e}" if port.shape == reference.shape else f"its shape, {port.shape} for {reference.shape}"


def _run_or_recorded(name: str, reference: Recording, port: Recording, given: tuple[np.ndarray, ...], run: Run | None) -> np.ndarray | None:
    """What the port's module makes of the reference's inputs."""
    if run is not None and (output := run(name, given)) is not None:
        return output
    same = all(x.shape == y.shape and distance(y, x) < 1e-6 for x, y in zip(given, port.inputs.get(name, ()), strict=False))
    return port.outputs[name] if given and port.inputs.get(name) and same else None


def _differing_input(name: str, reference: Recording, port: Recording, noise: float) -> int | None:
    pairs = enumerate(zip(reference.inputs.get(name, ()), port.inputs.get(name, ()), strict=False))
    return next((i for i, (x, y) in pairs if x.shape != y.shape or distance(y, x) > noise), None)


def _outermost(name: str, reference: Inputs, port: Inputs, target: tuple[np.ndarray, np.ndarray]) -> str:
    """The outermost module that is called with the same arrays: what goes into a block's first norm goes into the block."""
    for outer in _enclosing(name, reference):
        first = [inputs.get(outer, ())[:1] for inputs in (reference, port)]
        if not all(x and x[0].shape == y.shape and np.array_equal(x[0], y) for x, y in zip(first, target, strict=True)):
            break
        name = outer
    return name


def _enclosing(name: str, known: Mapping[str, object]) -> list[str]:
    """The modules around one, from the inside, as far as they were called."""
    parts = name.split(".")
    return [outer for end in range(len(parts) - 1, 0, -1) if (outer := ".".join(parts[:end])) in known]


def _before(name: str, reference: Recording, port: Recording) -> Iterator[dict[str, object]]:
    """Places between modules: what was computed before, within the innermost module around in which something was."""
    around, names = _enclosing(name, reference.inputs), list(reference.outputs)
    before = names[: names.index(name)]
    outer = next((outer for outer in around if any(_is_in(other, outer) for other in before)), "")
    later: dict[str, np.ndarray] = {}
    for other in sorted(names[names.index(name) + 1 :], key=lambda other: other.count(".")):
        if other not in around and other in port.outputs and _is_in(other, outer):
            _add(later, other, port.outputs[other])
    for place in _between(outer, before, reference, port):
        yield place | {"later": {other: _exact(x) for other, x in later.items()}}


def _inside(name: str, reference: Recording, port: Recording, parameters: Tensors) -> Iterator[dict[str, object]]:
    """The places in a module: itself, if it has no others inside; or what is between those and its output."""
    whole = "." not in name and name.startswith("<")
    inner = [other for other in reference.outputs if other != name and (whole or other.startswith(f"{name}."))]
    if not inner:
        sources = {f"{name}'s input {i}": _exact(x) for i, x in enumerate(reference.inputs.get(name, ()))}
        if sources:
            yield {"sources": sources, "weights": _weights(name, parameters)}
        return
    yield from _between("" if whole else name, inner, reference, port)
    for other in reversed(inner[-3:]):
        yield {"sources": {other: _exact(reference.outputs[other])}}
    last, weights = inner[-1], _weights(inner[-1], parameters)
    if last not in port.outputs and "weight" in weights and np.ndim(weights["weight"]) == 2:
        # the port has no place before the last linear layer: what comes before is looked for, and the layer is then applied
        w, b = weights["weight"], weights.get("bias", 0)
        shape = reference.inputs[last][0].shape
        for place in _between(name, inner[:-1], reference, port):
            yield place | {"inner": shape, "after": lambda x: x @ (w.T if w.shape[1] == x.shape[-1] else w) + b}


def _weights(name: str, parameters: Tensors) -> Tensors:
    """A module's own parameters."""
    return {key.rpartition(".")[2]: _exact(value) for key, value in parameters.items() if key.rpartition(".")[0] == name}


def _between(outer: str, names: list[str], reference: Recording, port: Recording) -> Iterator[dict[str, object]]:
    """First what both sides have recorded, then what the reference has. What goes into modules comes before what comes out of them."""
    names = [name for name in names if _is_in(name, outer)]
    for chosen in ([name for name in names if name in port.outputs], names):
        called = [outer, *chosen] if outer in reference.inputs else chosen
        different: dict[str, np.ndarray] = {}
        for key in sorted(
            chosen, key=lambda name: name.count(".")
        ):  # an attention's output is that of its last layer: the outer name stays
            _add(different, key, reference.outputs[key])
        outputs = {key: different[key] for key in chosen if key in different}
        for i, x in enumerate(reference.inputs.get(outer, ())[1:], start=1):
            _add(different, f"{outer}'s input {i}", x)
        for key in called:
            if reference.inputs.get(key):
                _add(different, f"{key}'s input", reference.inputs[key][0])
        inputs = {key: x for key, x in different.items() if key not in outputs}
        yield {"sources": {key: _exact(x) for key, x in (inputs | outputs).items()}}


def _add(arrays: dict[str, np.ndarray], key: str, x: np.ndarray) -> None:
    """Unless the same is there by another name."""
    if not any(x is y or (x.shape == y.shape and np.array_equal(x, y)) for y in arrays.values()):
        arrays[key] = x


def _is_in(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


def _exact(x: np.ndarray) -> np.ndarray:
    if np.iscomplexobj(x):
        return np.stack([x.real, x.imag], -1)
    return np.asarray(x, np.int64 if np.asarray(x).dtype.kind in "iub" else np.float64)


def _padding(batch: Batch, x: np.ndarray) -> np.ndarray | None:
    masks = [value for name, value in batch.items() if "mask" in name] if isinstance(batch, Mapping) else []
    return next((np.asarray(mask) for mask in masks if np.ndim(mask) == 2 and len(mask) == len(x)), None)


def _few_rows(place: Place) -> Place:
    """The two rows of the batch where the sides are furthest apart, of what has rows: suspects are tried by the hundred."""
    rows = len(place.reference) if place.reference.ndim > 2 else 0
    if rows < 3:
        return place
    error = np.nan_to_num(place.port - place.reference)
    worst = np.sort(np.argsort((error * error).reshape(rows, -1).sum(-1))[-2:])

    def few(x: np.ndarray) -> np.ndarray:
        return x[worst] if x.ndim > 1 and len(x) == rows else x

    return dataclasses.replace(
        place,
        sources={key: few(x) for key, x in place.sources.items()},
        later={key: few(x) for key, x in place.later.items()},
        reference=place.reference[worst],
        port=place.port[worst],
        keep_BT=None if place.keep_BT is None else few(place.keep_BT),
        inner=None if place.inner is None else (2, *place.inner[1:]),
    )
