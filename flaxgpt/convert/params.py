"""Parameters (and anything shaped like them) <-> the reference's state_dict, as NumPy arrays. Imports no framework."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from flaxgpt.config import GPTConfig
from flaxgpt.convert.names import VOCAB_AXES, Row, module_name, module_path, parameters, sizes
from flaxgpt.errors import InputError
from flaxgpt.types import Params

StateDict = dict[str, np.ndarray]


def from_torch(state_dict: Mapping[str, ArrayLike], cfg: GPTConfig, dtype: DTypeLike = np.float32) -> Params:
    """The parameters of `flaxgpt.model.GPT` from a state_dict of `torch_ref.model.GPTModel`.

    Args:
        state_dict: arrays (or tensors that NumPy can read) by the reference's names. The causal masks may be there or
            not; so may `out_head.weight` of a tied model, which must then equal `tok_emb.weight`.
        cfg: the model's config.
        dtype: of the result; float64 is for checking numerics.

    Returns:
        Nested dict of NumPy arrays, those of the blocks stacked along a leading L axis.

    Raises:
        InputError: naming every key that is missing, unknown or of the wrong shape.
    """
    masks = {f"trf_blocks.{i}.att.mask" for i in range(cfg.n_layers)}
    arrays = {key: np.asarray(value) for key, value in state_dict.items() if key not in masks}
    tied_head = arrays.pop("out_head.weight", None) if cfg.tie_embeddings else None
    faults = shape_faults({key: array.shape for key, array in arrays.items()}, parameter_shapes(cfg))
    if tied_head is not None and not np.array_equal(tied_head, arrays.get("tok_emb.weight")):
        faults.append("out_head.weight differs from tok_emb.weight, but tie_embeddings is set")
    if faults:
        raise InputError("the state_dict does not fit the config: " + "; ".join(faults))

    params: dict[str, Any] = {}
    for row in parameters(cfg):
        layers = [np.asarray(arrays[key], dtype) for key in row.keys(cfg)]
        layers = [array if row.axes == row.torch_axes else array.T for array in layers]
        insert(params, row.path, np.stack(layers) if row.stacked else layers[0].copy())
    return fit_vocab(params, cfg.padded_vocab)


def to_torch(params: Params, cfg: GPTConfig, dtype: DTypeLike = np.float32) -> StateDict:
    """The inverse of `from_torch`: a complete state_dict, causal masks and tied head included, of NumPy arrays.

    Raises:
        InputError: naming every parameter that is missing, unknown or of the wrong shape.
    """
    state_dict = named_parameters(params, cfg, dtype)
    if cfg.tie_embeddings:
        state_dict["out_head.weight"] = state_dict["tok_emb.weight"]
    mask = np.triu(np.ones((cfg.context_length, cfg.context_length), dtype), k=1)
    return state_dict | {f"trf_blocks.{i}.att.mask": mask for i in range(cfg.n_layers)}


def named_parameters(params: Params, cfg: GPTConfig, dtype: DTypeLike = np.float32) -> StateDict:
    """What `GPTModel(cfg).named_parameters()` gives, in its order: each parameter (or its gradient, or moment) once, by name.

    Raises:
        InputError: as `to_torch`.
    """
    named: StateDict = {}
    for row, layers in by_row(params, cfg, dtype):
        for key, array in zip(row.keys(cfg), layers, strict=True):
            named[key] = np.ascontiguousarray(array if row.axes == row.torch_axes else array.T)
    return {name: named[name] for name in parameter_shapes(cfg)}


def by_row(params: Params, cfg: GPTConfig, dtype: DTypeLike = np.float32) -> list[tuple[Row, np.ndarray]]:
    """Each parameter's row of the table, and its array with the layers along the first axis (one, if it is none of a block's).

    What pads the vocabulary is left out.

    Raises:
        InputError: as `to_torch`.
    """
    size, rows = {**sizes(cfg), "V": cfg.padded_vocab}, parameters(cfg)
    arrays = {path: np.asarray(value, dtype) for path, value in _leaves(params).items()}
    expected = {row.path: (cfg.n_layers,) * row.stacked + tuple(size[axis] for axis in row.axes) for row in rows}
    if faults := shape_faults({path: array.shape for path, array in arrays.items()}, expected):
        raise InputError("the parameters do not fit the config: " + "; ".join(faults))
    arrays |= {path: _fit_axis(arrays[path], axis, cfg.vocab_size) for path, axis in VOCAB_AXES.items() if path in arrays}
    return [(row, arrays[row.path] if row.stacked else arrays[row.path][None]) for row in rows]


def crop_context(params: Params, context_length: int) -> dict[str, Any]:
    """The parameters of the same model with a shorter context: the embeddings of its first positions."""
    return {**params, "pos_emb": {"embedding": params["pos_emb"]["embedding"][:context_length]}}


def fit_vocab(params: Params, size: int) -> dict[str, Any]:
    """The parameters (or moments) of the same model with the vocabulary padded to this size, by zeros."""
    fitted: dict[str, Any] = {}
    for path, value in _leaves(params).items():
        insert(fitted, path, _fit_axis(value, VOCAB_AXES[path], size) if path in VOCAB_AXES else value)
    return fitted


def _fit_axis(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Cut off, or filled up with zeros, to this size."""
    if array.shape[axis] < size:
        return np.pad(array, [(0, size - n if i == axis else 0) for i, n in enumerate(array.shape)])
    return array if array.shape[axis] == size else array[(slice(None),) * axis + (slice(size),)]


