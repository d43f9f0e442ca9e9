"""Text generation by a module, one token at a time: recomputing everything, or with a cache that lives in the modules."""

from __future__ import annotations

import torch

from flaxgpt.config import SamplingConfig, Setting
from torch_ref.generation.sampling import Noise, choose, process_logits
from torch_ref.model import GPTModel


def generate_text_simple(model: GPTModel, idx: torch.Tensor, max_new_tokens: int, context_size: int) -> torch.Tensor:
    """Greedy continuation of (B, T) token ids by `max_new_tokens`, seeing the last `context_size` tokens each time."""
    return generate(model, idx, max_new_tokens, context_size)


def generate_text_simple_cached(model: GPTModel, idx: torch.Tensor, max_new_tokens: int, context_size: int) -> torch.Tensor:
    """The same text, from a model that keeps keys and values: each step but the first gives it one token."""
    return generate(model, idx, max_new_tokens, context_size, use_cache=True)


@torch.no_grad()
def generate(
    model: GPTModel,
    idx: torch.Tensor,
    max_new_tokens: int,
    context_size: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | None = None,
    noise: Noise | None = None,
    use_cache: bool = False,
    **settings: Setting,
) -> torch.Tensor:
    """Continue each row of token ids.

    Args:
        model: in `eval()` mode, unless dropout is wanted.
        idx: (B, T) int64.
        max_new_tokens: tokens to add to each row.
        context_size: tokens that the model sees at most; positions count from the first of them.
        temperature: as in SamplingConfig; 0 is greedy.
        top_k: as there.
        eos_id: a row that has produced this token is filled with it; generation stops when all rows have.
        noise: t -> (B, V) Gumbel noise that decides new token number t, in place of torch's generator.
        use_cache: let the modules keep keys and values until the context is full; they forget them before this returns.
        **settings: the other fields of SamplingConfig.

    Returns:
        (B, T + max_new_tokens), or fewer columns if every row ended before.
    """
    sampling = SamplingConfig(temperature=temperature, top_k=top_k, **settings)
    T = idx.shape[1]
    ended_B = torch.zeros(idx.shape[0], dtype=torch.bool, device=idx.device)
    model.reset_kv_cache()
    for t in range(max_new_tokens):
        within = idx.shape[1] <= context_size
        fresh_BT = idx[:, -1:] if use_cache and within and t > 0 else idx[:, -context_size:]
        logits_BV = model(fresh_BT, use_cache=use_cache and within)[:, -1]
        ids_B = choose(process_logits(logits_BV, idx[:, :T], idx[:, T:], sampling), sampling, noise, t)
        if eos_id is not None:
            ids_B = ids_B.masked_fill(ended_B, eos_id)
            ended_B |= ids_B == eos_id
        idx = torch.cat([idx, ids_B[:, None]], dim=1)
        if ended_B.all():
            break
    model.reset_kv_cache()
    return idx
