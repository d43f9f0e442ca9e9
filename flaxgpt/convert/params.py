"""Parameters (and anything shaped like them) <-> torch names, as NumPy arrays, by one table used both ways. Imports no framework."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from flaxgpt.config import GPTConfig
from flaxgpt.errors import InputError

Params = dict[str, Any]
StateDict = dict[str, np.ndarray]


class Row(NamedTuple):
    """One parameter: its path here, its key in the state_dict ({} is the layer), and its shape there."""

    path: str
    key: str
    shape: tuple[int, ...]

    @property
    def transposed(self) -> bool:
        """A linear layer keeps (out, in) in torch, (in, out) here; embeddings and vectors are alike."""
        return self.path.endswith("kernel")

    @property
    def stacked(self) -> bool:
        """One array with a leading L axis here, one for each block there."""
        return "{}" in self.key


def table(cfg: GPTConfig) -> list[Row]:
    """Every parameter of a model of this config."""
    D, F, V = cfg.emb_dim, 4 * cfg.emb_dim, cfg.vocab_size
    rows = [Row("tok_emb/embedding", "tok_emb.weight", (V, D)), Row("pos_emb/embedding", "pos_emb.weight", (cfg.context_length, D))]
    linears = {"att/W_query": (D, D), "att/W_key": (D, D), "att/W_value": (D, D), "att/out_proj": (D, D)}
    linears |= {"ff/layers_0": (F, D), "ff/layers_2": (D, F)}
    for path, shape in linears.items():
        key = f"trf_blocks.{{}}.{path.replace('/', '.').replace('layers_', 'layers.')}"
        rows.append(Row(f"trf_blocks/{path}/kernel", f"{key}.weight", shape))
        if cfg.qkv_bias or "W_" not in path:
            rows.append(Row(f"trf_blocks/{path}/bias", f"{key}.bias", shape[:1]))
    for norm, key in (("trf_blocks/norm1", "trf_blocks.{}.norm1"), ("trf_blocks/norm2", "trf_blocks.{}.norm2"), ("final_norm",) * 2):
        rows += [Row(f"{norm}/{vector}", f"{key}.{vector}", (D,)) for vector in ("scale", "shift")]
    if not cfg.tie_embeddings:
        rows.append(Row("out_head/kernel", "out_head.weight", (V, D)))
    return rows


def from_torch(state_dict: Mapping[str, Any], cfg: GPTConfig, dtype: Any = np.float32) -> Params:
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
    rows = table(cfg)
    arrays = {key: np.asarray(value) for key, value in state_dict.items() if not _is_mask(key, cfg)}
    tied_head = arrays.pop("out_head.weight", None) if cfg.tie_embeddings else None
    wanted = {key: row.shape for row in rows for key in _keys(row, cfg)}
    faults = shape_faults({key: array.shape for key, array in arrays.items()}, wanted)
    if tied_head is not None and not np.array_equal(tied_head, arrays.get("tok_emb.weight")):
        faults.append("out_head.weight differs from tok_emb.weight, but tie_embeddings is set")
    if faults:
        raise InputError("the state_dict does not fit the config: " + "; ".join(faults))

    params: Params = {}
    for row in rows:
        parts = [np.asarray(arrays[key], dtype) for key in _keys(row, cfg)]
        parts = [part.T if row.transposed else part for part in parts]
        _insert(params, row.path, np.stack(parts) if row.stacked else parts[0].copy())
    return params


def infer_config(state_dict: Mapping[str, Any], n_heads: int | None = None) -> GPTConfig:
    """The config that a state_dict's names and shapes tell of, without dropout.

    Args:
        state_dict: arrays by the reference's names.
        n_heads: which shapes do not tell; None: heads of 64, as in all sizes of GPT-2.

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
        raise InputError(f"n_heads: give it, since emb_dim={emb_dim} is not made of heads of 64, and shapes don't tell")
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


def to_torch(params: Mapping[str, Any], cfg: GPTConfig, dtype: Any = np.float32) -> StateDict:
    """The inverse of `from_torch`: a complete state_dict, causal masks and tied head included, of NumPy arrays.

    Raises:
        InputError: naming every parameter that is missing, unknown or of the wrong shape.
    """
    state_dict = named_parameters(params, cfg, dtype)
    if cfg.tie_embeddings:
        state_dict["out_head.weight"] = state_dict["tok_emb.weight"]
    mask = np.triu(np.ones((cfg.context_length, cfg.context_length), dtype), k=1)
    return state_dict | {f"trf_blocks.{i}.att.mask": mask for i in range(cfg.n_layers)}


