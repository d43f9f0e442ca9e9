"""Token ids -> their continuation: what a caller may ask for, checked, and put into shapes that seldom compile anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from flaxgpt.config import GPTConfig, SamplingConfig
from flaxgpt.errors import InputError
from flaxgpt.generation.decode import State, decode, prefill, unstack
from flaxgpt.generation.sampling import Chain, Function, row_keys


def generate(
    params: Any,
    cfg: GPTConfig,
    prompt_ids: Any,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | None = None,
    key: jax.Array | None = None,
    **options: Any,
) -> np.ndarray:
    """Continue each prompt by `max_new_tokens` tokens; `complete` tells more about them.

    Past the context length the model sees the last `context_length` tokens, positions numbered from 0 again, as the
    reference does. Each token then costs one pass over that window.

    Args:
        params: the model's parameters, stacked, or as `unstack` returns them (which saves doing that at each call).
        cfg: the model's config.
        prompt_ids: (B, T) token ids, or a list of lists of any lengths. At least one each; more than fit is allowed.
        max_new_tokens: tokens to add to each row.
        temperature: 0 is greedy.
        top_k: draw among the k likeliest tokens.
        eos_id: a row that has produced this token goes on with nothing else; the loop ends when all rows have.
        key: a typed PRNG key, needed unless the temperature is 0: row b draws with fold_in(key, b), whatever the other rows
            are. Or an array of keys, one for each row.
        **options: the other arguments of `complete`: prompt_mask, num_samples, functions, and the fields of SamplingConfig.

    Returns:
        int32 (B * num_samples, T + max_new_tokens), the prompts included. Prompts of a list that are shorter than the
        longest come after zeros. Samples of one prompt are next to each other.

    Raises:
        InputError: an empty prompt, ids outside the vocabulary, or settings that make no sense.
    """
    done = complete(params, cfg, prompt_ids, max_new_tokens, temperature=temperature, top_k=top_k, eos_id=eos_id, key=key, **options)
    if isinstance(prompt_ids, np.ndarray | jax.Array):
        columns_BT = np.repeat(np.asarray(prompt_ids, np.int32), options.get("num_samples", 1), axis=0)
    else:
        T = max(map(len, done.prompts))
        columns_BT = np.stack([np.pad(prompt, (T - len(prompt), 0)) for prompt in done.prompts])
    return np.concatenate([columns_BT, done.ids_BT], axis=1)


@dataclass(frozen=True)
class Completion:
    """What was added to each row, on the host. Arrays are as wide as the tokens asked for."""

    prompts: list[np.ndarray]
    ids_BT: np.ndarray
    """int32; after the end token, the end token again."""
    lengths_B: np.ndarray
    """New tokens of each row, the end token included."""
    log_probs_BT: np.ndarray | None
    """Natural logarithm of each token's probability under the model itself, before any processor; if asked for."""
    top_ids_BTK: np.ndarray | None
    """The likeliest tokens at each place, likeliest first."""
    top_log_probs_BTK: np.ndarray | None

    def ids(self, b: int) -> list[int]:
        """The new tokens of row b."""
        return self.ids_BT[b, : self.lengths_B[b]].tolist()


def complete(params: Any, cfg: GPTConfig, prompt_ids: Any, max_new_tokens: int, **options: Any) -> Completion:
    """As `generate`, with log-probabilities, their alternatives and the length of each row. Arguments are those of `Request.of`.

    Raises:
        InputError: as `generate`.
    """
    request = Request.of(params, cfg, prompt_ids, max_new_tokens, **options)
    if not max_new_tokens:
        return request.completion(None)
    return request.completion(request.decode(request.prefill(), max_new_tokens))


