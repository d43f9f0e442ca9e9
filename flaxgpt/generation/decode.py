"""Two compiled functions, prefill and decode, around a state that goes in and comes out. No tokens leave the device."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flaxgpt.cache import Cache
from flaxgpt.config import GPTConfig
from flaxgpt.edits import Edit
from flaxgpt.generation.sampling import Chain, Seen, choose
from flaxgpt.interventions import editing, visiting
from flaxgpt.model import GPT, TransformerBlock
from flaxgpt.types import Params


class Scores(NamedTuple):
    """The model's own log-probabilities, before any processor, for each new token (natural logarithms)."""

    log_probs_BT: jax.Array
    top_ids_BTK: jax.Array
    top_log_probs_BTK: jax.Array


class State(NamedTuple):
    """All that changes while text is generated. Rows end at the same column, so they begin at different ones."""

    prompt_BT: jax.Array  # with padding before it; this alone stays as it is
    new_BT: jax.Array  # the new tokens and the room for more, which holds the end token
    t: jax.Array  # new tokens so far
    ended_B: jax.Array
    lengths_B: jax.Array  # new tokens of each row, the end token included
    cache: Cache
    seen: Seen | None  # if a penalty is on
    scores: Scores | None  # if they were asked for

    def end(self, rows_B: ArrayLike) -> State:
        """The state in which these rows have ended as well: they get no more tokens."""
        return self._replace(ended_B=self.ended_B | rows_B)


