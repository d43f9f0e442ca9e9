"""The training loss, and the loss of each token."""

from __future__ import annotations

import jax
import optax

from flaxgpt.config import GPTConfig
from flaxgpt.kernels import LOSS_TOKENS, choose_loss_chunk, chunked_loss, padded_logits
from flaxgpt.sharding import ways


def head_loss(x_BTD: jax.Array, kernel_DV: jax.Array, targets_BT: jax.Array, cfg: GPTConfig) -> jax.Array:
    """The loss of `next_token_loss`, from `flaxgpt.model.hidden` and `head_kernel`, `cfg.loss_chunk` positions of each row at a time."""
    B, T = targets_BT.shape
    chunk = choose_loss_chunk(cfg, B // ways("fsdp", B), T)
    return chunked_loss(x_BTD, kernel_DV, targets_BT, cfg.vocab_size, chunk)


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


@jax.named_scope("loss")
def token_losses(x_BTD: jax.Array, kernel_DV: jax.Array, targets_BT: jax.Array, vocab_size: int) -> jax.Array:
    """The loss of each target by itself, of which `next_token_loss` is the mean; the logits of LOSS_TOKENS tokens are held at a time.

    Args:
        x_BTD: the final norm's output.
        kernel_DV: the head's weights; the product is in the precision of x.
        targets_BT: token ids.
        vocab_size: columns of the kernel that are tokens; the others are padding.

    Returns:
        (B, T), float32 at least.
    """
    kernel_DV = kernel_DV.astype(x_BTD.dtype)  # once, before the loop

    def of_token(token: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_D, target = token
        return next_token_loss(padded_logits(x_D[None, None], kernel_DV, vocab_size), target[None, None])

    losses = jax.lax.map(of_token, (x_BTD.reshape(-1, x_BTD.shape[-1]), targets_BT.reshape(-1)), batch_size=LOSS_TOKENS)
    return losses.reshape(targets_BT.shape)
