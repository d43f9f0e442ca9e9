"""From what a check has recorded to a diagnosis of the first tensor that parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from flaxgpt.errors import InputError
from flaxgpt.parity.compare import Result, first_divergence
from flaxgpt.port.arrange import arranged, regrouped, undone
from flaxgpt.port.description import describe
from flaxgpt.port.diagnosis import Diagnosis, diagnose
from flaxgpt.port.names import Link
from flaxgpt.port.recorder import Recording
from flaxgpt.port.suspects import distance

if TYPE_CHECKING:
    from flaxgpt.port.check import Climb


def explain(climb: Climb, results: Sequence[Result], own: int) -> list[str]:
    """Lines on the first output that parts, or, where all outputs agree, on the first gradient.

    Args:
        climb: what was recorded.
        results: of all rungs.
        own: how many times the reference's error the port's may be.
    """
    first = first_divergence(results)
    if first["forward"]:
        link = next(link for link in climb.output_links if first["forward"] in link.rows())
        if len(link.reference) == len(link.port) == 1:
            found = _of_output(climb, link)
            return [*found.lines] if found.cause else [*found.lines, *_in_which_precision(results, own)]
    return [*_described(climb, first), *_in_which_precision(results, own)]


def _described(climb: Climb, first: Mapping[str, str | None]) -> list[str]:
    if first["forward"]:
        row = next(row for row in climb.output_rows("outputs") if row.name == first["forward"])
        return [describe(row.of("reference", "float64"), row.of("port", "float64"))]
    if first["backward"] == "loss":
        losses = [float(climb.run(side, "float64").loss) for side in ("port", "reference")]
        ratio = f", {losses[0] / losses[1]:.6g} times the reference's" if losses[1] and np.isfinite(losses).all() else ""
        return [f"loss: the port's is {losses[0]:.6g}{ratio} ({losses[1]:.6g})"]
    rows = [row for row in climb.gradient_rows() if row.name == first["backward"]]
    return [_of_gradient(row.name, row.of("reference", "float64"), row.of("port", "float64")) for row in rows]


def _in_which_precision(results: Sequence[Result], own: int) -> list[str]:
    """A line on the first tensor that parts, where it does so in one precision only."""
    row = next(row for result in results for row in result.failures)
    ours, theirs, exact = row.error_flaxgpt, row.error_reference, row.exact
    if ours is None or theirs is None or row.difference is None or exact is None:
        return []
    if not exact > max(row.exact_bound, 2.0**-24 * ours) and not ours <= own * theirs:  # in float64 it is rounding, too
        return [
            f"{row.name}: the port's own error against float64 is {ours:.1e}, "
            + (f"{ours / theirs:.0f} times the reference's" if np.isfinite(ours) and theirs else f"the reference's {theirs:.1e}")
            + ": something is computed in less than float32, or by a formula that loses digits"
        ]
    if row.bound >= row.difference and 2.0**-32 < exact < 2.0**-20:
        return [
            f"{row.name}: the two agree in float32, and differ by {exact:.1e} in float64: one of them may hold a constant "
            "that was computed in float32 (a table, np.float32, a dtype that is not the input's)"
        ]
    return []


def _of_gradient(name: str, reference: np.ndarray, port: np.ndarray) -> str:
    """All outputs agree, and so do the gradients before this one: it is the way back from there to here that is wrong."""
    look = describe(reference, port)
    if not port.any():
        return f"{name}: the gradient stops here ({look}): a stop_gradient, a detached tensor, or a backward rule that gives nothing"
    if " times the reference" in look:
        return f"{name}: {look}: a stop_gradient on part of it, a term counted twice, or a backward rule with another factor"
    return f"{name}: {look}"


def _of_output(climb: Climb, link: Link) -> Diagnosis:
    batch, port = climb.pair.batch, climb.run("port", "float64")
    links = {link.reference[0]: link for link in climb.output_links if len(link.reference) == len(link.port) == 1}
    patterns = [*dict.fromkeys(link.pattern for link in links.values() if link.pattern)]
    shapes = {name: x.shape for name, x in climb.run("reference", "float64").outputs.items()}

    def run(name: str, inputs: tuple[np.ndarray, ...]) -> np.ndarray | None:
        if name not in links:
            return None
        there = links[name].port[0]
        given = _as_the_port_takes_them(inputs, port.inputs.get(there, ()), patterns)
        output = None if given is None else climb.pair.port.run_submodule(batch, there, given, "float64", climb.start("port"))
        return None if output is None else links[name].to_reference([output], [shapes[name]])[0]

    outputs = {name: link.to_reference([port.outputs[link.port[0]]], [shapes[name]])[0] for name, link in links.items()}
    ours = climb.run("reference", "float64")
    reference = Recording({**ours.outputs}, {**ours.inputs}, {}, {}, ours.loss)
    called = {name: link.port[0] for name, link in links.items() if link.port[0] in port.inputs and name in ours.inputs}
    inputs = {name: _as_the_reference_has_them(ours.inputs[name], port.inputs[there], patterns) for name, there in called.items()}
    theirs = Recording(outputs, inputs, {}, {}, port.loss)
    parameters = climb.pair.reference.parameters(batch) | climb.pair.reference.buffers()
    return diagnose(link.reference[0], reference, theirs, parameters=parameters, batch=batch, run=run)


Arrays: TypeAlias = "tuple[np.ndarray, ...]"


def _as_the_port_takes_them(given: Arrays, wanted: Arrays, patterns: Sequence[str]) -> Arrays | None:
    """The reference's inputs in the order and the layouts of the port's; None where one with a fraction, or all, have no counterpart."""
    pairs = _paired(given, wanted, patterns)
    if not pairs or any(k not in pairs and x.ndim and x.dtype.kind in "fc" for k, x in enumerate(wanted)):
        return None
    return tuple(_laid_out(given[pairs[k][0]], pairs[k][1], x.shape) if k in pairs else x for k, x in enumerate(wanted))


def _as_the_reference_has_them(given: Arrays, wanted: Arrays, patterns: Sequence[str]) -> Arrays:
    """The port's inputs in the order and the layouts of the reference's; those without a counterpart come last."""
    pairs = _paired(given, wanted, patterns)
    found = {i: _laid_out(wanted[k], pattern and undone(pattern), given[i].shape) for k, (i, pattern) in pairs.items()}
    return (*(found[i] for i in sorted(found)), *(x for k, x in enumerate(wanted) if k not in pairs))


def _paired(given: Arrays, wanted: Arrays, patterns: Sequence[str]) -> dict[int, tuple[int, str | None]]:
    """Number of an input of the port -> that of the reference's, and how that is laid out there.

    Each is paired with the first of its size that can be laid out like it, as it is or by a pattern of the table: if in several ways, in
    the one that brings the two nearest to each other. (By shapes alone, a square image would have its rows taken for channels.)
    """
    pairs: dict[int, tuple[int, str | None]] = {}
    for i, x in enumerate(given):
        for k, y in enumerate(wanted):
            ways = [pattern for pattern in (None, *patterns) if _fits(x, pattern, y.shape)] if k not in pairs else []
            if ways:
                pairs[k] = i, min(ways, key=lambda pattern: distance(_laid_out(x, pattern, y.shape), y))
                break
    return pairs


def _laid_out(x: np.ndarray, pattern: str | None, shape: tuple[int, ...]) -> np.ndarray:
    if pattern is not None:
        return arranged(x, pattern, shape)
    return x.reshape(shape) if regrouped(x.shape, shape) else x  # heads and their size may be one axis or two


def _fits(x: np.ndarray, pattern: str | None, shape: tuple[int, ...]) -> bool:
    try:
        return _laid_out(x, pattern, shape).shape == tuple(shape)
    except InputError:
        return False
