"""Parameters and configs <-> those of Hugging Face's GPT-2 (`GPT2LMHeadModel`), as NumPy arrays. Imports no framework."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from flaxgpt.config import GPTConfig
from flaxgpt.convert.layout import StateDict, Written, open_params, read_whole
from flaxgpt.convert.names import HUGGINGFACE
from flaxgpt.errors import InputError
from flaxgpt.types import Indexable, Params


def from_huggingface(state_dict: Mapping[str, Indexable], cfg: GPTConfig, dtype: DTypeLike = np.float32) -> dict[str, Any]:
    """The parameters of `flaxgpt.model.GPT` from a state_dict of `GPT2LMHeadModel`, or of the `GPT2Model` in it.

    Args:
        state_dict: arrays (or tensors that NumPy can read) by Hugging Face's names, with "transformer." before them or not; a
            value is asked for when it is needed. The causal masks (`attn.bias`, `attn.masked_bias`) may be there or not; so
            may `lm_head.weight` of a tied model, which must then equal `wte.weight`.
        cfg: the model's config, as `config_from_huggingface` makes it. Biases that it has not must be zero.
        dtype: of the result; what is in half precision is in it exactly.

    Returns:
        Nested dict of NumPy arrays, those of the blocks stacked along a leading L axis.

    Raises:
        InputError: naming every key that is missing, unknown or of the wrong shape.
    """
    return read_whole(open_params(state_dict, cfg, HUGGINGFACE, dtype))


def to_huggingface(params: Params, cfg: GPTConfig, dtype: DTypeLike = np.float32) -> StateDict:
    """The inverse of `from_huggingface`: what `GPT2LMHeadModel.save_pretrained` would write, NumPy arrays in its shapes.

    There is no `lm_head.weight` for a tied model. Biases that the model has not are zero.

    Raises:
        InputError: naming every parameter that is missing, unknown or of the wrong shape.
    """
    return dict(Written(params, cfg, HUGGINGFACE, dtype))


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
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}
"""Key of config.json -> the values with which it is the model that flaxgpt computes; the first is Hugging Face's default."""

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
"""Value of activation_function -> of GPTConfig.activation; the first of each is what is written."""


def config_from_huggingface(values: Mapping[str, Any]) -> GPTConfig:
    """The model that a config.json describes.

    Args:
        values: what is in it. Keys that do not change what is computed are ignored; those that are left out have Hugging Face's
            defaults, but for `model_type` and the sizes, which must be there.

    Raises:
        InputError: naming every value with which it is another model. The three rates of dropout must be equal: there is one here.
    """
    values = {"n_positions": values.get("n_ctx")} | dict(values)  # older files have both names
    if (kind := values.get("model_type")) not in (None, "gpt2"):  # of which nothing else is to be expected
        raise InputError(f"not a GPT-2 that flaxgpt computes: model_type is {kind!r}, expected 'gpt2'")
    faults = [f"no {key}" for key in ("model_type", *_SAME.values()) if values.get(key) is None]
    for key, allowed in _FIXED.items():
        if (value := values.get(key, allowed[0])) not in allowed:
            faults.append(f"{key} is {value!r}, expected {' or '.join(map(repr, allowed))}")
    if (activation := values.get("activation_function", "gelu_new")) not in [*_ACTIVATIONS]:  # a list, since a value may be anything
        faults.append(f"activation_function is {activation!r}, expected {' or '.join(map(repr, _ACTIVATIONS))}")
    if values.get("n_inner") is not None and values["n_inner"] != 4 * (values.get("n_embd") or 0):
        faults.append(f"n_inner is {values['n_inner']!r}, expected 4 n_embd")
    rates = {key: values.get(key, 0.1) for key in _DROPOUTS}
    if any(rate != rates["resid_pdrop"] for rate in rates.values()):
        faults.append(f"{', '.join(f'{k} is {v!r}' for k, v in rates.items())}: expected one rate, so set all three to it in config.json")
    if faults:
        raise InputError(f"not a GPT-2 that flaxgpt computes: {'; '.join(faults)}")
    shape = {ours: values[theirs] for ours, theirs in _SAME.items()}
    return GPTConfig(
        **shape,
        drop_rate=rates["resid_pdrop"],
        tie_embeddings=values.get("tie_word_embeddings", True),
        qkv_bias=True,
        activation=_ACTIVATIONS[activation],
    )


def config_to_huggingface(cfg: GPTConfig) -> dict[str, Any]:
    """The config.json of a model; what it has no key for (`qkv_bias`, `bias`, `init`, and how it is computed) is left out."""
    end = 50256 if cfg.vocab_size in (50257, 50304) else None  # GPT-2's end of a text; nanoGPT pads its vocabulary
    activation = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == cfg.activation)
    return (
        {"architectures": ["GPT2LMHeadModel"]}
        | {key: allowed[0] for key, allowed in _FIXED.items()}
        | {theirs: getattr(cfg, ours) for ours, theirs in _SAME.items()}
        | dict.fromkeys(_DROPOUTS, cfg.drop_rate)
        | {"activation_function": activation}
        | {"n_inner": None, "tie_word_embeddings": cfg.tie_embeddings, "dtype": "float32", "bos_token_id": end, "eos_token_id": end}
    )