@dataclass(frozen=True)
class Request:
    """One call's arguments, checked and padded to shapes that many calls share."""

    params: Any
    cfg: GPTConfig
    prompts: list[np.ndarray]
    max_new_tokens: int
    chain: Chain
    keys_B: jax.Array | None
    eos_id: np.int32
    num_samples: int
    alternatives: int | None
    penalises: bool

    @classmethod
    def of(
        cls,
        params: Any,
        cfg: GPTConfig,
        prompt_ids: Any,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        eos_id: int | None = None,
        key: jax.Array | None = None,
        prompt_mask: Any = None,
        num_samples: int = 1,
        top_log_probs: int | None = None,
        functions: Sequence[Function] = (),
        **settings: Any,
    ) -> Request:
        """Check the arguments.

        Args:
            params: as in `generate`, and so are cfg, prompt_ids, max_new_tokens, temperature, eos_id and key.
            cfg: see there.
            prompt_ids: see there.
            max_new_tokens: see there.
            temperature: see there.
            eos_id: see there.
            key: see there.
            prompt_mask: (B, T) booleans, false for the padding at the left of each row of `prompt_ids`.
            num_samples: continuations of each prompt, which is read once for all of them.
            top_log_probs: return the log-probabilities of the new tokens, and of this many of the likeliest.
            functions: further processors, logits_BV -> logits_BV; a new function compiles anew.
            **settings: the fields of SamplingConfig.
        """
        sampling = SamplingConfig(temperature=temperature, **settings)
        sampling.check_vocabulary(cfg.vocab_size)
        prompts = _as_prompts(prompt_ids, prompt_mask, cfg.vocab_size)
        if eos_id is not None and not 0 <= eos_id < cfg.vocab_size:
            raise InputError(f"eos_id={eos_id} is outside the vocabulary of {cfg.vocab_size}")
        if max_new_tokens < 0:
            raise InputError(f"max_new_tokens={max_new_tokens}: expected at least 0")
        if num_samples < 1:
            raise InputError(f"num_samples={num_samples}: expected at least 1")
        if top_log_probs is not None and not 0 <= top_log_probs <= cfg.vocab_size:
            raise InputError(f"top_log_probs={top_log_probs}: expected 0 to the vocabulary's {cfg.vocab_size}")
        rows = len(prompts) * num_samples
        if rows * (max_new_tokens + cfg.context_length) * (1 + (top_log_probs or 0)) >= 2**31:
            raise InputError(f"max_new_tokens={max_new_tokens} in {rows} rows are more than can be held; ask for fewer")
        keys_B = row_keys(sampling, key, rows)
        return cls(
            params=params if isinstance(params["trf_blocks"], tuple) else unstack(params, cfg),
            cfg=cfg,
            prompts=[prompt for prompt in prompts for _ in range(num_samples)],
            max_new_tokens=max_new_tokens,
            chain=Chain.of(sampling, tuple(functions)),
            keys_B=keys_B,
            eos_id=np.int32(-1 if eos_id is None else eos_id),
            num_samples=num_samples,
            alternatives=top_log_probs,
            penalises=sampling.penalises,
        )

    @property
    def room(self) -> int:
        """Columns for new tokens: a multiple of 64, so that another number of them seldom compiles anew."""
        return -(-self.max_new_tokens // 64) * 64

    def prefill(self) -> State:
        """The state with the prompts read and the first new token chosen."""
        cfg, prompts = self.cfg, self.prompts[:: self.num_samples]
        lengths_B = np.array([min(len(prompt), cfg.context_length) for prompt in prompts], np.int32)
        # The power of two (8 at least) that holds the longest: few shapes, and at most twice the work of reading it.
        T = min(max(8, 1 << int(lengths_B.max() - 1).bit_length()), cfg.context_length)
        prompt_BT = np.zeros((len(prompts), T), np.int32)
        seen_BV = np.zeros((len(prompts), cfg.vocab_size), bool) if self.penalises else None
        for b, (prompt, length) in enumerate(zip(prompts, lengths_B, strict=True)):
            prompt_BT[b, T - length :] = prompt[-length:]
            if seen_BV is not None:
                seen_BV[b, prompt] = True
        return prefill(
            self.params,
            cfg,
            prompt_BT,
            T - lengths_B,
            self.chain,
            self.keys_B,
            self.eos_id,
            seen_BV,
            slots=min(T + self.room, T + cfg.context_length),  # the cache is of no use past the context
            room=self.room,
            num_samples=self.num_samples,
            alternatives=self.alternatives,
        )

    def decode(self, state: State, until: int) -> State:
        """The state with `until` new tokens, or fewer if all rows have ended. The one handed in is used up."""
        return decode(self.params, self.cfg, state, np.int32(until), self.chain, self.keys_B, self.eos_id, room=self.room)

    def stopped(self, state: State, rows: Sequence[bool]) -> State:
        """The state in which these rows have ended as well."""
        return state._replace(ended_B=state.ended_B | np.asarray(rows))

    def completion(self, state: State | None) -> Completion:
        """The new tokens so far, on the host; none for no state."""
        B, T = len(self.prompts), self.max_new_tokens
        if state is None:
            scores = None if self.alternatives is None else [np.zeros((B, 0)), *[np.zeros((B, 0, self.alternatives))] * 2]
            return Completion(self.prompts, np.zeros((B, 0), np.int32), np.zeros(B, np.int32), *(scores or [None] * 3))
        new_BT, lengths_B, t, scores = jax.device_get((state.tokens_BT[:, -self.room :], state.lengths_B, state.t, state.scores))
        new_BT = np.where(np.arange(self.room) < t, new_BT, max(self.eos_id, 0))
        scores = [None] * 3 if scores is None else [part[:, :T] for part in scores]
        return Completion(self.prompts, new_BT[:, :T], lengths_B, *scores)


def _as_prompts(prompt_ids: Any, prompt_mask: Any, vocab_size: int) -> list[np.ndarray]:
    """Each row's own tokens.

    Raises:
        InputError: a shape, an id or a mask that makes no sense.
    """
    try:
        rows = [np.asarray(row) for row in prompt_ids]
    except TypeError:
        rows = []
    if not rows or any(row.ndim != 1 or not row.size for row in rows):
        shapes = [row.shape for row in rows][:5]
        raise InputError(
            f"prompt_ids has {len(rows)} rows, the first of shapes {shapes}: expected (batch, tokens), at least one token each"
        )
    if prompt_mask is not None:
        mask_BT = np.asarray(prompt_mask, bool)
        if any(row.shape != mask_BT.shape[1:] for row in rows) or mask_BT.shape[0] != len(rows):
            raise InputError(f"prompt_mask has the shape {mask_BT.shape}, which is not that of prompt_ids")
        if not mask_BT[:, -1].all() or (np.diff(mask_BT.astype(int), axis=1) < 0).any():
            raise InputError("prompt_mask must be false at the left of a row and true from its first token to the end")
        rows = [row[mask] for row, mask in zip(rows, mask_BT, strict=True)]
    for row in rows:
        if not np.issubdtype(row.dtype, np.integer):
            raise InputError(f"prompt_ids has values of type {row.dtype}: expected integers")
        if row.min() < 0 or row.max() >= vocab_size:
            raise InputError(f"prompt_ids has values from {row.min()} to {row.max()}, outside the vocabulary of {vocab_size}")
    return [row.astype(np.int32) for row in rows]
