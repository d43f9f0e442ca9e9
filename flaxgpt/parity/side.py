"""What is asked of a side of a comparison. A side is a module with these functions, or an object with these methods.

There are three: the module `flaxgpt.parity.flax_side`, and objects of `torch_ref.parity.torch_side.TorchSide` and of
`torch_ref.parity.huggingface_side.HuggingFaceSide`. Weights, gradients and moments go in and come out as NumPy arrays by the
names of the reference's parameters. A dtype is the precision to compute in: "float32", "bfloat16" or "float64"; products of float32
are never rounded to less, whatever a device does by default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from flaxgpt.config import GPTConfig, TrainConfig
from flaxgpt.edits import Edits

Tensors = dict[str, np.ndarray]
"""Arrays by name, in the order in which they are computed."""

Batch = tuple[np.ndarray, np.ndarray]
"""inputs_BT and targets_BT, int64."""

Moments = dict[str, Tensors]
"""AdamW's "exp_avg" and "exp_avg_sq"."""

Noise = Callable[[int], np.ndarray]
"""t -> float32 (B, V), what is added to the processed logits to draw new token number t, from 0."""


class Side(Protocol):
    """What every side can do."""

    def passes(self, cfg: GPTConfig, weights: Tensors, batch: Batch, dtype: str) -> dict[str, Tensors]:
        """One forward and backward pass, without dropout.

        Returns:
            "activations"; "loss"; "backward", the gradients of the loss with respect to the activations, the last one first; and
            "gradients", those with respect to the parameters.
        """

    def editable(self, cfg: GPTConfig) -> list[str]:
        """The sites (`flaxgpt.sites`) whose activations can be edited."""

    def edited(self, cfg: GPTConfig, weights: Tensors, batch: Batch, edits: Edits, dtype: str) -> Tensors:
        """One forward and backward pass with edits, and then, of the same model, one without.

        Returns:
            "edited/..." and "after/...", the activations of the one and of the other; and of the first also "backward/..." and
            "gradients/...", as in `passes`.
        """

    def clip(self, gradients: Tensors, cfg: TrainConfig, dtype: str) -> Tensors:
        """The gradients clipped to `cfg.clip_norm`, and the global "norm" () that they had."""

    def adamw(self, cfg: TrainConfig, weights: Tensors, gradients: Tensors, moments: Moments, step: int, dtype: str) -> Tensors:
        """One update of AdamW from given gradients.

        Args:
            cfg: the run, without clipping.
            weights: before the update.
            gradients: what to update with.
            moments: before the update.
            step: the updates made before.
            dtype: the precision.

        Returns:
            "parameter/...", "exp_avg/..." and "exp_avg_sq/..." after it.
        """

    def train(
        self, cfg: TrainConfig, weights: Tensors, batches: Sequence[Batch], dtype: str, masks: Sequence[Tensors] | None = None
    ) -> tuple[Tensors, list[Tensors]]:
        """Train on these batches, one an update, by the side's own train step.

        Args:
            cfg: the run; its dropout is on if its rate is above 0.
            weights: to begin with.
            batches: one for each update.
            dtype: the precision.
            masks: what dropout keeps in each update, by the names of the reference's dropout modules; None: the side draws, by `cfg.seed`.

        Returns:
            The "loss" and "grad_norm" of all updates, and "parameter/...", "exp_avg/..." and "exp_avg_sq/..." after the last; and the
            masks of each update.
        """


class SeededSide(Side, Protocol):
    """The side that draws tokens from a seed, and can say which noise it draws with: flaxgpt."""

    def generate(
        self,
        cfg: GPTConfig,
        weights: Tensors,
        prompt_BT: np.ndarray,
        new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """Continue prompts in float32, drawing with `noise(seed, (B, V))`; token ids (B, T + new_tokens)."""

    def draw(self, logits_BV: np.ndarray, temperature: float, top_k: int | None, seed: int) -> np.ndarray:
        """One token (B,) for each row of logits, drawn with `noise(seed, (B, V))` of token 0."""

    def noise(self, seed: int, shape_BV: tuple[int, int]) -> Noise:
        """The Gumbel noise that `generate` adds to the logits of each new token."""


class NoiseDrivenSide(Side, Protocol):
    """The side that is handed the noise it draws tokens with: the reference, or Hugging Face's model in its place."""

    def generate(
        self,
        cfg: GPTConfig,
        weights: Tensors,
        prompt_BT: np.ndarray,
        new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        noise: Noise | None = None,
    ) -> np.ndarray:
        """Continue prompts in float32, drawing with this noise; token ids (B, T + new_tokens)."""

    def draw(self, logits_BV: np.ndarray, temperature: float, top_k: int | None, noise: Noise) -> np.ndarray:
        """One token (B,) for each row of logits, drawn with this noise of token 0."""
