"""Parameters (and anything shaped like them) <-> the reference's state_dict, as NumPy arrays. Imports no framework."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from flaxgpt.config import GPTConfig
from flaxgpt.convert.layout import StateDict, Written, equal, insert, leaves, open_params, read_whole, tensor_shapes
from flaxgpt.convert.names import REFERENCE, VOCAB_AXES, module_name, module_path
from flaxgpt.errors import InputError
from flaxgpt.types import Indexable, Params


def from_torch(state_dict: Mapping[str, Indexable], cfg: GPTConfig, dtype: DTypeLike = np.float32) -> Params:
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
    return read_whole(open_params(state_dict, cfg, REFERENCE, dtype))


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
    return dict(Written(params, cfg, REFERENCE, dtype))


def cropped(params: Params, cfg: GPTConfig) -> dict[str, Any]:
    """The parameters of the same model with a shorter context and a smaller vocabulary (its first positions and tokens), padded anew."""
    params = {**params, "pos_emb": {"embedding": params["pos_emb"]["embedding"][: cfg.context_length]}}
    return fit_vocab(fit_vocab(params, cfg.vocab_size), cfg.padded_vocab)


def fit_vocab(params: Params, size: int) -> dict[str, Any]:
    """The parameters (or moments) of the same model with the vocabulary padded to this size, by zeros."""
    fitted: dict[str, Any] = {}
    for path, value in leaves(params).items():
        insert(fitted, path, _fit_axis(value, VOCAB_AXES[path], size) if path in VOCAB_AXES else value)
    return fitted


def _fit_axis(array: Indexable, axis: int, size: int) -> Indexable:
    """Cut off, or filled up with zeros, to this size."""
    if array.shape[axis] < size:
        return np.pad(array, [(0, size - n if i == axis else 0) for i, n in enumerate(array.shape)])
    return array if array.shape[axis] == size else array[(slice(None),) * axis + (slice(size),)]


def parameter_shapes(cfg: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each parameter of `GPTModel(cfg)`, in the order in which the module holds them."""
    return tensor_shapes(cfg, REFERENCE)


def infer_config(state_dict: Mapping[str, Indexable], n_heads: int | None = None) -> GPTConfig:
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
        bias="final_norm.shift" in shapes,
        tie_embeddings=head is None or equal(head, state_dict["tok_emb.weight"]),
    )


def per_layer(tree: Params, cfg: GPTConfig) -> StateDict:
    """A collection of the model (activations, dropout masks) by the reference's names: the L axis of the blocks is taken apart."""
    named: StateDict = {}
    for path, value in leaves(tree).items():
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
