"""The activations that are compared: what goes into or comes out of a module that both sides have, by the reference's names."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Site(NamedTuple):
    """A place in the forward pass."""

    name: str
    module: str
    """The reference's path of a module; "" is the model."""
    end: Literal["input", "output"]
    """Whether it is the first argument of the module's call or its result."""

    @property
    def point(self) -> str:
        """Module and end as one name: "trf_blocks.0.norm1.output"."""
        return f"{self.module}.{self.end}".removeprefix(".")


# In the order of the forward pass; those of a block within it.
_BLOCK = (
    Site("norm1.out", "norm1", "output"),
    Site("att.query", "att.W_query", "output"),
    Site("att.key", "att.W_key", "output"),
    Site("att.value", "att.W_value", "output"),
    Site("att.weights", "att.dropout", "input"),
    Site("att.context", "att.out_proj", "input"),
    Site("att.out", "att", "output"),
    Site("shortcut1", "shortcut1", "output"),
    Site("norm2.out", "norm2", "output"),
    Site("ff.hidden", "ff.layers.2", "input"),
    Site("ff.out", "ff", "output"),
    Site("shortcut2", "", "output"),
)


def sites(n_layers: int) -> list[Site]:
    """The sites of a model with so many blocks, in the order of the forward pass."""
    blocks = [
        Site(f"trf_blocks.{i}.{name}", f"trf_blocks.{i}.{module}".rstrip("."), end) for i in range(n_layers) for name, module, end in _BLOCK
    ]
    return [
        Site("embedding", "drop_emb", "output"),
        *blocks,
        Site("final_norm.out", "final_norm", "output"),
        Site("logits", "", "output"),
    ]
