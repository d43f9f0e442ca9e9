"""Every parameter of the model, one line each: where it is in flaxgpt, and what it is called elsewhere. Imports no framework."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from flaxgpt.config import GPTConfig


def _always(_: GPTConfig) -> bool:
    return True


def _with_qkv_bias(cfg: GPTConfig) -> bool:
    return cfg.qkv_bias


def _untied(cfg: GPTConfig) -> bool:
    return not cfg.tie_embeddings


class Parameter(NamedTuple):
    """One parameter. Axes are letters (see `sizes`), so that those of two formats show whether one is the other transposed."""

    path: str
    """In flaxgpt's tree; in the blocks, one array for all layers, with a leading L axis."""
    axes: str
    """There, of one layer."""
    torch: str
    """Key in a state_dict of `torch_ref.model.GPTModel`; {} is the layer."""
    torch_axes: str
    exists: Callable[[GPTConfig], bool] = _always

    @property
    def stacked(self) -> bool:
        """Whether it is one of each block's."""
        return "{}" in self.torch

    def keys(self, cfg: GPTConfig) -> list[str]:
        """Its keys in the state_dict: one for each layer, or one."""
        return [self.torch.format(i) for i in range(cfg.n_layers)] if self.stacked else [self.torch]


# In the order of the reference's modules, by which torch's optimizers number parameters.
PARAMETERS = (
    #         flaxgpt                                    torch_ref
    Parameter("tok_emb/embedding",               "VD",  "tok_emb.weight",                       "VD"),
    Parameter("pos_emb/embedding",               "CD",  "pos_emb.weight",                       "CD"),
    Parameter("trf_blocks/att/W_query/kernel",   "DE",  "trf_blocks.{}.att.W_query.weight",     "ED"),
    Parameter("trf_blocks/att/W_query/bias",     "E",   "trf_blocks.{}.att.W_query.bias",       "E", _with_qkv_bias),
    Parameter("trf_blocks/att/W_key/kernel",     "DE",  "trf_blocks.{}.att.W_key.weight",       "ED"),
    Parameter("trf_blocks/att/W_key/bias",       "E",   "trf_blocks.{}.att.W_key.bias",         "E", _with_qkv_bias),
    Parameter("trf_blocks/att/W_value/kernel",   "DE",  "trf_blocks.{}.att.W_value.weight",     "ED"),
    Parameter("trf_blocks/att/W_value/bias",     "E",   "trf_blocks.{}.att.W_value.bias",       "E", _with_qkv_bias),
    Parameter("trf_blocks/att/out_proj/kernel",  "ED",  "trf_blocks.{}.att.out_proj.weight",    "DE"),
    Parameter("trf_blocks/att/out_proj/bias",    "D",   "trf_blocks.{}.att.out_proj.bias",      "D"),
    Parameter("trf_blocks/ff/layers_0/kernel",   "DF",  "trf_blocks.{}.ff.layers.0.weight",     "FD"),
    Parameter("trf_blocks/ff/layers_0/bias",     "F",   "trf_blocks.{}.ff.layers.0.bias",       "F"),
    Parameter("trf_blocks/ff/layers_2/kernel",   "FD",  "trf_blocks.{}.ff.layers.2.weight",     "DF"),
    Parameter("trf_blocks/ff/layers_2/bias",     "D",   "trf_blocks.{}.ff.layers.2.bias",       "D"),
    Parameter("trf_blocks/norm1/scale",          "D",   "trf_blocks.{}.norm1.scale",            "D"),
    Parameter("trf_blocks/norm1/shift",          "D",   "trf_blocks.{}.norm1.shift",            "D"),
    Parameter("trf_blocks/norm2/scale",          "D",   "trf_blocks.{}.norm2.scale",            "D"),
    Parameter("trf_blocks/norm2/shift",          "D",   "trf_blocks.{}.norm2.shift",            "D"),
    Parameter("final_norm/scale",                "D",   "final_norm.scale",                     "D"),
    Parameter("final_norm/shift",                "D",   "final_norm.shift",                     "D"),
    Parameter("out_head/kernel",                 "DV",  "out_head.weight",                      "VD", _untied),
)  # fmt: skip


def parameters(cfg: GPTConfig) -> list[Parameter]:
    """Those that a model of this config has."""
    return [row for row in PARAMETERS if row.exists(cfg)]


def sizes(cfg: GPTConfig) -> Mapping[str, int]:
    """Letter -> size: V vocabulary, C context length, D emb_dim, E all heads side by side (N H = D), F feed-forward."""
    return {"V": cfg.vocab_size, "C": cfg.context_length, "D": cfg.emb_dim, "E": cfg.emb_dim, "F": 4 * cfg.emb_dim}


def module_path(name: str) -> str:
    """The reference's name of something in a module -> its path here: "trf_blocks.3.ff.layers.2" -> "trf_blocks/ff/layers_2"."""
    return re.sub(r"^trf_blocks\.\d+\b", "trf_blocks", name).replace("layers.", "layers_").replace(".", "/")


def module_name(path: str, layer: int) -> str:
    """The inverse of `module_path`; in the blocks, of this layer."""
    return path.replace("trf_blocks", f"trf_blocks.{layer}", 1).replace("layers_", "layers.").replace("/", ".")
