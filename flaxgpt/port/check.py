"""Comparing two models, from the first activation to some updates.

Both are run in float32 and in float64 (and in bfloat16, if that is asked for). So each side's own error is known, of each tensor, and what
may be between the two sides follows from it: no bound is guessed.
"""

from __future__ import annotations

import fnmatch
import functools
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from flaxgpt.errors import InputError
from flaxgpt.parity.compare import Measurement, Result, first_divergence, relative
from flaxgpt.port.explain import explain
from flaxgpt.port.kept import Keep, Lazy, in_files
from flaxgpt.port.names import Link, Table, closest
from flaxgpt.port.pair import Pair
from flaxgpt.port.recorder import OUTPUT, AdamW, Recorder, Recording, matches, probe

NUMBERED = ("activations", "loss", "gradients", "clipping", "adamw", "training")
"""In order; rung n of the report is the n-th, from 1."""

RUNGS = ("parameters", *NUMBERED)
"""The first is for a port that has parameters of its own."""

FACTOR = 2
"""A difference may be this many times what both sides' own errors add up to."""

OWN = 32
"""The port's own error counts up to so many times the reference's: a bound that grew with it would let any error pass."""

EXTRAPOLATED = 32
"""In float64 and bfloat16, whose errors are not measured but follow from those in float32, it may be this many times."""


@dataclass(frozen=True)
class Verdict:
    """What a check came to."""

    results: tuple[Result, ...]
    diagnosis: tuple[str, ...] = ()
    """What explains the first tensor that parts, in lines."""

    @property
    def passed(self) -> bool:
        """All is within its bounds."""
        return all(result.passed for result in self.results)

    @property
    def first(self) -> dict[str, str | None]:
        """The first tensor that parts in the "forward" and in the "backward" pass."""
        return first_divergence(self.results)


def check(
    pair: Pair,
    rungs: Sequence[str] = RUNGS,
    *,
    dtype: str = "float32",
    updates: int = 3,
    adamw: AdamW | None = None,
    bounds: Mapping[str, float] | None = None,
    exact_bounds: Mapping[str, float] | None = None,
    progress: Callable[[Result], None] = lambda result: None,
) -> Verdict:
    """Compare the port with the reference.

    Args:
        pair: the two, and what they are given.
        rungs: some of RUNGS.
        dtype: the precision under test: "float32", "bfloat16" or "float64". Both sides are run in float64 in any case.
        updates: how many are made on the rungs adamw and training.
        adamw: how, where a recorder has no optimizer of its own.
        bounds: by name of a tensor, or a pattern with *: what it may differ by in that precision, in place of what follows from the errors.
        exact_bounds: the same in float64.
        progress: called with each rung's result.

    Raises:
        InputError: what a person can mend: names, shapes, outputs that are no arrays, a batch that a model refuses.
    """
    if unknown := [rung for rung in rungs if rung not in RUNGS]:
        raise InputError(f"rungs: {', '.join(unknown)} is none of {', '.join(RUNGS)}")
    if dtype not in ("float32", "bfloat16", "float64"):
        raise InputError(f"dtype={dtype}: expected float32, bfloat16 or float64")
    climbed = [rung for rung in RUNGS if rung in rungs and not (rung == "parameters" and pair.convert)]
    if not climbed:
        only = "parameters compares those that a port has of its own (convert=False)" if rungs else f"expected some of {', '.join(RUNGS)}"
        raise InputError(f"rungs: nothing is left to compare; {only}")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        climb = Climb(pair, dtype, updates, adamw or AdamW(), bounds or {}, exact_bounds or {}, Path(folder))
        for rung in climbed:
            started = time.perf_counter()
            results.append(Result(rung, tuple(getattr(climb, rung)()), time.perf_counter() - started))
            progress(results[-1])
        climb.check_bounds()
        verdict = Verdict(tuple(results))
        if verdict.passed:
            return verdict
        return replace(verdict, diagnosis=tuple(explain(climb, results, OWN)))


