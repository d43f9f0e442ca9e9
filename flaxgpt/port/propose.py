"""A first table of names, made of names, shapes and order. It is a draft: what is doubtful is said."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flaxgpt.errors import InputError
from flaxgpt.port.names import SAME_LEAF, Link, Table, Target
from flaxgpt.port.pair import Pair

Shape = tuple[int, ...]

Layers = dict[str, Shape]
"""The number of a layer -> the shape there; of what is no layer's, the number is empty."""

Units = list[tuple[str, ...]]
"""Parameters that are matched together."""


@dataclass(frozen=True)
class Proposal:
    """A table, and what it leaves open."""

    names: dict[str, Target]
    """To be given to a Pair."""
    doubtful: tuple[str, ...]
    """Parameters of the reference that might as well be something else, and what."""
    unmatched: tuple[str, ...]
    """Parameters of either side without a counterpart, and the nearest candidates."""

    @property
    def lines(self) -> list[str]:
        """The table as Python, and the rest as comments."""
        rows = [f"    {key!r}: {value!r}," for key, value in self.names.items()]
        comments = [f"# doubtful: {text}" for text in self.doubtful] + [f"# no counterpart: {text}" for text in self.unmatched]
        return ["names = {", *rows, "}", *comments]


def propose(pair: Pair) -> Proposal:
    """A table for a pair; the one that it has is not looked at."""
    return propose_names(pair.reference.shapes(pair.batch), pair.port.shapes(pair.batch))


def propose_names(reference: Mapping[str, Shape], port: Mapping[str, Shape]) -> Proposal:
    """A table for parameters of these names and shapes, layers taken apart, in the order of the models.

    Parameters of the layers are matched together, "layers.0.attn.q" and "layers.1.attn.q": first whole modules, weight and bias, then
    parameters, then those of one layer, which may be numbered otherwise. A candidate has the shape in the usual layout, or as it is, or
    as a part of two or three side by side; the best one has the most similar name, at about the same place.
    """
    ours, theirs = _layers(reference), _layers(port)
    pairs: dict[str, list[str]] = {}
    doubtful: list[str] = []

    def left() -> tuple[dict[str, Layers], dict[str, Layers]]:
        taken = {b for several in pairs.values() for b in several}
        return {a: ours[a] for a in ours if a not in pairs}, {b: theirs[b] for b in theirs if b not in taken}

    def match(units: Callable[[Iterable[str]], Units], number: str = r"\g<0>") -> None:
        found, doubts = _matched(*map(units, left()), ours, theirs, number)
        pairs.update({a: [b] for a, b in found.items()})
        doubtful.extend(doubts)

    match(_modules)
    match(_single)
    for a in left()[0]:
        if several := _parts(a, ours[a], left()[1]):
            pairs[a] = several
    ours, theirs = (_opened(groups, rest) for groups, rest in zip((ours, theirs), left(), strict=True))
    match(_modules, "")
    match(_single, "")
    alone, candidates = left()
    unmatched = [f"{a} {list(_first(ours[a]))} of the reference{_nearest(a, candidates)}" for a in alone]
    unmatched += [f"{b} {list(_first(theirs[b]))} of the port{_nearest(b, alone)}" for b in candidates]
    return Proposal(_rows(ours, theirs, {a: pairs[a] for a in ours if a in pairs}), tuple(doubtful), tuple(unmatched))


AS_IT_IS = "a b -> a b"
"""The layout of a matrix that is (in, out) on both sides, whatever it is called."""


