"""The usual suspects: what a piece of a model could compute, in NumPy, with everything that ports get wrong as an option.

    cause = find_cause(Place({"norm1.input": x_BTD}, {"weight": w_D}, reference=y_BTD, port=z_BTD))
    cause.changes                                # (Change("eps", "1e-06", "1e-05"),)

A family (norm, convolution, linear layer, embedding, activation, attention, sum) is a function of a choice of options. Nobody says which
family a piece belongs to: it is the one that, with some choice, computes what the reference has computed. Then the choice nearest to that
one is looked for which computes what the port has. So a cause is named only if it has been seen to explain both sides.

B batch, T query position, S key position, D width, N heads, K heads of keys and values, H head size.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

Tensors = Mapping[str, np.ndarray]
Choice = dict[str, str]
"""A value for each option."""


@dataclass(frozen=True)
class Place:
    """Where the sides part: what goes in, the same on both, and what each makes of it. Arrays are float64, ids are integers."""

    sources: Tensors
    """What the reference has computed before, or a module's inputs; in the order of computation."""
    weights: Tensors
    """The module's own parameters in the reference, by their local names; empty between modules."""
    reference: np.ndarray
    port: np.ndarray
    later: Tensors = field(default_factory=dict)
    """What the port has computed which the reference computes only later."""
    others: Tensors = field(default_factory=dict)
    """All other parameters of the reference, by name: what the port may have used instead."""
    keep_BT: np.ndarray | None = None
    """1 where there is a token, 0 where there is padding."""
    after: Callable[[np.ndarray], np.ndarray] = lambda x: x
    """What is still done to what a family computes: a last linear layer, where the port has no place before it."""
    inner: tuple[int, ...] | None = None
    """The shape before that."""
    noise: float = 1e-9
    """What rounding may leave, relative."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what a family computes."""
        return self.inner or self.reference.shape

    @property
    def limit(self) -> float:
        """How near a formula must come, relative: to rounding, and far nearer than the sides are to each other."""
        difference = distance(self.port, self.reference)
        return min(difference / 5, max(self.noise, min(difference / 1000, 1e-6)))


class Change(NamedTuple):
    """An option that the two sides have chosen differently."""

    option: str
    port: str
    reference: str


@dataclass(frozen=True)
class Cause:
    """Changes of a formula which computes what the reference has, after which it computes what the port has."""

    family: str
    changes: tuple[Change, ...]
    agreement: float
    """The relative difference between the changed formula and the port."""


class Option(NamedTuple):
    """A thing that can be done in several ways: those that models differ in, and those that are mistakes everywhere."""

    right: tuple[str, ...]
    wrong: tuple[str, ...] = ()


class Family(NamedTuple):
    """A piece of a model."""

    name: str
    options: Callable[[Place], dict[str, Option] | None]
    """None where the shapes say that the piece is something else."""
    compute: Callable[[Place, Choice], np.ndarray | None]
    """None where a choice makes no sense there."""


def find_cause(place: Place) -> Cause | None:
    """The smallest change of options that turns what the reference computes into what the port does; at most two options are changed."""
    if not place.shape:
        return None  # a single number is a result, and no piece of a model
    for family in FAMILIES:
        options = family.options(place) if place.sources else None
        right = _first_that_fits(family, place, options) if options else None
        for count in (1, 2) if right else ():
            causes = [
                Cause(family.name, changes, _misses(family, place, right | {change.option: change.port for change in changes}, place.port))
                for changes in _changes(right, options, count)
            ]
            best = min(causes, key=lambda cause: cause.agreement, default=None)
            if best and best.agreement <= place.limit:
                return best
    return None


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """||a - b|| / ||b|| over what is finite in b; inf if nothing is, or if a is not finite there."""
    finite = np.isfinite(b)
    size = float(np.linalg.norm(b[finite]))
    if not finite.any() or not np.isfinite(a[finite]).all():
        return math.inf
    return float(np.linalg.norm(a[finite] - b[finite])) / (size or 1.0)


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
    """The numbers with so many bits of significand, rounded to the nearest: 8 for bfloat16, 11 for TF32 and float16, 24 for float32."""
    significand, exponent = np.frexp(x)
    return np.ldexp(np.rint(np.ldexp(significand, bits)), exponent - bits)


