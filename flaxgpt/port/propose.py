"""A first table of names, made of names, shapes and order. It is a draft: what is doubtful is said."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flaxgpt.errors import InputError
from flaxgpt.port.names import Link, Table, Target
from flaxgpt.port.pair import Pair

Shape = tuple[int, ...]


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

    Parameters of the layers are matched together, "layers.0.attn.q" and "layers.1.attn.q". A candidate has the shape in the usual layout,
    or as it is, or as a part of two or three side by side; the best one has the most similar name, at about the same place.
    """
    ours, theirs = _layers(reference), _layers(port)
    candidates = [
        (_similarity(a, b) + 0.5 * (1 - abs(i / len(ours) - j / len(theirs))), a, b)
        for (i, a), (j, b) in itertools.product(enumerate(ours), enumerate(theirs))
        if len(ours[a]) == len(theirs[b]) and any(_fits(a, [b], ours[a], [theirs[b]], pattern) for pattern in (None, AS_IT_IS))
    ]
    matched: dict[str, str] = {}
    doubtful = []
    for score, a, b in sorted(candidates, reverse=True):
        if a not in matched and b not in matched.values():
            matched[a] = b
            rivals = [y for other, x, y in candidates if x == a and y != b and y not in matched.values() and other > score - 0.05]
            doubtful += [f"{a} -> {b}, or {', '.join(rivals)}"] if rivals else []
    left = [b for b in theirs if b not in matched.values()]
    parts = {a: found for a in ours if a not in matched and (found := _parts(a, ours[a], {b: theirs[b] for b in left}))}
    left = [b for b in left if not any(b in several for several in parts.values())]
    alone = [a for a in ours if a not in matched and a not in parts]
    unmatched = [f"{a} {list(ours[a][0])} of the reference{_nearest(a, left)}" for a in alone]
    unmatched += [f"{b} {list(theirs[b][0])} of the port{_nearest(b, alone)}" for b in left]
    pairs = {a: [b] for a, b in matched.items()} | parts
    return Proposal(_rows(ours, theirs, {a: pairs[a] for a in ours if a in pairs}), tuple(doubtful), tuple(unmatched))


AS_IT_IS = "a b -> a b"
"""The layout of a matrix that is (in, out) on both sides, whatever it is called."""


def _layers(shapes: Mapping[str, Shape]) -> dict[str, list[Shape]]:
    """Names with {} for the numbers -> the shapes of all that are so called."""
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(re.sub(r"(?<![^._])\d+(?=\.)|(?<=[a-z])\d+(?=\.)", "{}", name, count=1), []).append(name)
    found: dict[str, list[Shape]] = {}
    for pattern, names in groups.items():
        if len(names) > 1 and len({tuple(shapes[name]) for name in names}) == 1:
            found[pattern] = [tuple(shapes[name]) for name in names]
        else:  # numbers that are no layers': "norm1", or the parts of a Sequential
            found |= {name: [tuple(shapes[name])] for name in names}
    return found


def _fits(a: str, several: Sequence[str], ours: Sequence[Shape], theirs: Sequence[Sequence[Shape]], pattern: str | None) -> bool:
    if pattern is not None and (len(several) > 1 or len(ours[0]) != 2):
        return False
    try:
        Link((a,), tuple(several), pattern).to_port([np.empty(ours[0], np.bool_)], [shapes[0] for shapes in theirs])
    except InputError:
        return False
    return True


def _parts(a: str, ours: Sequence[Shape], left: Mapping[str, Sequence[Shape]]) -> list[str]:
    """Two or three neighbours of the port that are this parameter side by side; queries before keys before values."""
    for size in (3, 2):
        for first in left:
            several = [b for b in left if b.rpartition(".")[2] == first.rpartition(".")[2] and len(left[b]) == len(ours)]
            several = several[several.index(first) :][:size] if first in several else []
            if len(several) == size and _fits(a, several, ours, [left[b] for b in several], None):
                return sorted(several, key=lambda b: next((i for i, group in enumerate(_SYNONYMS[:3]) if _words(b) & group), 3))
    return []


def _rows(ours: Mapping[str, list[Shape]], theirs: Mapping[str, list[Shape]], pairs: Mapping[str, list[str]]) -> dict[str, Target]:
    """A row for each module, and one for each parameter that this does not imply."""
    single = {a: several[0] for a, several in pairs.items() if len(several) == 1}
    # Square matrices fit either way: they are laid out as those that are not square.
    telling = [a for a, b in single.items() if not _fits(a, [b], ours[a], [theirs[b]], None)]
    usual = [a for a, b in single.items() if len(set(ours[a][0])) == 2 and b.endswith(".kernel") and a not in telling]
    as_it_is = telling + [a for a, b in single.items() if b.endswith(".kernel") and len(set(ours[a][0])) == 1 and telling and not usual]
    table: dict[str, Target] = {}
    for a, several in pairs.items():
        module, modules = a.rpartition(".")[0], [b.rpartition(".")[0] for b in several]
        if len(several) > 1:
            table[module] = modules
            continue
        names = Table({module: modules[0]})
        first = [name.replace("{}", "0") for name in (a, several[0], *theirs)]
        if module and names.counterpart(first[0], first[2:]) == first[1]:
            if module != modules[0]:
                table[module] = modules[0]
        elif a != several[0]:
            table[a] = several[0]
        if a in as_it_is and len(ours[a][0]) == 2:
            table[a] = (several[0], AS_IT_IS)
    return table


_SYNONYMS = (
    {"q", "query", "wq"}, {"k", "key", "wk"}, {"v", "value", "wv"}, {"o", "out", "wo"}, {"norm", "ln", "layernorm", "rmsnorm"},
    {"embed", "embedding", "emb", "embeddings", "wte"}, {"tokens", "tok", "wte", "token"}, {"positions", "pos", "wpe", "position"},
    {"mlp", "ff", "ffn", "feedforward", "feed"}, {"attn", "attention", "att", "self"}, {"up", "fc", "w1"}, {"down", "w2"},
    {"head", "lm", "logits", "unembed"}, {"layers", "blocks", "h", "block", "layer", "trf"}, {"weight", "kernel", "scale"},
    {"post", "2"}, {"input", "1"}, {"f", "final"},
)  # fmt: skip


def _words(name: str) -> set[str]:
    words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|\d+|[A-Z]+", name)} - {"model", "transformer", "proj"}
    return words | {f"={i}" for i, group in enumerate(_SYNONYMS) if words & group}


def _similarity(a: str, b: str) -> float:
    """From 0 to 2: words in common, and letters."""
    x, y = _words(a), _words(b)
    return len(x & y) / max(1, len(x | y)) + difflib.SequenceMatcher(None, a, b).ratio()


def _nearest(name: str, others: Sequence[str]) -> str:
    near = sorted(others, key=lambda other: -_similarity(name, other))[:3]
    return f"; candidates: {', '.join(near)}" if near else ""
