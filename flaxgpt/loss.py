"""The training loss."""

from __future__ import annotations

import jax
import optax


@jax.named_scope("loss")
def next_token_loss(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of the targets, in nats per token; exp of it is the perplexity.

    Args:
        logits_BTV: float32 or float64.
        targets_BT: token ids, int32 or int64.

    Returns:
        (), in the dtype of the logits. Same reduction as torch.nn.functional.cross_entropy on flattened inputs.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT).mean()