def _misses(family: Family, place: Place, choice: Choice, target: np.ndarray) -> float:
    with np.errstate(all="ignore"):
        computed = family.compute(place, choice)
        computed = None if computed is None else place.after(computed)
    return math.inf if computed is None or computed.shape != target.shape else distance(computed, target)


def _first_that_fits(family: Family, place: Place, options: dict[str, Option]) -> Choice | None:
    """A choice that computes what the reference has computed."""
    choices = (dict(zip(options, chosen, strict=True)) for chosen in itertools.product(*(option.right for option in options.values())))
    return next((choice for choice in choices if _misses(family, place, choice, place.reference) <= place.limit), None)


def _changes(right: Choice, options: dict[str, Option], count: int) -> Iterator[tuple[Change, ...]]:
    """All ways to choose so many options otherwise."""
    for names in itertools.combinations(options, count):
        values = ([value for value in (*options[name].right, *options[name].wrong) if value != right[name]] for name in names)
        for chosen in itertools.product(*values):
            yield tuple(Change(name, value, right[name]) for name, value in zip(names, chosen, strict=True))


# Norms

EPSILONS = ("1e-05", "1e-06", "1e-12", "1e-08", "1e-07", "0.001", "0.0001", "0")


def _norm_options(place: Place) -> dict[str, Option] | None:
    (x, *more), vectors = place.sources.values(), place.weights.values()
    if more or x.shape != place.shape or len(vectors) > 2 or any(w.shape != x.shape[-1:] for w in vectors):
        return None
    scale, shift = _scale_and_shift(place.weights)
    return {
        "norm": Option(("RMS norm", "layer norm")),
        "eps": Option(EPSILONS),
        "eps is added to": Option(("the variance", "its root")),
        "variance": Option(("biased",), ("unbiased",)),
        "weight": Option(("none",)) if scale is None else Option(("times weight", "times 1 + weight"), ("forgotten",)),
        "bias": Option(("none",)) if shift is None else Option(("added",), ("forgotten",)),
        "normalised over": Option(("the last axis",), ("the axis before", "all axes but the batch's")),
        "precision": Option(("exact",), tuple(PRECISIONS)),
    }


def _norm(place: Place, choice: Choice) -> np.ndarray | None:
    (x,), (scale, shift) = place.sources.values(), _scale_and_shift(place.weights)
    axes = {"the last axis": (-1,), "the axis before": (-2,)}.get(choice["normalised over"], tuple(range(1, x.ndim)))
    if x.ndim < 2 and axes != (-1,):
        return None
    x = _in_precision(x, choice)
    x = x - x.mean(axes, keepdims=True) if choice["norm"] == "layer norm" else x
    count = math.prod(x.shape[axis] for axis in axes)
    variance = (x * x).sum(axes, keepdims=True) / (count - (choice["variance"] == "unbiased"))
    eps = float(choice["eps"])
    x = x / (np.sqrt(variance + eps) if choice["eps is added to"] == "the variance" else np.sqrt(variance) + eps)
    if "times" in choice["weight"]:
        x = x * (scale + (choice["weight"] == "times 1 + weight"))
    return x + shift if choice["bias"] == "added" else x


def _scale_and_shift(weights: Tensors) -> tuple[np.ndarray | None, np.ndarray | None]:
    """By name: every framework calls the one that is added bias, shift or beta."""
    shifts = [name for name in weights if any(word in name.lower() for word in ("bias", "shift", "beta"))]
    scales = [name for name in weights if name not in shifts]
    return tuple(weights[names[0]] if names else None for names in (scales, shifts))


# Batch norms, which use what was counted in training

ROOTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "the variance": lambda v: v,
    "the standard deviation": np.sqrt,
    "the squared variance": np.square,
    "1": np.ones_like,
}


