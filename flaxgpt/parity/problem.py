"""What both sides of a comparison are given: a config, weights, batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flaxgpt.config import GPTConfig, TrainConfig
from flaxgpt.convert.params import check_finite, parameter_shapes
from flaxgpt.errors import InputError
from flaxgpt.parity.side import Batch, Moments, Tensors


@dataclass(frozen=True)
class Problem:
    """What both sides are given."""

    cfg: TrainConfig
    weights: Tensors
    """float32, by the names of the reference's parameters."""
    batches: tuple[Batch, ...]
    """(inputs_BT, targets_BT) for each update of the training rungs; the first one also serves the single passes."""
    seed: int
    moments: tuple[int, Moments] | None = None
    """The number of updates that an optimizer has made, and its moments, to start one more update from."""


def make_problem(
    cfg: TrainConfig,
    weights: Tensors | None = None,
    *,
    moments: tuple[int, Moments] | None = None,
    seed: int = 0,
    batch: int = 2,
    length: int | None = None,
    steps: int = 5,
) -> Problem:
    """Random tokens for a model, and random weights if it has none.

    Args:
        cfg: the model, and the options of the optimizer.
        weights: its parameters; None: random ones, with nothing at a default that hides a bug (norms and biases are random too).
        moments: of an optimizer, for one more variant of the rung adamw.
        seed: of all that is random.
        batch: rows of a batch.
        length: tokens of a row; None: the context length.
        steps: updates of the training rungs.

    Raises:
        InputError: weights that are not finite, a length beyond the context, or sizes that leave nothing to compare.
    """
    length = cfg.model.context_length if length is None else length
    for name, value, least in (("batch", batch, 1), ("length", length, 1), ("steps", steps, 2)):
        if value < least:
            raise InputError(f"{name}={value}: expected at least {least}")
    if length > cfg.model.context_length:
        raise InputError(f"length={length}: expected at most the model's context_length={cfg.model.context_length}")
    rng = np.random.default_rng(seed)
    weights = random_weights(cfg.model, seed) if weights is None else weights
    check_finite(weights, "the weights")
    windows = rng.integers(0, cfg.model.vocab_size, (steps, batch, length + 1))
    cfg = cfg.replace(seed=seed, model=cfg.model.replace(dtype="float32"))  # the precision under test is chosen later
    return Problem(cfg, weights, tuple((w[:, :-1].copy(), w[:, 1:].copy()) for w in windows), seed, moments)


def random_weights(cfg: GPTConfig, seed: int) -> Tensors:
    """Weights that keep every layer's output of order 1, with nothing at its default: norms and biases are random too."""
    rng = np.random.default_rng([seed, 1])

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if "emb" in name:
            return rng.normal(size=shape) * shape[1] ** -0.5
        if len(shape) == 2:
            return rng.uniform(-1, 1, shape) * shape[1] ** -0.5
        return name.endswith("scale") + 0.3 * rng.normal(size=shape)

    return {name: draw(name, shape).astype(np.float32) for name, shape in parameter_shapes(cfg).items()}
