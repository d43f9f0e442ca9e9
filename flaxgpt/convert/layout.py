"""The model's parameters <-> the tensors of another format, each read or made when it is asked for. Imports no framework.

A `Parameter` stands for one of the model's parameters while it still lies in a file: it has a shape, and is read where it is indexed,
so that a device can be given its part without the rest. `Written` is the same the other way round.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from flaxgpt.config import GPTConfig
from flaxgpt.convert.names import HEAD, PARAMETERS, Layout, Row, parameters, sizes
from flaxgpt.errors import InputError
from flaxgpt.types import Index, Indexable, Params

StateDict = dict[str, np.ndarray]


def open_params(tensors: Mapping[str, Indexable], cfg: GPTConfig, layout: Layout, dtype: DTypeLike = np.float32) -> dict[str, Any]:
    """The parameters of `flaxgpt.model.GPT` in the tensors of a state_dict, of which only what must be compared is read yet.

    Args:
        tensors: by the names of the layout; prefixes and causal masks may be there or not, and so may the head of a tied model, which must
            then equal the token embedding. Biases that the format has and the config has not must be zero.
        cfg: the model's config.
        layout: how the tensors are called and lie.
        dtype: what they are read in.

    Returns:
        Nested dict of `Parameter`s, those of the blocks with a leading L axis.

    Raises:
        InputError: naming every tensor that is missing, unknown, of the wrong shape or not what the config says.
    """
    keys = layout.full_names(tensors)  # its full name -> as it is called here
    (head,), (embedding,) = layout.names(HEAD, cfg), layout.names(PARAMETERS[0], cfg)
    tied_head = keys.pop(head, None) if cfg.tie_embeddings else None
    expected = tensor_shapes(cfg, layout)
    faults = shape_faults({name: tuple(tensors[key].shape) for name, key in keys.items()}, expected)
    if not faults and tied_head and not equal(tensors[tied_head], tensors[keys[embedding]]):
        faults.append(f"{head} differs from {embedding}, but tie_embeddings is set")
    if not faults:
        ours = {name for row in parameters(cfg) for name in layout.names(row, cfg)}
        biases = [name for name in expected if name not in ours and np.any(np.asarray(tensors[keys[name]][()]))]
        faults += [f"the config has no such biases, but they are not zero: {', '.join(biases)}"] if biases else []
    if faults:
        raise InputError("the state_dict does not fit the config: " + "; ".join(faults))
    params: dict[str, Any] = {}
    for row in parameters(cfg):
        insert(params, row.path, Parameter([tensors[keys[name]] for name in layout.names(row, cfg)], row, cfg, layout, dtype))
    return params


class Parameter:
    """One of the model's parameters, in the tensors of a state_dict: read where it is indexed, by slices."""

    def __init__(self, tensors: Sequence[Indexable], row: Row, cfg: GPTConfig, layout: Layout, dtype: DTypeLike) -> None:
        """`tensors` are the row's, of all layers in their order."""
        self._tensors, self._row, self._layout = tensors, row, layout
        self.shape, self.dtype = parameter_shape(row, cfg), np.dtype(dtype)

    def __getitem__(self, index: Index) -> np.ndarray:
        """A new array. The index is a slice for each axis, as far as it goes."""
        index = index if isinstance(index, tuple) else (index,)
        index = (*index, *[slice(None)] * (len(self.shape) - len(index)))
        lengths = [len(range(*part.indices(size))) for part, size in zip(index, self.shape, strict=True)]
        if not self._row.stacked:
            part = self._of_layer(self._tensors[0], index)
            whole = np.zeros(lengths, self.dtype)  # what pads the vocabulary is zero, and not in the file
            whole[tuple(map(slice, part.shape))] = part
            return whole
        stacked = np.empty(lengths, self.dtype)
        for i, tensor in enumerate(self._tensors[index[0]]):
            stacked[i] = self._of_layer(tensor, index[1:])
        return stacked

    def __array__(self, dtype: DTypeLike = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[()], dtype)

    def _of_layer(self, tensor: Indexable, index: tuple[slice, ...]) -> np.ndarray:
        axes, where = self._layout.axes(self._row), dict(zip(self._row.axes, index, strict=True))
        if (third := self._layout.third(self._row)) is not None:
            E = self.shape[-1]
            first, stop, _ = where["E"].indices(E)
            where["E"] = slice(third * E + first, third * E + stop)
        part = np.asarray(tensor[tuple(where[axis] for axis in axes)])
        return part if axes == self._row.axes else part.T


