"""A model's loss on a text of any length."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flaxgpt.config import GPTConfig
from flaxgpt.data.token_files import Tokens
from flaxgpt.data.tokenizer import END_OF_TEXT, Tokenizer
from flaxgpt.errors import InputError
from flaxgpt.evaluation.estimate import BlockSums, Evaluation
from flaxgpt.evaluation.windows import SlidingWindows
from flaxgpt.loss import token_losses
from flaxgpt.model import head_kernel, hidden
from flaxgpt.types import Batch, Params

Track = Callable[[Sequence[Batch]], Iterable[Batch]]
"""Goes through batches and shows how far it is, as `rich.progress.track`."""

ALIGNMENT = 128
"""Windows are filled up to a multiple of this, where the context allows it: what the kernels for attention ask for."""


def evaluate(
    params: Params,
    cfg: GPTConfig,
    tokenizer: Tokenizer,
    tokens: Tokens,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    track: Track = iter,
) -> Evaluation:
    """Loss, perplexity and bits per byte of a text, with their standard errors.

    The text goes through the model in the windows of `flaxgpt.evaluation.windows.SlidingWindows`, with a program that is compiled once.
    Memory depends on the batch, not on the text; the logits of 2048 tokens are held at a time. Products of float32 are computed in
    float32, also where a device would rather take less. Attention is computed as in training (`cfg.attention`).

    Args:
        params: as `flaxgpt.init_params` makes them, or `flaxgpt.load` reads them.
        cfg: the model.
        tokenizer: what its ids mean; its vocabulary may be smaller than the model's.
        tokens: (number of tokens,), at least 2, of an integer type; it may be memory-mapped.
        context: the most tokens to predict one from; None: the model's context length.
        stride: tokens between the starts of neighbouring windows; None: half the context. A smaller one gives each token more to be
            predicted from, and is slower.
        batch_size: windows that are computed at once.
        track: shows progress.

    Raises:
        InputError: a value is out of range, there are fewer than two tokens, an id is outside the vocabulary, or a loss is not finite.
    """
    context = cfg.context_length if context is None else context
    if not 1 <= context <= cfg.context_length:
        raise InputError(f"context={context}: expected 1 to the model's context length, {cfg.context_length}")
    stride = max(1, context // 2) if stride is None else stride
    bytes_V = byte_lengths(tokenizer)
    multiple = ALIGNMENT if cfg.context_length % ALIGNMENT == 0 else 1
    windows = SlidingWindows(tokens, context=context, stride=stride, batch_size=batch_size, multiple=multiple)
    sums = BlockSums(windows.n_scored)
    for ids_N, losses_N in scored_tokens(params, cfg, track(windows), len(bytes_V)):
        sums.add(losses_N, bytes_V[ids_N])
    return sums.evaluation(context, stride)


def scored_tokens(params: Params, cfg: GPTConfig, batches: Iterable[Batch], vocab_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The scored tokens of each batch in the order of the text: ids_N, and losses_N in nats, float64.

    Raises:
        InputError: an id is not below `vocab_size`, or a loss is not finite.
    """
    n_before = 0
    for inputs_BT, targets_BT in batches:
        if outside := [i for i in (inputs_BT.min(), inputs_BT.max(), targets_BT.max()) if not 0 <= i < vocab_size]:
            raise InputError(f"the text has the token id {outside[0]}, outside the vocabulary of {vocab_size}")
        with jax.default_matmul_precision("float32"):
            losses_BT = np.asarray(_losses(params, cfg, inputs_BT, np.maximum(targets_BT, 0)), np.float64)
        scored_BT = targets_BT >= 0
        ids_N, losses_N = targets_BT[scored_BT], losses_BT[scored_BT]
        if not np.isfinite(losses_N).all():
            at = n_before + 1 + int(np.argmin(np.isfinite(losses_N)))
            raise InputError(f"the loss of token {at} is not finite: the model's weights are damaged, or its training diverged")
        n_before += len(ids_N)
        yield ids_N, losses_N


@functools.partial(jax.jit, static_argnames="cfg")
def _losses(params: Params, cfg: GPTConfig, inputs_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
    return token_losses(hidden(params, cfg, jnp.asarray(inputs_BT)), head_kernel(params, cfg), targets_BT, cfg.vocab_size)


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """(V,) int64: bytes of the text of each token in UTF-8; 0 for the end of a text, which is none."""
    pieces = (tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size))
    return np.array([0 if piece == END_OF_TEXT.encode() else len(piece) for piece in pieces])
