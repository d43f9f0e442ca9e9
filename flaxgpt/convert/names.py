"""Every parameter of the model, one line each: where it is in flaxgpt, and what it is called elsewhere. Imports no framework."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

from flaxgpt.config import GPTConfig
from flaxgpt.errors import InputError


def _always(_: GPTConfig) -> bool:
    return True


def _qkv_bias(cfg: GPTConfig) -> bool:
    return cfg.qkv_bias


def _bias(cfg: GPTConfig) -> bool:
    return cfg.bias


def _untied(cfg: GPTConfig) -> bool:
    return not cfg.tie_embeddings


class Row(NamedTuple):
    """One parameter. Axes are letters (see `sizes`), so that those of two formats show whether one is the other transposed."""

    path: str
    """In flaxgpt's tree; in the blocks, one array for all layers, with a leading L axis."""
    axes: str
    """There, of one layer."""
    torch: str
    """Key in a state_dict of `torch_ref.model.GPTModel`; {} is the layer."""
    torch_axes: str
    huggingface: str
    """Key in a state_dict of Hugging Face's `GPT2Model`, and in nanoGPT's; in `GPT2LMHeadModel`, and nanoGPT's `GPT`, "transformer." is
    before all but the head's."""
    huggingface_axes: str
    """There; nanoGPT's linear layers are torch's, so its axes are `torch_axes`."""
    third: int | None = None
    """Which third, along the axis E, of a tensor there that holds query, key and value side by side; None: it is all of it."""
    exists: Callable[[GPTConfig], bool] = _always

    @property
    def stacked(self) -> bool:
        """Whether it is one of each block's."""
        return "{}" in self.torch


# In the order of the reference's modules, by which torch's optimizers number parameters.
PARAMETERS = (
    #   flaxgpt                                 torch_ref                                  Hugging Face, nanoGPT (names)
    Row("tok_emb/embedding",              "VD", "tok_emb.weight",                    "VD", "wte.weight",              "VD"),
    Row("pos_emb/embedding",              "CD", "pos_emb.weight",                    "CD", "wpe.weight",              "CD"),
    Row("trf_blocks/att/W_query/kernel",  "DE", "trf_blocks.{}.att.W_query.weight",  "ED", "h.{}.attn.c_attn.weight", "DE", 0),
    Row("trf_blocks/att/W_query/bias",    "E",  "trf_blocks.{}.att.W_query.bias",    "E",  "h.{}.attn.c_attn.bias",   "E", 0, _qkv_bias),
    Row("trf_blocks/att/W_key/kernel",    "DE", "trf_blocks.{}.att.W_key.weight",    "ED", "h.{}.attn.c_attn.weight", "DE", 1),
    Row("trf_blocks/att/W_key/bias",      "E",  "trf_blocks.{}.att.W_key.bias",      "E",  "h.{}.attn.c_attn.bias",   "E", 1, _qkv_bias),
    Row("trf_blocks/att/W_value/kernel",  "DE", "trf_blocks.{}.att.W_value.weight",  "ED", "h.{}.attn.c_attn.weight", "DE", 2),
    Row("trf_blocks/att/W_value/bias",    "E",  "trf_blocks.{}.att.W_value.bias",    "E",  "h.{}.attn.c_attn.bias",   "E", 2, _qkv_bias),
    Row("trf_blocks/att/out_proj/kernel", "ED", "trf_blocks.{}.att.out_proj.weight", "DE", "h.{}.attn.c_proj.weight", "ED"),
    Row("trf_blocks/att/out_proj/bias",   "D",  "trf_blocks.{}.att.out_proj.bias",   "D",  "h.{}.attn.c_proj.bias",   "D", exists=_bias),
    Row("trf_blocks/ff/layers_0/kernel",  "DF", "trf_blocks.{}.ff.layers.0.weight",  "FD", "h.{}.mlp.c_fc.weight",    "DF"),
    Row("trf_blocks/ff/layers_0/bias",    "F",  "trf_blocks.{}.ff.layers.0.bias",    "F",  "h.{}.mlp.c_fc.bias",      "F", exists=_bias),
    Row("trf_blocks/ff/layers_2/kernel",  "FD", "trf_blocks.{}.ff.layers.2.weight",  "DF", "h.{}.mlp.c_proj.weight",  "FD"),
    Row("trf_blocks/ff/layers_2/bias",    "D",  "trf_blocks.{}.ff.layers.2.bias",    "D",  "h.{}.mlp.c_proj.bias",    "D", exists=_bias),
    Row("trf_blocks/norm1/scale",         "D",  "trf_blocks.{}.norm1.scale",         "D",  "h.{}.ln_1.weight",        "D"),
    Row("trf_blocks/norm1/shift",         "D",  "trf_blocks.{}.norm1.shift",         "D",  "h.{}.ln_1.bias",          "D", exists=_bias),
    Row("trf_blocks/norm2/scale",         "D",  "trf_blocks.{}.norm2.scale",         "D",  "h.{}.ln_2.weight",        "D"),
    Row("trf_blocks/norm2/shift",         "D",  "trf_blocks.{}.norm2.shift",         "D",  "h.{}.ln_2.bias",          "D", exists=_bias),
    Row("final_norm/scale",               "D",  "final_norm.scale",                  "D",  "ln_f.weight",             "D"),
    Row("final_norm/shift",               "D",  "final_norm.shift",                  "D",  "ln_f.bias",               "D", exists=_bias),
    Row("out_head/kernel",                "DV", "out_head.weight",                   "VD", "lm_head.weight",          "VD", exists=_untied),
)  # fmt: skip

