"""Token ids -> their continuation: what a caller may ask for, checked, and put into shapes that seldom compile anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flaxgpt.config import GREEDY, GPTConfig, SamplingConfig, Setting
from flaxgpt.edits import Edit, Edits, checked_edits
from flaxgpt.errors import InputError
from flaxgpt.generation.decode import State, decode, prefill, unstack
from flaxgpt.generation.sampling import Chain, Function, row_keys
from flaxgpt.types import Params

Prompts: TypeAlias = jax.Array | np.ndarray | Sequence[Sequence[int]]
"""(B, T) token ids, or a list of lists of any lengths."""


def generate(
    params: Params,
    cfg: GPTConfig,
    prompts: Prompts,
    max_new_tokens: int,
    sampling: SamplingConfig = GREEDY,
    *,
    key: jax.Array | None = None,
    eos_id: int | None = None,
    num_samples: int = 1,
    prompt_mask: ArrayLike | None = None,
    functions: Sequence[Function] = (),
    edits: Edits | None = None,
    **settings: Setting,
) -> np.ndarray:
    """Continue each prompt by `max_new_tokens` tokens, and return both.

    Arguments and errors are those of `complete`. As a convenience, fields of SamplingConfig can be given as keywords:
    `generate(params, cfg, prompts, 50, temperature=0.8, top_k=40, key=key)`.

    Returns:
        int32 (B * num_samples, T + max_new_tokens), the prompts included. Prompts of a list that are shorter than the
        longest come after zeros. Samples of one prompt are next to each other.
    """
    sampling = sampling.replace(**settings)
    options = {"key": key, "eos_id": eos_id, "num_samples": num_samples, "prompt_mask": prompt_mask}
    options |= {"functions": functions, "edits": edits}
    done = complete(params, cfg, prompts, max_new_tokens, sampling, **options)
    if isinstance(prompts, np.ndarray | jax.Array):
        columns_BT = np.repeat(np.asarray(prompts, np.int32), num_samples, axis=0)
    else:
        T = max(map(len, done.prompts))
        columns_BT = np.stack([np.pad(prompt, (T - len(prompt), 0)) for prompt in done.prompts])
    return np.concatenate([columns_BT, done.ids_BT], axis=1)


def complete(
    params: Params,
    cfg: GPTConfig,
    prompts: Prompts,
    max_new_tokens: int,
    sampling: SamplingConfig = GREEDY,
    *,
    key: jax.Array | None = None,
    eos_id: int | None = None,
    num_samples: int = 1,
    prompt_mask: ArrayLike | None = None,
    top_log_probs: int | None = None,
    functions: Sequence[Function] = (),
    edits: Edits | None = None,
) -> Completion:
    """Continue each prompt by `max_new_tokens` tokens, and return these with their number and log-probabilities.

    Past the context length the model sees the last `context_length` tokens, positions numbered from 0 again, as the
    reference does. Each token then costs one pass over that window.

    Args:
        params: the model's parameters, stacked, or as `unstack` returns them (which saves doing that at each call).
        cfg: the model's config.
        prompts: (B, T) token ids, or a list of lists of any lengths. At least one each; more than fit is allowed.
        max_new_tokens: tokens to add to each row.
        sampling: how a token is chosen; greedily by default.
        key: a typed PRNG key, needed unless the temperature is 0: row b draws with fold_in(key, b), whatever the other rows
            are. Or an array of keys, one for each row.
        eos_id: a row that has produced this token goes on with nothing else; the loop ends when all rows have.
        num_samples: continuations of each prompt, which is read once for all of them.
        prompt_mask: (B, T) booleans, false for the padding at the left of each row of `prompts`.
        top_log_probs: return the log-probabilities of the new tokens, and of this many of the likeliest.
        functions: further processors, logits_BV -> logits_BV; a new function compiles anew.
        edits: what becomes of activations while the prompt and each new token are read (see `flaxgpt.edits`). Another value or
            other positions compile nothing anew, another function does; a function is handed the tokens that are being
            read, those of the prompt with padding before them.

    Raises:
        InputError: an empty prompt, ids outside the vocabulary, or settings that make no sense.
    """
    options = {"key": key, "eos_id": eos_id, "num_samples": num_samples, "prompt_mask": prompt_mask}
    options |= {"functions": functions, "edits": edits}
    request = Request.of(params, cfg, prompts, max_new_tokens, sampling, top_log_probs=top_log_probs, **options)
    return request.completion(request.decode(request.prefill(), max_new_tokens) if max_new_tokens else None)


@dataclass(frozen=True)
class Completion:
    """What was added to each row, on the host. Arrays are as wide as the tokens asked for."""

    prompts: list[np.ndarray]
    ids_BT: np.ndarray
    """int32; after the end token, the end token again."""
    ended_B: np.ndarray
    """Whether the row has produced the end token, or was ended by the caller."""
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


@dataclass(frozen=True)
class Request:
    """One call's arguments, checked and padded to shapes that many calls share."""

    params: Params
    cfg: GPTConfig
    prompts: list[np.ndarray]
    """One for each row of the result."""
    max_new_tokens: int
    chain: Chain
    penalises: bool
    keys_B: jax.Array | None
    eos_id: np.int32
    """-1 for none."""
    num_samples: int
    top_log_probs: int | None
    edits: dict[str, Edit]

    @classmethod
    def of(
        cls,
        params: Params,
        cfg: GPTConfig,
        prompts: Prompts,
        max_new_tokens: int,
        sampling: SamplingConfig = GREEDY,
        *,
        key: jax.Array | None = None,
        eos_id: int | None = None,
        num_samples: int = 1,
        prompt_mask: ArrayLike | None = None,
        top_log_probs: int | None = None,
        functions: Sequence[Function] = (),
        edits: Edits | None = None,
    ) -> Request:
        """Check the arguments, which are those of `complete`."""
        sampling.check_vocabulary(cfg.vocab_size)
        ids = _as_prompts(prompts, prompt_mask, cfg.vocab_size)
        if eos_id is not None and not 0 <= eos_id < cfg.vocab_size:
            raise InputError(f"eos_id={eos_id} is outside the vocabulary of {cfg.vocab_size}")
        if max_new_tokens < 0:
            raise InputError(f"max_new_tokens={max_new_tokens}: expected at least 0")
        if num_samples < 1:
            raise InputError(f"num_samples={num_samples}: expected at least 1")
        if top_log_probs is not None and not 0 <= top_log_probs <= cfg.vocab_size:
            raise InputError(f"top_log_probs={top_log_probs}: expected 0 to the vocabulary's {cfg.vocab_size}")
        rows = len(ids) * num_samples
        if rows * (max_new_tokens + cfg.context_length) * (1 + (top_log_probs or 0)) >= 2**31:
            raise InputError(f"max_new_tokens={max_new_tokens} in {rows} rows are more than can be held; ask for fewer")
        keys_B = row_keys(sampling, key, rows)
        return cls(
            params=params if isinstance(params["trf_blocks"], tuple) else unstack(params, cfg),
            cfg=cfg,
            prompts=[prompt for prompt in ids for _ in range(num_samples)],
            max_new_tokens=max_new_tokens,
            chain=Chain.of(sampling, functions),
            penalises=sampling.penalises,
            keys_B=keys_B,
            eos_id=np.int32(-1 if eos_id is None else eos_id),
            num_samples=num_samples,
            top_log_probs=top_log_probs,
            edits=jax.tree.map(jnp.asarray, checked_edits(edits or {}, cfg, length=None)),
        )

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
            self.edits,
            room=-(-self.max_new_tokens // 64) * 64,  # a multiple of 64, so that another number of them seldom compiles anew
            num_samples=self.num_samples,
            top_log_probs=self.top_log_probs,
        )

    def decode(self, state: State, until: int) -> State:
        """The state with `until` new tokens, or fewer if all rows have ended. The one handed in is donated."""
        return decode(self.params, self.cfg, state, np.int32(until), self.chain, self.keys_B, self.eos_id, self.edits)

    def completion(self, state: State | None) -> Completion:
        """The new tokens so far, on the host; none for no state."""
        if state is None:
            B, K = len(self.prompts), self.top_log_probs
            scores = (None,) * 3 if K is None else (np.zeros((B, 0)), np.zeros((B, 0, K)), np.zeros((B, 0, K)))
            return Completion(self.prompts, np.zeros((B, 0), np.int32), np.zeros(B, bool), np.zeros(B, np.int32), *scores)
        new_BT, ended_B, lengths_B, scores = jax.device_get((state.new_BT, state.ended_B, state.lengths_B, state.scores))
        new_BT, *scores = (None if x is None else x[:, : self.max_new_tokens] for x in (new_BT, *(scores or (None,) * 3)))
        return Completion(self.prompts, new_BT, ended_B, lengths_B, *scores)