def named_parameters(params: Mapping[str, Any], cfg: GPTConfig, dtype: Any = np.float32) -> StateDict:
    """What `GPTModel(cfg).named_parameters()` gives, in its order: each parameter (or its gradient, or moment) once, by name.

    Raises:
        InputError: as `to_torch`.
    """
    rows = table(cfg)
    arrays = {path: np.asarray(value, dtype) for path, value in _flatten(params)}
    lead = (cfg.n_layers,)
    wanted = {row.path: (lead if row.stacked else ()) + (row.shape[::-1] if row.transposed else row.shape) for row in rows}
    if faults := shape_faults({path: array.shape for path, array in arrays.items()}, wanted):
        raise InputError("the parameters do not fit the config: " + "; ".join(faults))
    named: StateDict = {}
    for row in rows:
        parts = arrays[row.path] if row.stacked else arrays[row.path][None]
        for key, part in zip(_keys(row, cfg), parts, strict=True):
            named[key] = np.ascontiguousarray(part.T if row.transposed else part)
    return {name: named[name] for name in parameter_shapes(cfg)}


def parameter_shapes(cfg: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each parameter of `GPTModel(cfg)`, in the order in which the module holds them (an optimizer numbers them so)."""
    rows = table(cfg)
    blocks = [row for row in rows if row.stacked]
    first = [row for row in rows if row.key in ("tok_emb.weight", "pos_emb.weight")]
    last = [row for row in rows if row not in blocks and row not in first]
    per_layer = {row.key.format(i): row.shape for i in range(cfg.n_layers) for row in blocks}
    return {row.key: row.shape for row in first} | per_layer | {row.key: row.shape for row in last}


def per_layer(tree: Mapping[str, Any], cfg: GPTConfig) -> StateDict:
    """A collection of the model (activations, dropout masks) by the reference's names: the L axis of the blocks is taken apart."""
    named: StateDict = {}
    for path, value in _flatten(tree):
        name = path.replace("/", ".")
        if name.startswith("trf_blocks."):
            named |= {name.replace("trf_blocks.", f"trf_blocks.{i}.", 1): np.asarray(value[i]) for i in range(cfg.n_layers)}
        else:
            named[name] = np.asarray(value)
    return named


def stacked(named: Mapping[str, Any], cfg: GPTConfig) -> Params:
    """The inverse of `per_layer`."""
    tree: Params = {}
    for name, value in named.items():
        if name.startswith("trf_blocks.0."):
            layers = [named[name.replace(".0.", f".{i}.", 1)] for i in range(cfg.n_layers)]
            _insert(tree, name.replace(".0.", ".", 1).replace(".", "/"), np.stack(layers))
        elif not name.startswith("trf_blocks."):
            _insert(tree, name.replace(".", "/"), np.asarray(value))
    return tree


def _keys(row: Row, cfg: GPTConfig) -> list[str]:
    return [row.key.format(i) for i in range(cfg.n_layers)] if row.stacked else [row.key]


def _is_mask(key: str, cfg: GPTConfig) -> bool:
    return any(key == f"trf_blocks.{i}.att.mask" for i in range(cfg.n_layers))


def shape_faults(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What keeps these named shapes from being the wanted ones, a phrase for each kind of fault."""
    faults = []
    if missing := [name for name in wanted if name not in found]:
        faults.append(f"missing: {', '.join(missing)}")
    if unknown := [name for name in found if name not in wanted]:
        faults.append(f"unknown: {', '.join(unknown)}")
    if misshapen := [f"{n} is {found[n]}, expected {wanted[n]}" for n in wanted if n in found and found[n] != wanted[n]]:
        faults.append(f"wrong shape: {', '.join(misshapen)}")
    return faults


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves = []
    for name, value in tree.items():
        leaves += _flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else [(prefix + name, value)]
    return leaves


def _insert(tree: Params, path: str, value: np.ndarray) -> None:
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = value