class Written(Mapping[str, np.ndarray]):
    """The tensors of a state_dict, each made of the model's parameters when it is asked for.

    In the order of the format's modules. Biases that the format has and the model has not are zero. There is no head of a tied model.
    """

    def __init__(self, params: Params, cfg: GPTConfig, layout: Layout, dtype: DTypeLike = np.float32) -> None:
        """Nothing is made yet, but what is missing, unknown or of the wrong shape is named in an InputError."""
        self._leaves = {path: leaf if isinstance(leaf, Parameter) else np.asarray(leaf) for path, leaf in leaves(params).items()}
        self._dtype = np.dtype(dtype)
        expected = {row.path: parameter_shape(row, cfg) for row in parameters(cfg)}
        if faults := shape_faults({path: leaf.shape for path, leaf in self._leaves.items()}, expected):
            raise InputError("the parameters do not fit the config: " + "; ".join(faults))
        self.shapes, self._layout, self._sizes = tensor_shapes(cfg, layout), layout, sizes(cfg)
        self._parts: dict[str, list[tuple[Row, int]]] = {name: [] for name in self.shapes}
        for row in parameters(cfg):
            for i, name in enumerate(layout.names(row, cfg)):
                self._parts[name].append((row, i))

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = np.zeros(self.shapes[name], self._dtype)
        for row, i in self._parts[name]:
            leaf = self._leaves[row.path]
            unpadded = tuple(slice(self._sizes[axis]) for axis in row.axes)
            part = leaf[(slice(i, i + 1), *unpadded)][0] if row.stacked else leaf[unpadded]
            axes = self._layout.axes(row)
            view = tensor
            if (third := self._layout.third(row)) is not None:
                view = np.split(tensor, 3, axis=axes.index("E"))[third]
            view[...] = part if axes == row.axes else part.T
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def read_whole(params: Mapping[str, Any]) -> dict[str, Any]:
    """All of an opened model, as NumPy arrays: one tensor is read at a time."""
    return {name: read_whole(value) if isinstance(value, Mapping) else value[()] for name, value in params.items()}


def tensor_shapes(cfg: GPTConfig, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor of a model in this layout, in the order of its modules; the head's only where it is not tied."""
    size, shapes, cfg = sizes(cfg), {}, layout.complete(cfg)
    for stacked, rows in itertools.groupby(parameters(cfg), key=lambda row: row.stacked):
        of_one_layer = []
        for row in rows:
            shape = [size[axis] * (3 if axis == "E" and layout.third(row) is not None else 1) for axis in layout.axes(row)]
            of_one_layer.append((layout.names(row, cfg), tuple(shape)))
        for i in range(cfg.n_layers if stacked else 1):
            shapes |= {names[i]: shape for names, shape in of_one_layer}
    return shapes


def parameter_shape(row: Row, cfg: GPTConfig) -> tuple[int, ...]:
    """Of a parameter here, what pads the vocabulary included; in the blocks, with the leading L axis."""
    size = {**sizes(cfg), "V": cfg.padded_vocab}
    return (cfg.n_layers,) * row.stacked + tuple(size[axis] for axis in row.axes)


def shape_faults(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What keeps these named shapes from being the expected ones, a phrase for each kind of fault."""
    faults = []
    if missing := [name for name in expected if name not in found]:
        faults.append(f"missing: {', '.join(missing)}")
    if unknown := [name for name in found if name not in expected]:
        faults.append(f"unknown: {', '.join(unknown)}")
    if misshapen := [f"{n} is {found[n]}, expected {expected[n]}" for n in expected if n in found and found[n] != expected[n]]:
        faults.append(f"wrong shape: {', '.join(misshapen)}")
    return faults


def insert(tree: dict[str, Any], path: str, value: Any) -> None:
    """Put an array into a nested dict, at a path of the table."""
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = value


def leaves(tree: Params, prefix: str = "") -> dict[str, Any]:
    """The inverse of `insert`: path -> array."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= leaves(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def equal(a: Indexable, b: Indexable) -> bool:
    """Whether two matrices are the same; a part of them is read at a time."""
    rows = range(0, a.shape[0], 4096)
    return tuple(a.shape) == tuple(b.shape) and all(np.array_equal(a[i : i + 4096], b[i : i + 4096]) for i in rows)
