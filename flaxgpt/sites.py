"""The activations that are compared: what goes into or comes out of a module, and what that module is called in each implementation."""

from __future__ import annotations

from typing import NamedTuple


class Site(NamedTuple):
    """A place in the forward pass. A point is a module's path and "input" or "output": the first argument of its call, or the result."""

    name: str
    point: str
    """In the reference, and with slashes in flaxgpt: "trf_blocks.0.norm1.output"; "output" is that of the model."""
    huggingface: str
    """In Hugging Face's `GPT2LMHeadModel`; of a module that returns several things, the last."""
    third: int | None = None
    """Which third of that, along the last axis; None: all of it."""


# In the order of the forward pass; those of a block within it.
_BLOCK = (
    #    name           torch_ref and flaxgpt   Hugging Face
    Site("norm1.out",   "norm1.output",         "ln_1.output"),
    Site("att.query",   "att.W_query.output",   "attn.c_attn.output", 0),
    Site("att.key",     "att.W_key.output",     "attn.c_attn.output", 1),
    Site("att.value",   "att.W_value.output",   "attn.c_attn.output", 2),
    Site("att.weights", "att.dropout.input",    "attn.output"),
    Site("att.context", "att.out_proj.input",   "attn.c_proj.input"),
    Site("att.out",     "att.output",           "attn.c_proj.output"),
    Site("shortcut1",   "shortcut1.output",     "ln_2.input"),
    Site("norm2.out",   "norm2.output",         "ln_2.output"),
    Site("ff.hidden",   "ff.layers.2.input",    "mlp.c_proj.input"),
    Site("ff.out",      "ff.output",            "mlp.c_proj.output"),
    Site("shortcut2",   "output",               "output"),
)  # fmt: skip


def sites(n_layers: int) -> list[Site]:
    """The sites of a model with so many blocks, in the order of the forward pass."""
    blocks = [
        Site(f"trf_blocks.{i}.{name}", f"trf_blocks.{i}.{point}", f"transformer.h.{i}.{huggingface}", third)
        for i in range(n_layers)
        for name, point, huggingface, third in _BLOCK
    ]
    return [
        Site("embedding", "drop_emb.output", "transformer.drop.output"),
        *blocks,
        Site("final_norm.out", "final_norm.output", "transformer.ln_f.output"),
        Site("logits", "output", "lm_head.output"),
    ]


def dropouts(n_layers: int) -> list[str]:
    """The reference's dropout modules, in the order in which a forward pass calls them."""
    block = ("att.dropout", "drop_shortcut1", "drop_shortcut2")
    return ["drop_emb", *(f"trf_blocks.{i}.{name}" for i in range(n_layers) for name in block)]