def _as_prompts(prompts: Prompts, prompt_mask: ArrayLike | None, vocab_size: int) -> list[np.ndarray]:
    """Each row's own tokens.

    Raises:
        InputError: a shape, an id or a mask that makes no sense.
    """
    try:
        rows = [np.asarray(row) for row in prompts]
    except TypeError:
        rows = []
    if not rows or any(row.ndim != 1 or not row.size for row in rows):
        shapes = [row.shape for row in rows][:5]
        raise InputError(f"prompts has {len(rows)} rows, the first of shapes {shapes}: expected (batch, tokens), at least one token each")
    if prompt_mask is not None:
        mask_BT = np.asarray(prompt_mask, bool)
        if any(row.shape != mask_BT.shape[1:] for row in rows) or mask_BT.shape[0] != len(rows):
            raise InputError(f"prompt_mask has the shape {mask_BT.shape}, which is not that of prompts")
        if not mask_BT[:, -1].all() or (np.diff(mask_BT.astype(int), axis=1) < 0).any():
            raise InputError("prompt_mask must be false at the left of a row and true from its first token to the end")
        rows = [row[mask] for row, mask in zip(rows, mask_BT, strict=True)]
    for row in rows:
        if not np.issubdtype(row.dtype, np.integer):
            raise InputError(f"prompts has values of type {row.dtype}: expected integers")
        if row.min() < 0 or row.max() >= vocab_size:
            raise InputError(f"prompts has values from {row.min()} to {row.max()}, outside the vocabulary of {vocab_size}")
    return [row.astype(np.int32) for row in rows]