def _batch_norm_options(place: Place) -> dict[str, Option] | None:
    (x, *more), w = place.sources.values(), place.weights
    if more or x.shape != place.shape or x.ndim < 2 or any(np.shape(w.get(f"running_{what}")) != x.shape[1:2] for what in ("mean", "var")):
        return None
    return {
        "eps": Option(EPSILONS),
        "divided by the root of": Option(tuple(ROOTS)[:1], tuple(ROOTS)[1:]),
        "mean": Option(("taken away",), ("left",)),
        "statistics": Option(("the running ones",), ("the batch's",)),
        "weight": Option(("times weight",), ("forgotten",)) if "weight" in w else Option(("none",)),
        "bias": Option(("added",), ("forgotten",)) if "bias" in w else Option(("none",)),
    }


def _batch_norm(place: Place, choice: Choice) -> np.ndarray:
    (x,), w = place.sources.values(), place.weights
    over = (0, *range(2, x.ndim))
    batch = choice["statistics"] == "the batch's"
    mean, variance = (x.mean(over), x.var(over)) if batch else (w["running_mean"], w["running_var"])
    scale = ROOTS[choice["divided by the root of"]](variance) + float(choice["eps"])
    ones = [1] * (x.ndim - 2)
    y = (x - (choice["mean"] == "taken away") * mean.reshape(-1, *ones)) / np.sqrt(scale).reshape(-1, *ones)
    y = y * w["weight"].reshape(-1, *ones) if choice["weight"] == "times weight" else y
    return y + w["bias"].reshape(-1, *ones) if choice["bias"] == "added" else y


# Group norms, of channels that come after the batch


def _group_norm_options(place: Place) -> dict[str, Option] | None:
    (x, *more), w = place.sources.values(), place.weights
    if more or x.shape != place.shape or x.ndim < 3 or not 0 < len(w) < 3 or any(v.shape != x.shape[1:2] for v in w.values()):
        return None
    scale, shift = _scale_and_shift(w)
    return {
        "groups": Option(tuple(map(str, _divisors(x.shape[1])))),
        "eps": Option(EPSILONS),
        "variance": Option(("biased",), ("unbiased",)),
        "weight": Option(("none",)) if scale is None else Option(("times weight",), ("forgotten",)),
        "bias": Option(("none",)) if shift is None else Option(("added",), ("forgotten",)),
    }


def _group_norm(place: Place, choice: Choice) -> np.ndarray:
    (x,), (scale, shift) = place.sources.values(), _scale_and_shift(place.weights)
    groups, ones = x.reshape(len(x), int(choice["groups"]), -1), [1] * (x.ndim - 2)
    centred = groups - groups.mean(-1, keepdims=True)
    variance = groups.var(-1, keepdims=True, ddof=choice["variance"] == "unbiased")
    y = (centred / np.sqrt(variance + float(choice["eps"]))).reshape(x.shape)
    y = y * scale.reshape(-1, *ones) if choice["weight"] == "times weight" else y
    return y + shift.reshape(-1, *ones) if choice["bias"] == "added" else y


# Convolutions, as torch has them: (B, in, *sizes), by a weight (out, in of the group, *window)

WINDOWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as given": lambda w: w,
    "backwards": lambda w: np.flip(w, range(2, w.ndim)),
    "with its axes exchanged": lambda w: w.transpose(0, 1, *range(w.ndim - 1, 1, -1)),
    "with in and out exchanged": lambda w: w.swapaxes(0, 1),
}


def _convolution_options(place: Place) -> dict[str, Option] | None:
    (x, *more), (w, b) = place.sources.values(), _scale_and_shift(place.weights)
    if more or w is None or not 2 < w.ndim == x.ndim == len(place.shape) or x.shape[1] % w.shape[1] or len(w) != place.shape[1]:
        return None
    if x.size * math.prod(w.shape[2:]) > 2**24:
        return None
    return {
        "padding": Option(tuple(f"{p} on both sides" for p in range(max(w.shape[2:]))), ("SAME", "all before", "all behind")),
        "stride": Option(tuple(str(stride) for stride in range(1, 1 + max(4, *w.shape[2:])))),
        "window": Option(("as given",), tuple(WINDOWS)[1:]),
        "bias": Option(("none",)) if b is None else Option(("added",), ("forgotten",)),
    }