def parameter_shapes(cfg: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each parameter of `GPTModel(cfg)`, in the order in which the module holds them."""
    size, shapes = sizes(cfg), {}
    for stacked, rows in itertools.groupby(parameters(cfg), key=lambda row: row.stacked):
        of_one_layer = {row.torch: tuple(size[axis] for axis in row.torch_axes) for row in rows}
        for i in range(cfg.n_layers if stacked else 1):
            shapes |= {key.format(i): shape for key, shape in of_one_layer.items()}
    return shapes


def infer_config(state_dict: Mapping[str, ArrayLike], n_heads: int | None = None) -> GPTConfig:
    """The config that a state_dict's names and shapes imply, without dropout.

    Args:
        state_dict: arrays by the reference's names.
        n_heads: which shapes do not imply; None: heads of 64, as in all sizes of GPT-2.

    Raises:
        InputError: it is not a state_dict of such a model.
    """
    shapes = {name: np.shape(value) for name, value in state_dict.items()}
    embeddings = [shapes.get(name, ()) for name in ("tok_emb.weight", "pos_emb.weight")]
    if not all(len(shape) == 2 for shape in embeddings):
        raise InputError(
            f"not a state_dict of this model: no matrices tok_emb.weight and pos_emb.weight among {', '.join(sorted(shapes)[:5])} ..."
        )
    (vocab_size, emb_dim), (context_length, _) = embeddings
    if n_heads is None and emb_dim % 64:
        raise InputError(f"n_heads: give it, since emb_dim={emb_dim} is not made of heads of 64, and shapes don't imply it")
    layers = [int(name.split(".")[1]) for name in shapes if re.match(r"trf_blocks\.\d+\.", name)]
    head = state_dict.get("out_head.weight")
    return GPTConfig(
        vocab_size=vocab_size,
        context_length=context_length,
        emb_dim=emb_dim,
        n_heads=emb_dim // 64 if n_heads is None else n_heads,
        n_layers=max(layers, default=0) + 1,
        drop_rate=0.0,
        qkv_bias="trf_blocks.0.att.W_query.bias" in shapes,
        tie_embeddings=head is None or np.array_equal(head, state_dict["tok_emb.weight"]),
    )


def per_layer(tree: Params, cfg: GPTConfig) -> StateDict:
    """A collection of the model (activations, dropout masks) by the reference's names: the L axis of the blocks is taken apart."""
    named: StateDict = {}
    for path, value in _leaves(tree).items():
        if path.startswith("trf_blocks/"):
            named |= {module_name(path, i): np.asarray(value[i]) for i in range(cfg.n_layers)}
        else:
            named[module_name(path, 0)] = np.asarray(value)
    return named


def stacked(named: Mapping[str, ArrayLike], cfg: GPTConfig) -> Params:
    """The inverse of `per_layer`."""
    tree: dict[str, Any] = {}
    for path in dict.fromkeys(map(module_path, named)):
        layers = [np.asarray(named[module_name(path, i)]) for i in range(cfg.n_layers if path.startswith("trf_blocks/") else 1)]
        insert(tree, path, np.stack(layers) if path.startswith("trf_blocks/") else layers[0])
    return tree


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


def check_finite(arrays: Mapping[str, np.ndarray], what: str) -> None:
    """Refuse arrays with nan or inf.

    Raises:
        InputError: naming the first array that has one, and where in it.
    """
    bad = {name: ~np.isfinite(array) for name, array in arrays.items() if not np.isfinite(array).all()}
    if bad:
        name, where = next(iter(bad.items()))
        place = tuple(int(i) for i in np.argwhere(where)[0])
        value = arrays[name][place]
        raise InputError(f"{what} are not finite: {len(bad)} of {len(arrays)} tensors, the first {name} with {value} at {list(place)}")


def insert(tree: dict[str, Any], path: str, value: np.ndarray) -> None:
    """Put an array into a nested dict, at a path of the table."""
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = value


def _leaves(tree: Params, prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return leaves
