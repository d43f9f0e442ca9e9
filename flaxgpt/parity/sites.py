"""The activations that are compared, by the reference's names."""

from __future__ import annotations

_BLOCK_TAPS = (
    *("norm1.out", "att.query", "att.key", "att.value", "att.weights", "att.context", "att.out", "shortcut1"),
    *("norm2.out", "ff.hidden", "ff.out", "shortcut2"),
)


def tap_names(n_layers: int) -> list[str]:
    """The activations that both sides record, in the order of the forward pass."""
    blocks = [f"trf_blocks.{i}.{name}" for i in range(n_layers) for name in _BLOCK_TAPS]
    return ["embedding", *blocks, "final_norm.out", "logits"]
