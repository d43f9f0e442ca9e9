"""The activations that can be looked at, compared and edited: what goes into or comes out of a module, and what it is called where."""

from __future__ import annotations

import re
from typing import NamedTuple

from flaxgpt.errors import InputError


class Site(NamedTuple):
    """A place in the forward pass. A point is a module's path and "input" or "output": the first argument of its call, or the result."""

    name: str
    axes: str
    """Letters of its shape; E is all heads side by side (N H)."""
    point: str
    """In the reference, and with slashes in flaxgpt: "trf_blocks.0.norm1.output"; "output" is that of the model."""
    huggingface: str
    """In Hugging Face's `GPT2LMHeadModel`; of a module that returns several things, the last."""
    third: int | None = None
    """Which third of that, along the last axis; None: all of it."""


# In the order of the forward pass; those of a block within it.
_BLOCK = (
    #    name                  torch_ref and flaxgpt   Hugging Face
    Site("norm1.out",   "BTD",  "norm1.output",         "ln_1.output"),
    Site("att.query",   "BTE",  "att.W_query.output",   "attn.c_attn.output", 0),
    Site("att.key",     "BTE",  "att.W_key.output",     "attn.c_attn.output", 1),
    Site("att.value",   "BTE",  "att.W_value.output",   "attn.c_attn.output", 2),
    Site("att.weights", "BNTS", "att.dropout.input",    "attn.output"),
    Site("att.context", "BTE",  "att.out_proj.input",   "attn.c_proj.input"),
    Site("att.out",     "BTD",  "att.output",           "attn.c_proj.output"),
    Site("shortcut1",   "BTD",  "shortcut1.output",     "ln_2.input"),
    Site("norm2.out",   "BTD",  "norm2.output",         "ln_2.output"),
    Site("ff.hidden",   "BTF",  "ff.layers.2.input",    "mlp.c_proj.input"),
    Site("ff.out",      "BTD",  "ff.output",            "mlp.c_proj.output"),
    Site("shortcut2",   "BTD",  "output",               "output"),
)  # fmt: skip
_BEFORE = (Site("embedding", "BTD", "drop_emb.output", "transformer.drop.output"),)
_AFTER = (
    Site("final_norm.out", "BTD", "final_norm.output", "transformer.ln_f.output"),
    Site("logits", "BTV", "output", "lm_head.output"),
)


def sites(n_layers: int) -> list[Site]:
    """The sites of a model with so many blocks, in the order of the forward pass."""
    return [*_BEFORE, *(_of_layer(site, i) for i in range(n_layers) for site in _BLOCK), *_AFTER]


def sites_meant(name: str, n_layers: int) -> list[Site]:
    """The site of this name, or with {} for the number of the block, that of each block.

    Raises:
        InputError: there is none, with all that there are.
    """
    pattern = re.escape(name).replace(re.escape("{}"), r"\d+", 1)
    found = [site for site in sites(n_layers) if re.fullmatch(pattern, site.name)]
    if not found:
        of_block = ", ".join(site.name for site in _BLOCK)
        others = ", ".join(site.name for site in (*_BEFORE, *_AFTER))
        raise InputError(
            f"there is no site {name}: there are {others}, and trf_blocks.N. (N from 0 to {n_layers - 1}, or {{}} for all) with {of_block}"
        )
    return found


def dropouts(n_layers: int) -> list[str]:
    """The reference's dropout modules, in the order in which a forward pass calls them."""
    block = ("att.dropout", "drop_shortcut1", "drop_shortcut2")
    return ["drop_emb", *(f"trf_blocks.{i}.{name}" for i in range(n_layers) for name in block)]


def _of_layer(site: Site, i: int) -> Site:
    return site._replace(
        name=f"trf_blocks.{i}.{site.name}", point=f"trf_blocks.{i}.{site.point}", huggingface=f"transformer.h.{i}.{site.huggingface}"
    )
