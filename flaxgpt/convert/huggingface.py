"""Parameters and configs <-> those of Hugging Face's GPT-2 (`GPT2LMHeadModel`), as NumPy arrays. Imports no framework."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from flaxgpt.config import GPTConfig
from flaxgpt.convert.names import Row, parameters, sizes
from flaxgpt.convert.params import StateDict, by_row, fit_vocab, insert, shape_faults
from flaxgpt.errors import InputError
from flaxgpt.types import Params

PREFIX, HEAD = "transformer.", "lm_head.weight"


def from_huggingface(state_dict: Mapping[str, ArrayLike], cfg: GPTConfig, dtype: DTypeLike = np.float32) -> dict[str, Any]:
    """The parameters of `flaxgpt.model.GPT` from a state_dict of `GPT2LMHeadModel`, or of the `GPT2Model` in it.

    Args:
        state_dict: arrays (or tensors that NumPy can read) by Hugging Face's names, with "transformer." before them or not; a
            value is asked for when it is needed. The causal masks (`attn.bias`, `attn.masked_bias`) may be there or not; so
            may `lm_head.weight` of a tied model, which must then equal `wte.weight`.
        cfg: the model's config, as `config_from_huggingface` makes it. With `qkv_bias` off, those biases must be zero.
        dtype: of the result; what is in half precision is in it exactly.

    Returns:
        Nested dict of NumPy arrays, those of the blocks stacked along a leading L axis.

    Raises:
        InputError: naming every key that is missing, unknown or of the wrong shape.
    """
    bare = not any(key.startswith(PREFIX) for key in state_dict)
    keys = {key if not bare or key == HEAD else PREFIX + key: key for key in state_dict}  # its full name -> as it is called here
    keys = {name: key for name, key in keys.items() if not re.fullmatch(r"transformer\.h\.\d+\.attn\.(masked_)?bias", name)}
    tied_head = keys.pop(HEAD, None) if cfg.tie_embeddings else None
    faults = shape_faults({name: np.shape(state_dict[key]) for name, key in keys.items()}, tensor_shapes(cfg))
    if not faults and tied_head and not np.array_equal(state_dict[tied_head], state_dict[keys[f"{PREFIX}wte.weight"]]):
        faults.append(f"{HEAD} differs from {PREFIX}wte.weight, but tie_word_embeddings is set")
    if not faults and not cfg.qkv_bias:
        biases = [name for name in keys if name.endswith("c_attn.bias") and np.any(state_dict[keys[name]])]
        faults += [f"qkv_bias is off, but not zero: {', '.join(biases)}"] if biases else []
    if faults:
        raise InputError("the state_dict does not fit the config: " + "; ".join(faults))

    params: dict[str, Any] = {}
    for row in parameters(cfg):
        layers = [np.asarray(_part(np.asarray(state_dict[keys[name]]), row), dtype) for name in _names(row, cfg)]
        insert(params, row.path, np.stack(layers) if row.stacked else layers[0].copy())
    return fit_vocab(params, cfg.padded_vocab)


def to_huggingface(params: Params, cfg: GPTConfig, dtype: DTypeLike = np.float32) -> StateDict:
    """The inverse of `from_huggingface`: what `GPT2LMHeadModel.save_pretrained` would write, NumPy arrays in its shapes.

    There is no `lm_head.weight` for a tied model. A model without biases on query, key and value gets zero ones.

    Raises:
        InputError: naming every parameter that is missing, unknown or of the wrong shape.
    """
    state_dict = {name: np.zeros(shape, dtype) for name, shape in tensor_shapes(cfg).items()}
    for row, layers in by_row(params, cfg, dtype):
        for name, array in zip(_names(row, cfg), layers, strict=True):
            _part(state_dict[name], row)[...] = array
    return state_dict


def tensor_shapes(cfg: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor of a model's state_dict; the head's only where it is not tied."""
    size, shapes = sizes(cfg), {}
    for row in parameters(cfg.replace(qkv_bias=True)):
        *first, last = (size[axis] for axis in row.huggingface_axes)
        shapes |= dict.fromkeys(_names(row, cfg), (*first, last if row.third is None else 3 * last))
    return shapes


_SAME = {
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
}
"""Field of GPTConfig -> key of config.json with the same value."""

_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")

_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}
"""Key of config.json -> the values with which it is the model that flaxgpt computes; the first is Hugging Face's default."""


def config_from_huggingface(values: Mapping[str, Any]) -> GPTConfig:
    """The model that a config.json describes.

    Args:
        values: what is in it. Keys that do not change what is computed are ignored; those that are left out have Hugging Face's
            defaults, but for `model_type` and the sizes, which must be there.

    Raises:
        InputError: naming every value with which it is another model. The three rates of dropout must be equal: there is one here.
    """
    values = {"n_positions": values.get("n_ctx")} | dict(values)  # older files have both names
    faults = [f"no {key}" for key in ("model_type", *_SAME.values()) if values.get(key) is None]
    for key, allowed in _FIXED.items():
        if (value := values.get(key, allowed[0])) not in allowed:
            faults.append(f"{key} is {value!r}, expected {' or '.join(map(repr, allowed))}")
    if values.get("n_inner") is not None and values["n_inner"] != 4 * (values.get("n_embd") or 0):
        faults.append(f"n_inner is {values['n_inner']!r}, expected 4 n_embd")
    rates = {key: values.get(key, 0.1) for key in _DROPOUTS}
    if any(rate != rates["resid_pdrop"] for rate in rates.values()):
        faults.append(f"{', '.join(f'{k} is {v!r}' for k, v in rates.items())}: expected one rate, so set all three to it in config.json")
    if faults:
        raise InputError(f"not a GPT-2 that flaxgpt computes: {'; '.join(faults)}")
    shape = {ours: values[theirs] for ours, theirs in _SAME.items()}
    return GPTConfig(**shape, drop_rate=rates["resid_pdrop"], tie_embeddings=values.get("tie_word_embeddings", True), qkv_bias=True)


def config_to_huggingface(cfg: GPTConfig) -> dict[str, Any]:
    """The config.json of a model; what it has no key for (`qkv_bias`, `init`, and how it is computed) is left out."""
    end = 50256 if cfg.vocab_size == 50257 else None  # GPT-2's end of a text
    return (
        {"architectures": ["GPT2LMHeadModel"]}
        | {key: allowed[0] for key, allowed in _FIXED.items()}
        | {theirs: getattr(cfg, ours) for ours, theirs in _SAME.items()}
        | dict.fromkeys(_DROPOUTS, cfg.drop_rate)
        | {"n_inner": None, "tie_word_embeddings": cfg.tie_embeddings, "dtype": "float32", "bos_token_id": end, "eos_token_id": end}
    )


def _names(row: Row, cfg: GPTConfig) -> list[str]:
    return [key if key == HEAD else PREFIX + key for key in row.huggingface_keys(cfg)]


def _part(tensor: np.ndarray, row: Row) -> np.ndarray:
    """The part of a tensor that is this parameter, with its axes as they are here: a view, to read or to write."""
    part = tensor if row.third is None else np.split(tensor, 3, axis=-1)[row.third]
    return part if row.axes == row.huggingface_axes else part.T
