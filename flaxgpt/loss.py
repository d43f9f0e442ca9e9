"""What training minimises, and how it is quoted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def next_token_loss(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of the targets, in nats per token.

    Same reduction as torch.nn.functional.cross_entropy on flattened inputs.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT.astype(jnp.int32)).mean()


def perplexity(loss: jax.Array | float) -> jax.Array:
    """exp(loss): the number of equally likely tokens that would be as hard to guess."""
    return jnp.exp(loss)