VOCAB_AXES = {row.path: row.axes.index("V") for row in PARAMETERS if "V" in row.axes}
"""Path of each parameter that has a row or column for each token -> which of its axes that is."""


HEAD = PARAMETERS[-1]


class Layout(NamedTuple):
    """A kind of state_dict: which columns of the table it has, and what may vary in its names."""

    names_column: Literal["torch", "huggingface"]
    axes_column: Literal["torch_axes", "huggingface_axes"]
    prefix: str
    """Before all names but the head's, or before none."""
    complete: Callable[[GPTConfig], GPTConfig]
    """A config -> the one with all biases that a state_dict of such a model has."""

    def names(self, row: Row, cfg: GPTConfig) -> list[str]:
        """A parameter's names: one for each layer, or one."""
        name = getattr(row, self.names_column)
        name = name if row is HEAD else self.prefix + name
        return [name.format(i) for i in range(cfg.n_layers)] if row.stacked else [name]

    def axes(self, row: Row) -> str:
        """The axes of its tensor, of one layer."""
        return getattr(row, self.axes_column)

    def third(self, row: Row) -> int | None:
        """Which third, along the axis E, of that tensor it is; None: it is all of it."""
        return row.third if self.names_column == "huggingface" else None

    def full_names(self, keys: Iterable[str]) -> dict[str, str]:
        """Full name -> key as it is there, perhaps without prefixes or with that of torch.compile; causal masks are left out.

        Raises:
            InputError: a tensor is there under both names.
        """
        keys = [*keys]
        names = {key.removeprefix("_orig_mod."): key for key in keys}
        if len(names) < len(keys):
            twice = [key for key in keys if key not in names.values()]
            raise InputError(f"the state_dict has tensors twice, with and without _orig_mod.: {', '.join(twice)}")
        if not any(name.startswith(self.prefix) for name in names):
            names = {name if name == getattr(HEAD, self.names_column) else self.prefix + name: key for name, key in names.items()}
        return {name: key for name, key in names.items() if not is_mask(name)}


REFERENCE = Layout("torch", "torch_axes", "", lambda cfg: cfg)
HUGGINGFACE = Layout("huggingface", "huggingface_axes", "transformer.", lambda cfg: cfg.replace(bias=True, qkv_bias=True))
NANOGPT = Layout("huggingface", "torch_axes", "transformer.", lambda cfg: cfg.replace(qkv_bias=cfg.bias))


def is_mask(name: str) -> bool:
    """Whether it is a causal mask in a state_dict of any layout, which the config determines."""
    return re.search(r"\btrf_blocks\.\d+\.att\.mask$|\bh\.\d+\.attn\.(masked_)?bias$", name) is not None


def parameters(cfg: GPTConfig) -> list[Row]:
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