@dataclass
class Row:
    """A tensor in every run that was made of it, in the port's layout."""

    name: str
    of: Callable[[str, str], np.ndarray]
    """(side, dtype) -> the array."""
    scale: float | None = None


@dataclass
class Climb:
    """A check that is going on: what was recorded, and the rungs."""

    pair: Pair
    dtype: str
    updates: int
    adam: AdamW
    bounds: Mapping[str, float]
    exact_bounds: Mapping[str, float]
    folder: Path
    runs: dict[tuple[str, str], Recording] = field(default_factory=dict)
    floors: dict[str, dict[str, float]] = field(default_factory=dict)
    bounded: set[str] = field(default_factory=set)
    """The names for which a bound was looked for."""

    def __post_init__(self) -> None:
        pair = self.pair
        self.table = Table(pair.names)
        self.shapes = {side: self.recorder(side).shapes(pair.batch) for side in ("reference", "port")}
        for side, shapes in self.shapes.items():
            if not shapes:
                raise InputError(f"the {side} ({self.recorder(side).side}) has no parameters: there is nothing to take a gradient of")
        self.links = self.table.parameters(self.shapes["reference"], self.shapes["port"])
        self.converted = self.to_port(pair.reference.parameters(pair.batch)) if pair.convert else None

    def recorder(self, side: str) -> Recorder:
        """The recorder of the "reference" or of the "port"."""
        return getattr(self.pair, side)

    def to_port(self, tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """What is by the names of the reference's parameters, by those of the port's."""
        places = {name: (link, i) for link in self.links for i, name in enumerate(link.port)}

        def one(name: str) -> np.ndarray:
            link, i = places[name]
            return link.to_port([tensors[other] for other in link.reference], [self.shapes["port"][other] for other in link.port])[i]

        return Lazy(places, one)

    # rungs

    def parameters(self) -> Iterable[Measurement]:
        """The port's own parameters against the reference's: a rounding apart at most, since either may be stored in less."""
        wanted, own = self.to_port(self.pair.reference.parameters(self.pair.batch)), self.pair.port.parameters(self.pair.batch)
        for link in self.links:
            for row, name in zip(link.rows(), link.port, strict=True):
                bound = max(np.finfo(x.dtype).eps if x.dtype.kind == "f" else 2.0**-8 for x in (wanted[name], own[name]))
                yield Measurement(row, relative(own[name], wanted[name]), bound=self._by_hand(self.bounds, row, float(bound)))

    def activations(self) -> list[Measurement]:
        """What each module returns."""
        return self._measured("activations", self.output_rows("outputs"))

    def loss(self) -> list[Measurement]:
        """The loss."""
        if "activations" not in self.floors:
            self.activations()
        row = Row("loss", lambda side, dtype: self.run(side, dtype).loss)
        return self._measured("loss", [row], self.floors["activations"])

    def gradients(self) -> list[Measurement]:
        """With respect to each module's output, the last one first, and to each parameter."""
        self.reference_gradients()
        return self._measured("gradients", self.gradient_rows())

    def clipping(self) -> Iterable[Measurement]:
        """The reference's gradients, scaled to twice and to half the norm that they are clipped to."""
        gradients = self.reference_gradients()
        norm = float(np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in gradients.values())))
        for share in (2.0, 0.5):
            factor = share * self.adam.clip_norm / norm
            scaled = Lazy(gradients, lambda name, factor=factor: (gradients[name] * factor).astype(np.float32))
            runs = functools.cache(functools.partial(self._clipped, scaled))
            norm_row = Row("norm", lambda side, dtype, runs=runs: runs(side, dtype)[0])
            rows = self._measured("clipping", [norm_row, *self._rows_of("clipped", lambda *run, runs=runs: runs(*run)[1])])
            yield from (replace(row, name=f"{row.name} ({share:g} times the limit)") for row in rows)

    def adamw(self) -> list[Measurement]:
        """The parameters after updates that both sides make from the reference's gradients."""
        gradients = self.reference_gradients()
        return self._trained("adamw", lambda side: self._for(side, gradients))

    def training(self) -> list[Measurement]:
        """The loss before each of some updates, and the parameters after them."""
        return self._trained("training", lambda side: None)

    def _clipped(self, gradients: Mapping[str, np.ndarray], side: str, dtype: str) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
        return self.recorder(side).clip(self._for(side, gradients), self.adam, dtype, self._keep())

    def _trained(self, rung: str, gradients: Callable[[str], Mapping[str, np.ndarray] | None]) -> list[Measurement]:
        """Parameters are compared by how far AdamW may move them: by its rate, each update."""

        @functools.cache
        def train(side: str, dtype: str) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
            settings = self.adam, self.updates, dtype, self.start(side), gradients(side)
            return self.recorder(side).train(self.pair.batch, *settings, self.cotangent if side == "port" else None, self._keep())

        losses = [Row("loss", lambda *run: train(*run)[0])] if rung == "training" else []
        parameters = self._rows_of("parameter", lambda *run: train(*run)[1], self.adam.learning_rate * self.updates)
        return self._measured(rung, [*losses, *parameters])

    def _for(self, side: str, tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return self.to_port(tensors) if side == "port" else tensors

    def _keep(self) -> Keep:
        """Puts away what is about to be computed."""
        return in_files(Path(tempfile.mkdtemp(dir=self.folder)))

    # rows

    def run(self, side: str, dtype: str) -> Recording:
        """A pass, recorded when it is first needed."""
        if (side, dtype) not in self.runs:
            cotangent = self.cotangent if side == "port" else None
            self.runs[side, dtype] = self.recorder(side).record(self.pair.batch, dtype, self.start(side), cotangent, self._keep())
        return self.runs[side, dtype]

    def reference_gradients(self) -> Mapping[str, np.ndarray]:
        """Those of the reference's parameters, in float32.

        Raises:
            InputError: all are zero.
        """
        gradients = self.run("reference", "float32").parameter_gradients
        if not any(gradient.any() for gradient in gradients.values()):
            raise InputError("the reference's gradients are all zero: its loss does not depend on its parameters")
        return gradients

    def start(self, side: str) -> Mapping[str, np.ndarray] | None:
        """The parameters to compute with; None: the side's own."""
        return self.converted if side == "port" else None

    def cotangent(self, shape: tuple[int, ...]) -> np.ndarray:
        """What the reference's output is multiplied with, in the layout of the port's."""
        ours = self.run("reference", "float64").outputs[OUTPUT].shape
        return self.table.whole().of_output(ours, shape).to_port([probe(ours)], [shape])[0]

    @functools.cached_property
    def output_links(self) -> list[Link]:
        """Which outputs are compared.

        Raises:
            InputError: a name that is on neither side, a module in the table that returns no array, nothing to compare, or shapes that do
                not fit.
        """
        ours, theirs = self.run("reference", "float64"), self.run("port", "float64")
        for side, run in (("reference", ours), ("port", theirs)):
            self._check_taken(side, run)
        others = {*self.shapes["reference"], *self.shapes["port"]}
        links = self.table.outputs(ours.outputs, theirs.outputs, {*others, *ours.unusable, *theirs.unusable})
        if all(link.reference == (OUTPUT,) for link in links) and len(ours.outputs) > 1:
            some = ", ".join([*ours.outputs][:3]), ", ".join([*theirs.outputs][:3])
            raise InputError(f"the table pairs no module of the reference ({some[0]}, ...) with one of the port ({some[1]}, ...)")
        laid_out, faults = [], []
        for link in links:
            arrays, there = ([run.outputs[name] for name in names] for run, names in ((ours, link.reference), (theirs, link.port)))
            shapes = [x.shape for x in there]
            laid_out.append(link)
            if len(arrays) == len(there) == 1:
                square = link.reference != (OUTPUT,) and _nearer_with_channels_last(arrays[0], there[0])
                laid_out[-1] = link.of_output(arrays[0].shape, shapes[0], square)
            try:
                laid_out[-1].to_port([np.empty(x.shape, np.bool_) for x in arrays], shapes)
            except InputError as error:
                faults.append(str(error))
        if faults:
            more = f"; and {len(faults) - 4} more" if len(faults) > 4 else ""
            raise InputError(f"modules return arrays that do not fit: {'; '.join(faults[:4])}{more}")
        return laid_out

    def _check_taken(self, side: str, run: Recording) -> None:
        for name, what in run.unusable.items():
            if self.table.has(name, side):
                raise InputError(
                    f'{name} of the {side} returns {what}, which has no array: say which element to take, as in take={{"{name}": 0}} '
                    "(an index, a key or a function of what it returns), or leave it out of the table"
                )
        for pattern in self.recorder(side).take:
            if not any(matches(pattern, name) for name in (*run.outputs, *run.unusable)):
                raise InputError(f"take: the {side} has no module {pattern}{closest(pattern, run.outputs)}")

    def output_rows(self, part: str) -> list[Row]:
        """A row for each output, of that part of a run: "outputs" or "output_gradients"."""
        recorded = getattr(self.run("reference", "float64"), part)
        links = [link for link in self.output_links if all(name in recorded for name in link.reference)]
        return [self._output_row(part, link, i) for link in links for i in range(len(link.port))]

    def gradient_rows(self) -> list[Row]:
        """Those of the outputs, the last one first, and those of the parameters."""
        backward = [replace(row, name=f"backward/{row.name}") for row in self.output_rows("output_gradients")[::-1]]
        return [*backward, *self._rows_of("gradients", lambda side, dtype: self.run(side, dtype).parameter_gradients)]

    def _output_row(self, part: str, link: Link, i: int) -> Row:
        def of(side: str, dtype: str) -> np.ndarray:
            run = self.run(side, dtype)
            tensors, shapes = getattr(run, part), [self.run("port", "float64").outputs[name].shape for name in link.port]
            if side == "port":
                name = link.port[i]
                return tensors[name] if name in tensors else np.zeros(shapes[i])
            return link.to_port([tensors[name] for name in link.reference], shapes)[i]

        return Row(link.rows()[i], of)

    def _rows_of(self, prefix: str, tensors: Callable[[str, str], Mapping[str, np.ndarray]], scale: float | None = None) -> list[Row]:
        """A row for each parameter, of tensors by the names of the parameters."""

        def row(link: Link, i: int) -> Row:
            shapes = [self.shapes["port"][name] for name in link.port]

            def of(side: str, dtype: str) -> np.ndarray:
                arrays = tensors(side, dtype)
                return arrays[link.port[i]] if side == "port" else link.to_port([arrays[name] for name in link.reference], shapes)[i]

            return Row(f"{prefix}/{link.rows()[i]}", of, scale and scale * float(np.prod(shapes[i])) ** 0.5)

        return [row(link, i) for link in self.links for i in range(len(link.port))]

    # figures

    def _measured(self, rung: str, rows: Sequence[Row], floors: dict[str, float] | None = None) -> list[Measurement]:
        """Each row's differences, and the bounds that follow from the errors of both sides in float32.

        A tensor's own error may be small by luck, above all if it has few elements: it counts at least as much as the median of its rung.
        """
        sizes = [_rms(row.of("reference", "float64")) for row in rows]
        typical = float(np.median(sizes)) if sizes else 0.0
        figures = [self._figures(row, typical) for row in rows]
        if floors is None:
            floors = {side: float(np.median([f[side] for f in figures])) if figures else 0.0 for side in ("reference", "port")}
            self.floors[rung] = floors
        # What updates make of a gradient that is nothing but noise is a step of full size: there the errors have no common measure.
        own = np.inf if rung == "training" else OWN
        return [self._bounded(row.name, f, floors, own) for row, f in zip(rows, figures, strict=True)]

    def _figures(self, row: Row, typical: float) -> dict[str, float]:
        truth = row.of("reference", "float64")
        # A tensor of zeros is measured by what a trillionth of the others' size would be.
        scale = row.scale or max(_norm(truth), 2.0**-40 * typical * truth.size**0.5)
        exact, own = row.of("port", "float64"), {side: row.of(side, "float32") for side in ("reference", "port")}
        figures = {
            "exact": _apart(exact, truth, scale),
            "reference": _apart(own["reference"], truth, scale),
            "port": _apart(own["port"], exact, scale),
            "difference": _apart(own["port"], own["reference"], scale),
            "error": _apart(own["port"], truth, scale),
            # Few elements may be right by luck; what is far smaller than all else, a gradient that cancels, is the noise of others.
            "luck": OWN ** (1 / truth.size) * max(1.0, typical * truth.size**0.5 / scale if scale else 1.0),
        }
        if self.dtype == "bfloat16":
            a, b = (row.of(side, "bfloat16") for side in ("port", "reference"))
            figures |= {"difference": _apart(a, b, scale), "error": _apart(a, truth, scale), "theirs": _apart(b, truth, scale)}
        return figures

    def _bounded(self, name: str, f: dict[str, float], floors: dict[str, float], own: float) -> Measurement:
        reference, port = (max(f[side], floors[side], 2.0**-24) for side in ("reference", "port"))
        most = own * f["luck"] * reference
        errors = reference + (port if port <= most else most)
        bounds = {"float32": FACTOR * errors, "float64": EXTRAPOLATED * 2.0**-29 * errors, "bfloat16": EXTRAPOLATED * 2.0**16 * errors}
        exact_bound = self._by_hand(self.exact_bounds, name, bounds["float64"])
        if self.dtype == "float64":
            return Measurement(name, f["exact"], exact=f["exact"], bound=exact_bound, exact_bound=exact_bound)
        bound = self._by_hand(self.bounds, name, bounds[self.dtype])
        # A relative bound of 1 or more implies nothing: such a tensor is compared in float64 alone.
        difference = f["difference"] if bound < 1 else None
        return Measurement(name, difference, f["error"], f.get("theirs", f["reference"]), f["exact"], bound, exact_bound)

    def check_bounds(self) -> None:
        """What was given by hand is for something.

        Raises:
            InputError: a name or pattern that no tensor has.
        """
        for pattern in (*self.bounds, *self.exact_bounds):
            if not fnmatch.filter(self.bounded, pattern):
                raise InputError(f"bounds: no tensor that was compared is called {pattern}{closest(pattern, sorted(self.bounded))}")

    def _by_hand(self, given: Mapping[str, float], name: str, derived: float) -> float:
        self.bounded.add(name)
        return next((bound for pattern, bound in given.items() if fnmatch.fnmatchcase(name, pattern)), derived)


def _nearer_with_channels_last(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether y is so laid out, of two arrays whose shapes don't tell."""
    shape = x.shape[1:2] * (x.ndim - 1)
    return x.ndim > 2 and x.shape[1:] == y.shape[1:] == shape and _norm(np.moveaxis(x, 1, -1), y) < _norm(x, y)


def _rms(x: np.ndarray) -> float:
    return _norm(x) / x.size**0.5 if x.size else 0.0


def _apart(a: np.ndarray, b: np.ndarray, scale: float) -> float:
    """||a - b|| / scale; 0 for equal arrays."""
    distance = _norm(a, b)
    return 0.0 if distance == 0 else distance / scale if scale else float("inf")


def _norm(a: np.ndarray, b: np.ndarray | float = 0.0) -> float:
    """||a - b||, added up in float64, some rows at a time: of a tensor of half a gigabyte there is no second one."""
    a, b = np.atleast_1d(a), np.broadcast_to(b, np.atleast_1d(a).shape)
    rows = max(1, 2**20 * len(a) // max(1, a.size))
    wide = np.complex128 if "c" in a.dtype.kind + b.dtype.kind else np.float64
    parts = (np.abs(a[i : i + rows].astype(wide) - b[i : i + rows]) for i in range(0, len(a), rows))
    return float(np.sqrt(sum(np.square(part).sum() for part in parts)))