def _convolution(place: Place, choice: Choice) -> np.ndarray | None:
    (x,), (w, b) = place.sources.values(), _scale_and_shift(place.weights)
    w_OIk, stride, shape = WINDOWS[choice["window"]](w), int(choice["stride"]), place.shape[2:]
    ends = [_ends(choice["padding"], *sizes, stride) for sizes in zip(x.shape[2:], w.shape[2:], shape, strict=True)]
    if w_OIk.shape != w.shape or any(
        (n + sum(end) - k) // stride + 1 != m for n, end, k, m in zip(x.shape[2:], ends, w.shape[2:], shape, strict=True)
    ):
        return None
    x, axes = np.pad(x, [(0, 0), (0, 0), *ends]), tuple(range(2, x.ndim))
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], axes)[
        (..., *[slice(None, None, stride)] * len(axes), *[slice(None)] * len(axes))
    ]
    groups = zip(np.split(windows, x.shape[1] // w.shape[1], 1), np.split(w_OIk, x.shape[1] // w.shape[1]), strict=True)
    inner = (1, *range(x.ndim, 2 * x.ndim - 2)), (1, *axes)
    y = np.concatenate([np.moveaxis(np.tensordot(part, kernel, inner), -1, 1) for part, kernel in groups], 1)
    return y + b.reshape(-1, *[1] * len(axes)) if choice["bias"] == "added" else y


def _ends(padding: str, size: int, window: int, result: int, stride: int) -> tuple[int, int]:
    """How much is put before and behind an axis."""
    if padding.endswith(" on both sides"):
        return (int(padding.split()[0]),) * 2
    total = max(0, (result - 1) * stride + window - size)
    before = {"SAME": total // 2, "all before": total, "all behind": 0}[padding]
    return before, total - before


# Linear layers

PRECISIONS = {"bfloat16": 8, "TF32 or float16": 11}


def _in_precision(x: np.ndarray, choice: Choice, part: str = "") -> np.ndarray:
    """The numbers, rounded if the choice is to compute in such a precision, or to round such a part to it."""
    bits = next(
        (bits for name, bits in PRECISIONS.items() if choice["precision"] in (name, f"{name} {part}", f"{name} with its result")), None
    )
    return rounded(x, bits) if bits else x


def _linear_options(place: Place) -> dict[str, Option] | None:
    (x, *more), (w, b) = place.sources.values(), _scale_and_shift(place.weights)
    inputs, outputs = x.shape[-1:], place.shape[-1:]
    if more or x.dtype.kind != "f" or not x.ndim or (w is not None and w.shape not in (outputs + inputs, inputs + outputs)):
        return None
    others = tuple(name for name, other in place.others.items() if other.shape == (outputs + inputs if w is None else w.shape))[:64]
    if w is None and not others:
        return None
    w = place.others[others[0]] if w is None else w
    roots = dict.fromkeys(f"{over}sqrt({size})" for size in (*inputs, *outputs) for over in ("", "1/"))
    return {
        "product": Option(
            tuple(layout for layout, shape in (("x W^T", outputs + inputs), ("x W", inputs + outputs)) if w.shape == shape),
            ("x W, W reshaped where it should be transposed",),
        ),
        "weight": Option(("its own",), others) if place.weights else Option(others),
        "bias": Option(("none",)) if b is None else Option(("added",), ("forgotten", "added twice")),
        "order of the outputs": Option(("as given",), tuple(_orders(*outputs))),
        "order of the inputs": Option(("as given",), tuple(_orders(*inputs))),
        "times": Option(("1",), (*roots, "2", "1/2")),
        "precision": Option(("exact",), tuple(f"{p}{of}" for p in PRECISIONS for of in ("", " inputs", " weights", " with its result"))),
    }


def _linear(place: Place, choice: Choice) -> np.ndarray:
    (x,), (w, b) = place.sources.values(), _scale_and_shift(place.weights)
    w = place.others.get(choice["weight"], w)
    x, w = _in_precision(x, choice, "inputs"), _in_precision(w, choice, "weights")
    x = x[..., _orders(x.shape[-1]).get(choice["order of the inputs"], slice(None))]
    w_IO = {"x W^T": w.T, "x W": w}.get(choice["product"])
    y = x @ (w.reshape(x.shape[-1], -1) if w_IO is None else w_IO) * _number(choice["times"])
    y = y + {"added": 1, "added twice": 2}.get(choice["bias"], 0) * (0 if b is None else b)
    y = y[..., _orders(y.shape[-1]).get(choice["order of the outputs"], slice(None))]
    return _in_precision(y, choice) if choice["precision"].endswith("with its result") else y


@functools.cache
def _orders(size: int) -> dict[str, np.ndarray]:
    """Orders in which so many features may come by mistake: of heads and their size, and of the parts of fused weights."""
    index = np.arange(size)
    orders = {f"({H}, {N}) read as ({N}, {H})": index.reshape(H, N).T for N in _divisors(size) for H in [size // N] if 1 < N < size}
    for parts in (2, 3):
        if size % parts == 0:
            orders |= {
                f"parts {' '.join(str(i + 1) for i in order)} of {parts}": index.reshape(parts, -1)[list(order)]
                for order in itertools.permutations(range(parts))
                if list(order) != sorted(order)
            }
            for N in _divisors(size // parts):
                H = size // parts // N
                if 1 < N and 1 < H:
                    orders[f"({N}, {parts}, {H}) read as ({parts}, {N}, {H})"] = index.reshape(N, parts, H).swapaxes(0, 1)
                    orders[f"({parts}, {N}, {H}) read as ({N}, {parts}, {H})"] = index.reshape(parts, N, H).swapaxes(0, 1)
    return {name: order.ravel() for name, order in orders.items()}


def _divisors(size: int) -> list[int]:
    return [n for n in range(1, size + 1) if size % n == 0]


def _number(text: str) -> float:
    """Of "1/sqrt(32)" and the like."""
    numerator, _, denominator = text.rpartition("/")
    root = denominator.startswith("sqrt(")
    value = float(denominator.removeprefix("sqrt(").removesuffix(")")) ** (0.5 if root else 1)
    return 1 / value if numerator else value


# Embeddings

IDS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "as given": lambda ids, rows: ids,
    "one more": lambda ids, rows: np.minimum(ids + 1, rows - 1),
    "one more, modulo their number": lambda ids, rows: (ids + 1) % rows,
    "one more, modulo the length": lambda ids, rows: (ids + 1) % ids.shape[-1],
    "two more": lambda ids, rows: np.minimum(ids + 2, rows - 1),
    "one less": lambda ids, rows: np.maximum(ids - 1, 0),
    "one less, modulo their number": lambda ids, rows: (ids - 1) % rows,
    "those of the position before": lambda ids, rows: np.roll(ids, 1, -1),
    "those of the position after": lambda ids, rows: np.roll(ids, -1, -1),
}


def _embedding_options(place: Place) -> dict[str, Option] | None:
    (ids, *more), tables = place.sources.values(), _tables(place)
    if more or ids.dtype.kind not in "iu" or not ids.ndim or len(tables) != 1:
        return None
    D = tables[0].shape[1]
    others = tuple(name for name, other in place.others.items() if other.shape == tables[0].shape)[:64]
    return {
        "ids": Option(("as given",), tuple(name for name in IDS if name != "as given")),
        "table": Option(("its own",), others),
        "times": Option(("1", f"sqrt({D})"), (f"1/sqrt({D})",)),
    }


def _embedding(place: Place, choice: Choice) -> np.ndarray | None:
    (ids,), (table,) = place.sources.values(), _tables(place)
    table = place.others.get(choice["table"], table)
    rows = IDS[choice["ids"]](ids, len(table))
    return table[rows] * _number(choice["times"]) if 0 <= rows.min() and rows.max() < len(table) else None


def _ids_options(place: Place) -> dict[str, Option] | None:
    return {"ids": Option(("as given",), tuple(IDS)[1:])} if place.reference.dtype.kind == "i" else None


def _ids(place: Place, choice: Choice) -> np.ndarray:
    """What goes into an embedding, of what goes into the reference's."""
    return IDS[choice["ids"]](place.reference, np.iinfo(np.int64).max)


def _tables(place: Place) -> list[np.ndarray]:
    """A module that also scales may have the factor beside its table."""
    return [w for w in place.weights.values() if w.ndim == 2]


# Activations


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "GELU (exact)": lambda x: x * (1 + np.vectorize(math.erf, [float])(x / 2**0.5)) / 2,
    "GELU (tanh)": lambda x: x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "GELU (sigmoid)": lambda x: x * _sigmoid(1.702 * x),
    "SiLU": lambda x: x * _sigmoid(x),
    "ReLU": lambda x: np.maximum(x, 0),
    "ReLU squared": lambda x: np.maximum(x, 0) ** 2,
    "leaky ReLU": lambda x: np.where(x > 0, x, 0.01 * x),
    "ELU": lambda x: np.where(x > 0, x, np.expm1(x)),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "softplus": lambda x: np.logaddexp(x, 0),
    "none": lambda x: x,
}


def _gated(place: Place) -> tuple[np.ndarray, np.ndarray | None] | None:
    """What is activated and what it is multiplied by, in the order of computation; None where no source fits."""
    if place.weights or not place.sources:
        return None
    sources, shape = [x for x in place.sources.values() if x.dtype.kind == "f"], place.shape
    if sources and sources[-1].shape == (*shape[:-1], 2 * shape[-1]):
        return tuple(np.split(sources[-1], 2, axis=-1))
    fits = [x for x in sources if x.shape == shape]
    return (fits[-2], fits[-1]) if len(fits) > 1 else (fits[0], None) if fits else None


def _activation_options(place: Place) -> dict[str, Option] | None:
    parts = _gated(place)
    if parts is None or parts[0].size > 2**22:
        return None
    of = ("the last",) if parts[1] is None else ("the last", "the first", "the first times the last", "the last times the first")
    return {"of": Option(of), "activation": Option(tuple(ACTIVATIONS))}


def _activation(place: Place, choice: Choice) -> np.ndarray:
    first, last = _gated(place)
    last = first if last is None else last
    activated, _, factor = choice["of"].partition(" times ")
    y = ACTIVATIONS[choice["activation"]](first if activated.endswith("first") else last)
    return y * (first if factor.endswith("first") else last) if factor else y


# Attention

BASES = ("10000", "500000", "1000000", "100000", "1000", "100", "5000000", "8000000")
ROTARY = ("none", *(f"{kind} with base {base}" for base in BASES for kind in ("halves", "pairs")))
MASKS: dict[str, Callable[[int], np.ndarray]] = {
    "causal": lambda T: np.tri(T),
    "none": lambda T: np.ones((T, T)),
    "causal and the next key": lambda T: np.tri(T, k=1),
    "causal without the own position": lambda T: np.tri(T, k=-1),
    "later keys only": lambda T: np.tri(T).T,
}
ROLES = tuple(itertools.permutations("qkv"))


def _projections(place: Place) -> list[np.ndarray] | None:
    """Queries, keys and values: the last three sources (B, T, ...), or the last one if it is as wide as three; heads are flattened."""
    if place.weights:
        return None
    sources = [x for x in place.sources.values() if x.dtype.kind == "f" and x.ndim == 3]
    if len(place.shape) == 3 and sources:
        D, width = place.shape[-1], sources[-1].shape[-1]
        if width > D and (width - D) % 2 == 0 and D % ((width - D) // 2) == 0:
            return [sources[-1]]
    if len(sources) < 3 or sources[-1].shape != sources[-2].shape or sources[-3].shape[-1] % sources[-1].shape[-1]:
        return None
    return sources[-3:]


def _attention_options(place: Place) -> dict[str, Option] | None:
    parts = _projections(place)
    if parts is None:
        return None
    D = place.shape[-1] if len(parts) == 1 else parts[0].shape[-1]
    Dk = (parts[0].shape[-1] - D) // 2 if len(parts) == 1 else parts[1].shape[-1]
    if len(place.shape) == 3 and place.shape[-1] != D:
        return None
    heads = [N for N in _divisors(D) if N < D and D // N <= Dk and Dk % (D // N) == 0]
    grouped, equal = D != Dk, D == Dk
    splits = ("(3, N, H)", "(N, 3, H)", "(N, H, 3)") if equal else ("(3, N, H)",)
    padding = ("not seen", "seen") if place.keep_BT is not None and not place.keep_BT.all() else ("seen",)
    swapped = ("queries", "keys", "values", "context", "queries and keys", "queries, keys and values", "all")
    return {
        "fused weights are split": Option(splits if len(parts) == 1 else ("no",)),
        "padding": Option(padding, ("nothing else seen",) if len(padding) == 2 else ()),
        "mask": Option(("causal", "none"), tuple(MASKS)[2:]),
        "scale": Option(("1/sqrt(H)", "1"), ("1/sqrt(D)", "1/H", "1/sqrt(N)", "sqrt(H)", "1/sqrt(K H)")),
        "rotary": Option(ROTARY, tuple(rotary.replace(" with", " backwards with") for rotary in ROTARY[1:])),
        "rotary turns": Option(("queries and keys",), ("queries", "keys", "queries, keys and values")),
        "positions": Option(("the same",), ("one more for queries", "one more for keys")),
        "grouped heads": Option(("repeated",), ("tiled",) if grouped else ()),
        "heads": Option(tuple(map(str, heads))),
        "(H, N) in place of (N, H)": Option(("nowhere",), swapped),
        "context": Option(("heads side by side",), ("not transposed back",)),
        "q k v are taken as": Option(("q k v",), tuple(" ".join(order) for order in ROLES[1:]) if equal else ("q v k",)),
        "a query that sees nothing": Option(("sees all",), ("gives zero",)),
        "softmax over": Option(("keys",), ("queries", "heads")),
        "precision": Option(("exact",), tuple(PRECISIONS)),
    }


def _attention(place: Place, choice: Choice) -> np.ndarray | None:
    parts, N = _projections(place), int(choice["heads"])
    fused = parts[0] if len(parts) == 1 else None
    D = place.shape[-1] if fused is not None else parts[0].shape[-1]
    H, swapped = D // N, choice["(H, N) in place of (N, H)"]
    if fused is not None:
        parts = _split(fused, D, N, H, choice["fused weights are split"])
    parts = [parts["qkv".index(role)] for role in choice["q k v are taken as"].split()]
    if H % 2 and choice["rotary"] != "none":
        return None
    heads = []
    for name, x in zip(("queries", "keys", "values"), parts, strict=True):
        x = _in_precision(x, choice)
        B, T, width = x.shape
        wrong = swapped == "all" or name in swapped
        x = x.reshape(B, T, H, width // H).transpose(0, 3, 1, 2) if wrong else x.reshape(B, T, width // H, H).swapaxes(1, 2)
        if choice["rotary"] != "none" and name in choice["rotary turns"]:
            x = _turned(x, np.arange(T) + (choice["positions"] == f"one more for {name}"), choice)
        heads.append(x)
    q_BNTH, k_BNSH, v_BNSH = (_grouped(x, N, choice["grouped heads"]) for x in heads)
    if not q_BNTH.shape == k_BNSH.shape == v_BNSH.shape:
        return None
    numbers = {"1": 1.0, "1/sqrt(H)": H**-0.5, "1/sqrt(D)": D**-0.5, "1/H": 1 / H, "1/sqrt(N)": N**-0.5, "sqrt(H)": H**0.5}
    scores_BNTS = q_BNTH @ k_BNSH.swapaxes(2, 3) * numbers.get(choice["scale"], heads[1].shape[1] ** -0.5 * H**-0.5)
    seen = MASKS[choice["mask"]](q_BNTH.shape[2])[None, None].astype(bool)
    if choice["padding"] != "seen":
        seen = seen & (place.keep_BT == (choice["padding"] == "not seen"))[:, None, None, :]
    axis = {"keys": 3, "queries": 2, "heads": 1}[choice["softmax over"]]
    scores_BNTS = np.where(seen, scores_BNTS, -1e30)  # not infinity: a query that sees nothing sees all
    weights_BNTS = np.exp(scores_BNTS - scores_BNTS.max(axis, keepdims=True))
    weights_BNTS = weights_BNTS / weights_BNTS.sum(axis, keepdims=True)
    if choice["a query that sees nothing"] == "gives zero":
        weights_BNTS = weights_BNTS * seen.any(3, keepdims=True)
    if place.shape == weights_BNTS.shape:
        return weights_BNTS
    context_BNTH = _in_precision(weights_BNTS, choice) @ v_BNSH
    B, _, T, _ = context_BNTH.shape
    order = (0, 2, 3, 1) if swapped in ("context", "all") else (0, 2, 1, 3)
    return (context_BNTH if choice["context"] == "not transposed back" else context_BNTH.transpose(order)).reshape(B, T, D)


def _split(fused: np.ndarray, D: int, N: int, H: int, how: str) -> list[np.ndarray]:
    if how == "(3, N, H)":
        return np.split(fused, [D, (fused.shape[-1] + D) // 2], axis=-1)
    shape, axis = ((N, 3, H), -2) if how == "(N, 3, H)" else ((N, H, 3), -1)
    x = fused.reshape(*fused.shape[:2], *shape)
    return [x.take(i, axis).reshape(*fused.shape[:2], D) for i in range(3)]


def _grouped(x_BKTH: np.ndarray, N: int, how: str) -> np.ndarray:
    times = N // max(1, x_BKTH.shape[1])
    return np.repeat(x_BKTH, times, axis=1) if how == "repeated" else np.tile(x_BKTH, (1, times, 1, 1))


def _turned(x_BNTH: np.ndarray, positions_T: np.ndarray, choice: Choice) -> np.ndarray:
    """Rotary embedding (Su et al. 2021): of halves, as transformers has it, or of neighbouring pairs, as the paper does."""
    H = x_BNTH.shape[-1]
    angles = np.outer(positions_T, float(choice["rotary"].split("base ")[1]) ** (-np.arange(0, H, 2) / H))
    cos, sin = np.cos(angles), np.sin(angles) * (-1 if "backwards" in choice["rotary"] else 1)
    halves = "halves" in choice["rotary"]
    a, b = (x_BNTH[..., : H // 2], x_BNTH[..., H // 2 :]) if halves else (x_BNTH[..., ::2], x_BNTH[..., 1::2])
    turned = [a * cos - b * sin, b * cos + a * sin]
    return np.concatenate(turned, -1) if halves else np.stack(turned, -1).reshape(x_BNTH.shape)


# Sums: shortcuts, and what goes into a module

SHIFTS = {"as they are": 0, "one position later": 1, "one position earlier": -1}


def _sum_options(place: Place) -> dict[str, Option] | None:
    before, later = (
        [name for name, x in xs.items() if x.shape == place.shape and x.dtype.kind == "f"] for xs in (place.sources, place.later)
    )
    if place.weights or not before:
        return None
    right = [" + ".join(terms) for count in (1, 2, 3) for terms in itertools.combinations(before[-12:], count)]
    wrong = [*later, *(" + ".join(terms) for terms in itertools.product(before[-12:], later))]
    D = place.shape[-1]
    return {
        "sum of": Option(tuple(right), tuple(wrong)),
        "taken": Option(("as they are",), tuple(SHIFTS)[1:] if len(place.shape) > 1 else ()),
        "times": Option(("1",), (f"sqrt({D})", f"1/sqrt({D})", "2", "1/2", "sqrt(2)", "1/sqrt(2)")),
    }


def _sum(place: Place, choice: Choice) -> np.ndarray:
    arrays = {**place.later, **place.sources}
    total = sum(arrays[name] for name in choice["sum of"].split(" + "))
    return np.roll(total, SHIFTS[choice["taken"]], min(1, total.ndim - 1)) * _number(choice["times"])


FAMILIES = (
    Family("norm", _norm_options, _norm),
    Family("batch norm", _batch_norm_options, _batch_norm),
    Family("group norm", _group_norm_options, _group_norm),
    Family("convolution", _convolution_options, _convolution),
    Family("linear layer", _linear_options, _linear),
    Family("ids", _ids_options, _ids),
    Family("embedding", _embedding_options, _embedding),
    Family("sum", _sum_options, _sum),
    Family("activation", _activation_options, _activation),
    Family("attention", _attention_options, _attention),
)