def _layers(shapes: Mapping[str, Shape]) -> dict[str, Layers]:
    """Names with {} for the number of a layer -> those layers. Of several numbers in a name, it is the first that makes equal shapes."""
    found, left = {}, [*shapes]
    for place in range(max((len(_NUMBER.findall(name)) for name in shapes), default=0)):
        groups: dict[str, Layers] = {}
        for name in left:
            if len(numbers := [*_NUMBER.finditer(name)]) > place:
                start, end = numbers[place].span()
                groups.setdefault(f"{name[:start]}{{}}{name[end:]}", {})[numbers[place][0]] = tuple(shapes[name])
        found |= {pattern: group for pattern, group in groups.items() if len(group) > 1 and len({*group.values()}) == 1}
        known = {name for pattern, group in found.items() for name in _names(pattern, group)}
        left = [name for name in left if name not in known]
    found |= {name: {"": tuple(shapes[name])} for name in left}  # numbers that are no layers': the parts of a Sequential
    order = {name: i for i, name in enumerate(shapes)}
    return dict(sorted(found.items(), key=lambda group: order[_names(*group)[0]]))


_NUMBER = re.compile(r"(?<![^._])\d+(?=\.)|(?<=[a-z])\d+(?=\.)")


def _names(pattern: str, layers: Layers) -> list[str]:
    return [pattern.replace("{}", number) for number in layers]


def _first(layers: Layers) -> Shape:
    return next(iter(layers.values()))


def _opened(groups: Mapping[str, Layers], rest: Mapping[str, Layers]) -> dict[str, Layers]:
    """The layers of the rest one by one."""
    opened = {}
    for pattern, layers in groups.items():
        numbers = sorted(layers, key=lambda number: int(number or 0))
        opened |= {pattern.replace("{}", n): {"": layers[n]} for n in numbers} if pattern in rest else {pattern: layers}
    return opened


def _modules(names: Iterable[str]) -> Units:
    """The weight and the bias of a module together; what a module has beside them alone."""
    modules: dict[str, dict[int, str]] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        kind = next((i for i, group in enumerate(SAME_LEAF) if leaf in group), None)
        modules.setdefault(name if kind is None else module, {})[kind or 0] = name
    return [tuple(name for _, name in sorted(module.items())) for module in modules.values()]


def _single(names: Iterable[str]) -> Units:
    return [(name,) for name in names]


def _matched(
    units: Units, others: Units, ours: Mapping[str, Layers], theirs: Mapping[str, Layers], number: str
) -> tuple[dict[str, str], list[str]]:
    """Parameters of the reference and those of the port, and what might as well be something else; numbers in names count as said."""
    places = [{name: i / len(groups) for i, name in enumerate(groups)} for groups in (ours, theirs)]
    candidates = [
        # Linen's parameters come in the order of the alphabet: their place says little.
        (_similarity(*(_NUMBER.sub(number, unit[0]) for unit in (a, b))) + 0.2 * (1 - abs(places[0][a[0]] - places[1][b[0]])), a, b)
        for a, b in itertools.product(units, others)
        if len(a) == len(b) and all(_alike(x, y, ours[x], theirs[y]) for x, y in zip(a, b, strict=True))
    ]
    matched: dict[tuple[str, ...], tuple[str, ...]] = {}
    doubtful = []
    for score, a, b in sorted(candidates, reverse=True):
        if a not in matched and b not in matched.values():
            matched[a] = b
            rivals = [y[0] for other, x, y in candidates if x == a and y not in matched.values() and other > score - 0.05]
            doubtful += [f"{a[0]} -> {b[0]}, or {', '.join(rivals)}"] if rivals else []
    return {x: y for a, b in matched.items() for x, y in zip(a, b, strict=True)}, doubtful


def _alike(a: str, b: str, ours: Layers, theirs: Layers) -> bool:
    """The same layers of shapes that fit."""
    return ours.keys() == theirs.keys() and any(_fits(a, [b], _first(ours), [_first(theirs)], pattern) for pattern in (None, AS_IT_IS))


def _fits(a: str, several: Sequence[str], ours: Shape, theirs: Sequence[Shape], pattern: str | None) -> bool:
    if pattern is not None and (len(several) > 1 or len(ours) != 2):
        return False
    try:
        Link((a,), tuple(several), pattern).to_port([np.empty(ours, np.bool_)], theirs)
    except InputError:
        return False
    return True