@functools.partial(jax.jit, static_argnames="cfg")
def unstack(params: Params, cfg: GPTConfig) -> Params:
    """Parameters as decoding reads them: a tuple of blocks, matrices in the compute dtype.

    A slice of a stacked array is copied before it is multiplied, and so is one that is converted: done once here, it is not
    done again for each token.
    """

    def convert(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return x.astype(cfg.dtype) if path[-1].key in ("kernel", "embedding") else jnp.asarray(x)

    def block(i: int) -> Params:
        return jax.tree.map(lambda x: x[i], params["trf_blocks"])

    params = jax.tree_util.tree_map_with_path(convert, params)
    return params | {"trf_blocks": tuple(map(block, range(cfg.n_layers)))}


def next_logits(
    params: Params, cfg: GPTConfig, tokens_BT: jax.Array, cache: Cache, edits: Mapping[str, Edit] | None = None
) -> tuple[jax.Array, Cache]:
    """The tokens that follow those in the cache -> logits_BV of the one after them, and the cache with them in it.

    A pure function of `unstack`ed parameters. The layers are not scanned but written out, which takes longer to compile
    and half as long to run.
    """
    model, outside = GPT(cfg), {name: leaf for name, leaf in params.items() if name != "trf_blocks"}
    T = tokens_BT.shape[1]
    positions_BT, edits = cache.positions_BT(T), edits or {}
    with visiting(*editing(edits, cfg, positions_BT)):
        x_BTD = model.apply({"params": outside}, tokens_BT, positions_BT, method="embed")
    layers = []
    for i, (block, layer) in enumerate(zip(params["trf_blocks"], cache.layers(T), strict=True)):
        with visiting(*editing(edits, cfg, positions_BT, layer=i), within="trf_blocks"):
            x_BTD, layer = TransformerBlock(cfg).apply({"params": block}, x_BTD, layer)
        layers.append(layer)
    with visiting(*editing(edits, cfg, positions_BT)):
        logits_BV = model.apply({"params": outside}, x_BTD, method="last_logits")
    return logits_BV, cache.with_layers(layers)


@functools.partial(jax.jit, static_argnames=("cfg", "room", "num_samples", "top_log_probs"))
def prefill(
    params: Params,
    cfg: GPTConfig,
    prompt_BT: jax.Array,
    first_B: jax.Array,
    chain: Chain,
    keys_B: jax.Array | None,
    eos_id: jax.Array,
    prompt_seen_BV: jax.Array | None,
    edits: Mapping[str, Edit] | None = None,
    *,
    room: int,
    num_samples: int = 1,
    top_log_probs: int | None = None,
) -> State:
    """Read the prompts in one pass, and choose the first new token of each row.

    Args:
        params: as `unstack` returns them.
        cfg: the model's config.
        prompt_BT: the prompts, at most context_length columns, all ending at the last one; padding before them.
        first_B: the column at which each begins.
        chain: the processors.
        keys_B: a key for each row of the result; None is greedy.
        eos_id: the token that ends a row, or -1.
        prompt_seen_BV: which tokens occur in each prompt, if a penalty is on.
        edits: what becomes of activations, as `flaxgpt.edits.checked_edits` returns it.
        room: columns for new tokens.
        num_samples: rows made of each prompt, next to each other.
        top_log_probs: log-probabilities to keep for each token besides its own; None: not even that.
    """
    slots = prompt_BT.shape[1] + min(room, cfg.context_length)  # the cache is of no use past the context
    logits_BV, cache = next_logits(params, cfg, prompt_BT, Cache.empty(cfg, first_B, slots), edits)
    if num_samples > 1:
        rows = logits_BV, cache, prompt_BT, prompt_seen_BV
        logits_BV, cache, prompt_BT, prompt_seen_BV = _repeat_rows(rows, num_samples)
    B = prompt_BT.shape[0]
    counts_BV = None if prompt_seen_BV is None else jnp.zeros(prompt_seen_BV.shape, jnp.int32)
    state = State(
        prompt_BT=prompt_BT,
        new_BT=jnp.full((B, room), jnp.maximum(eos_id, 0)),
        t=jnp.int32(0),
        ended_B=jnp.zeros(B, bool),
        lengths_B=jnp.zeros(B, jnp.int32),
        cache=cache,
        seen=None if prompt_seen_BV is None else Seen(prompt_seen_BV, counts_BV),
        scores=None if top_log_probs is None else _no_scores(B, room, top_log_probs),
    )
    return _add_token(state, logits_BV, chain, keys_B, eos_id)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def decode(
    params: Params,
    cfg: GPTConfig,
    state: State,
    until: jax.Array,
    chain: Chain,
    keys_B: jax.Array | None,
    eos_id: jax.Array,
    edits: Mapping[str, Edit] | None = None,
) -> State:
    """Add tokens until there are `until` new ones or every row has ended: a loop on the device.

    While the longest row fits in the context, a token costs one pass over itself and the cache. After that the window
    slides: every token's position changes at every step, and with it every key and value, so a token costs a pass over
    the window, and the cache is left as it is.

    Args:
        params: as in `prefill`.
        cfg: the model's config.
        state: what `prefill` or this returned; donated.
        until: the number of new tokens to reach.
        chain: the processors.
        keys_B: a key for each row; None is greedy.
        eos_id: the token that ends a row, or -1.
        edits: as in `prefill`.
    """
    C, T, first_B = cfg.context_length, state.prompt_BT.shape[1], state.cache.first_B

    def unfinished(until: jax.Array, state: State) -> jax.Array:
        return (state.t < until) & ~state.ended_B.all()

    def cached(state: State) -> State:
        newest_B1 = jax.lax.dynamic_slice_in_dim(state.new_BT, state.t - 1, 1, axis=1)
        logits_BV, cache = next_logits(params, cfg, newest_B1, state.cache, edits)
        return _add_token(state._replace(cache=cache), logits_BV, chain, keys_B, eos_id)

    def windowed(state: State) -> State:
        left = T + state.t - C
        tokens_BT = jnp.concatenate([state.prompt_BT, state.new_BT], axis=1)
        window_BT = jax.lax.dynamic_slice_in_dim(tokens_BT, left, C, axis=1)
        scratch = Cache.empty(cfg, jnp.maximum(first_B - left, 0), C)
        logits_BV, _ = next_logits(params, cfg, window_BT, scratch, edits)
        return _add_token(state, logits_BV, chain, keys_B, eos_id)

    # Token number t is chosen by its row's prompt and t new tokens.
    longest = T - first_B.min()
    within = jnp.minimum(until, C - longest + 1)
    state = jax.lax.while_loop(functools.partial(unfinished, within), cached, state)
    if T + state.new_BT.shape[1] > C:
        state = jax.lax.while_loop(functools.partial(unfinished, until), windowed, state)
    return state


def _add_token(state: State, logits_BV: jax.Array, chain: Chain, keys_B: jax.Array | None, eos_id: jax.Array) -> State:
    """Choose a token for each row and write it down; a row that has ended gets the end token again."""
    B = logits_BV.shape[0]
    ids_B = choose(chain(logits_BV, state.seen), keys_B, state.t)
    ids_B = jnp.where(state.ended_B, jnp.maximum(eos_id, 0), ids_B)
    seen, scores = state.seen, state.scores
    if seen is not None:
        seen = seen._replace(counts_BV=seen.counts_BV.at[jnp.arange(B), ids_B].add(1))
    if scores is not None:
        log_probs_BV = jax.nn.log_softmax(logits_BV)
        top_BK, top_ids_BK = jax.lax.top_k(log_probs_BV, scores.top_ids_BTK.shape[-1])
        new = Scores(jnp.take_along_axis(log_probs_BV, ids_B[:, None], axis=1)[:, 0], top_ids_BK, top_BK)
        scores = jax.tree.map(lambda old, new: old.at[:, state.t].set(new.astype(old.dtype)), scores, new)
    return state._replace(
        new_BT=state.new_BT.at[:, state.t].set(ids_B),
        t=state.t + 1,
        ended_B=state.ended_B | (ids_B == eos_id),
        lengths_B=state.lengths_B + ~state.ended_B,
        seen=seen,
        scores=scores,
    )


def _repeat_rows(tree: Any, times: int) -> Any:
    """Each row so many times, next to each other; rows are the first axis of every array that has any."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0) if x.ndim else x, tree)


def _no_scores(B: int, room: int, top_log_probs: int) -> Scores:
    shape_BTK = (B, room, top_log_probs)
    return Scores(jnp.zeros((B, room)), jnp.zeros(shape_BTK, jnp.int32), jnp.zeros(shape_BTK))