def _parts(a: str, ours: Layers, left: Mapping[str, Layers]) -> list[str]:
    """Two or three neighbours of the port that are this parameter side by side; queries before keys before values."""
    for size in (3, 2):
        for first in left:
            several = [b for b in left if b.rpartition(".")[2] == first.rpartition(".")[2] and left[b].keys() == ours.keys()]
            several = several[several.index(first) :][:size] if first in several else []
            if len(several) == size and _fits(a, several, _first(ours), [_first(left[b]) for b in several], None):
                return sorted(several, key=lambda b: next((i for i, group in enumerate(_SYNONYMS[:3]) if _words(b) & group), 3))
    return []


def _rows(ours: Mapping[str, Layers], theirs: Mapping[str, Layers], pairs: Mapping[str, list[str]]) -> dict[str, Target]:
    """A row for each module, and one for each parameter that this does not imply."""
    shapes = {a: _first(layers) for a, layers in ours.items()}
    single = {a: several[0] for a, several in pairs.items() if len(several) == 1}
    # Square matrices fit either way: they are laid out as those that are not square.
    telling = [a for a, b in single.items() if not _fits(a, [b], shapes[a], [_first(theirs[b])], None)]
    usual = [a for a, b in single.items() if len(set(shapes[a])) == 2 and b.endswith(".kernel") and a not in telling]
    as_it_is = telling + [a for a, b in single.items() if b.endswith(".kernel") and len(set(shapes[a])) == 1 and telling and not usual]
    table: dict[str, Target] = {}
    for a, several in pairs.items():
        module, modules = a.rpartition(".")[0], [b.rpartition(".")[0] for b in several]
        if len(several) > 1:
            table[module] = modules
            continue
        names = Table({module: modules[0]})
        first = [name.replace("{}", "0") for name in (a, several[0], *theirs)]
        if module and table.get(module, modules[0]) == modules[0] and names.counterpart(first[0], first[2:]) == first[1]:
            if module != modules[0]:
                table[module] = modules[0]
        elif a != several[0]:
            table[a] = several[0]
        if a in as_it_is and len(shapes[a]) == 2:
            table[a] = (several[0], AS_IT_IS)
    return table


_SYNONYMS = (
    {"q", "query", "wq"}, {"k", "key", "wk"}, {"v", "value", "wv"}, {"o", "out", "wo"}, {"norm", "ln", "layernorm", "rmsnorm"},
    {"embed", "embedding", "emb", "embeddings", "wte"}, {"tokens", "tok", "wte", "token"}, {"positions", "pos", "wpe", "position"},
    {"mlp", "ff", "ffn", "feedforward", "feed"}, {"attn", "attention", "att", "self"}, {"up", "fc", "w1"}, {"down", "w2"},
    {"head", "lm", "logits", "unembed"}, {"layers", "blocks", "h", "block", "layer", "trf"}, {"weight", "kernel", "scale"},
    {"post", "2"}, {"input", "1"}, {"f", "final"}, {"encoder", "enc"}, {"decoder", "dec"}, {"batchnorm", "bn"}, {"groupnorm", "gn"},
)  # fmt: skip


def _words(name: str) -> set[str]:
    name = re.sub(r"EncDec|encoder_(?=attn)", "Cross", name)  # a decoder's attention to the encoder is in T5 and BART of transformers
    words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|\d+|[A-Z]+", name)} - {"model", "transformer", "proj"}
    return words | {f"={i}" for i, group in enumerate(_SYNONYMS) if words & group}


def _similarity(a: str, b: str) -> float:
    """From 0 to 3: words in common, and letters."""
    x, y = _words(a), _words(b)
    return 2 * len(x & y) / max(1, len(x | y)) + difflib.SequenceMatcher(None, a, b).ratio()


def _nearest(name: str, others: Sequence[str]) -> str:
    near = sorted(others, key=lambda other: -_similarity(name, other))[:3]
    return f"; candidates: {', '.join(near)}" if near else ""
