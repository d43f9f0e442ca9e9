"""Time flaxgpt against other implementations, in one process, as ratios.

Examples:
  benchmark.py generate                              # GPT-2 124M, batches 1 and 8, against Hugging Face's generate with its cache
  benchmark.py generate --batch 1 --dtype bfloat16 --new-tokens 64
  benchmark.py generate --preset tiny --rounds 1     # a quick look at whether it works
  benchmark.py patch --prompt-tokens 16 --rounds 3   # activation patching at every layer and position, against hooks one at a time

Each round times every implementation, in the other order than the round before; medians and their ratio are printed.
Compilation and the first call of each are not timed. Weights are random. `pip install -e ".[parity,test]"` brings the others.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import tyro

from flaxgpt.config import GPTConfig
from flaxgpt.errors import InputError
from flaxgpt.run.cli import one_line_errors
from flaxgpt.run.process import keep_memory_and_programs

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class BenchmarkArgs:
    """What to time, and how often."""

    what: tyro.conf.Positional[Literal["generate", "patch"]]
    """generate: greedy decoding of new tokens, the reading of the prompt included. patch: another run's residual stream put into that
    of a prompt, at every layer and position."""
    preset: str = "gpt2-124m"
    """The model: a preset of train_jax.py."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations, on both sides; patch is in float32."""
    batch: tuple[int, ...] = (1, 8)
    """Rows decoded at once; of generate."""
    prompt_tokens: int = 32
    """Tokens in each row's prompt."""
    new_tokens: int = 128
    """Tokens added to each row; of generate."""
    rounds: int = 5
    """How often each is timed."""


@one_line_errors
def main() -> None:
    """Parse the flags, time, print a line for each batch size."""
    keep_memory_and_programs()
    args = tyro.cli(BenchmarkArgs, description=__doc__)
    for name in ("prompt_tokens", "new_tokens", "rounds"):
        if getattr(args, name) < 1:
            raise InputError(f"{name}={getattr(args, name)}: expected at least 1")
    if not args.batch or min(args.batch) < 1:
        raise InputError(f"batch={args.batch}: expected numbers of rows")
    cfg = GPTConfig.preset(args.preset).replace(dtype=args.dtype)
    if args.prompt_tokens + args.new_tokens * (args.what == "generate") > cfg.context_length:
        raise InputError(f"prompt_tokens and new_tokens together exceed context_length={cfg.context_length}")
    {"generate": generate, "patch": patch}[args.what](args, cfg)


def generate(args: BenchmarkArgs, cfg: GPTConfig) -> None:
    """Tokens per second of decoding."""
    import numpy as np

    sides = {"flaxgpt": flaxgpt_generate(cfg), "Hugging Face": hugging_face_generate(cfg)}
    for batch in args.batch:
        prompt_BT = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, args.prompt_tokens))
        calls = {name: functools.partial(side, prompt_BT, args.new_tokens) for name, side in sides.items()}
        tokens = batch * args.new_tokens
        report(f"batch {batch}, {args.dtype}", "tokens/s", {name: tokens / s for name, s in medians(calls, args.rounds).items()})


def patch(args: BenchmarkArgs, cfg: GPTConfig) -> None:
    """Places (a layer and a position) a second of activation patching."""
    try:
        import torch

        from torch_ref.interpret import patching as hooks
        from torch_ref.model import GPTModel
    except ImportError as error:
        raise InputError(f'{error.name} is not installed: pip install -e ".[parity]" brings it') from None

    import jax
    import numpy as np

    from flaxgpt.convert.params import from_torch
    from flaxgpt.interpret.activations import activations
    from flaxgpt.interpret.patching import patch_each

    cfg = cfg.replace(dtype="float32")
    model = GPTModel(cfg).eval()
    params = jax.device_put(from_torch({name: value.numpy() for name, value in model.state_dict().items()}, cfg))
    tokens_T, other_T = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, args.prompt_tokens))
    _, taken = jax.jit(lambda params: activations(params, cfg, other_T[None], ["trf_blocks.{}.shortcut2"]))(params)
    other_LTD = taken["trf_blocks.{}.shortcut2"][:, 0]
    given = torch.from_numpy(tokens_T), torch.from_numpy(np.array(other_LTD))

    def metric(logits_V: jax.Array | torch.Tensor) -> jax.Array | torch.Tensor:
        return logits_V[0] - logits_V[1]

    calls = {
        "flaxgpt": lambda: patch_each(params, cfg, tokens_T, other_LTD, metric).block_until_ready(),
        "hooks one at a time": lambda: hooks.patch_each(model, *given, metric),
    }
    places = cfg.n_layers * args.prompt_tokens
    rates = {name: places / seconds for name, seconds in medians(calls, args.rounds).items()}
    report(f"{places} places, {args.prompt_tokens} tokens, float32", "places/s", rates)


def flaxgpt_generate(cfg: GPTConfig) -> Callable[[np.ndarray, int], np.ndarray]:
    """(prompt_BT, new tokens) -> ids."""
    import jax

    from flaxgpt.generation.decode import unstack
    from flaxgpt.generation.generate import generate
    from flaxgpt.model import init_params

    params = unstack(jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0)), cfg)
    return lambda prompt_BT, new_tokens: generate(params, cfg, prompt_BT, new_tokens)


def hugging_face_generate(cfg: GPTConfig) -> Callable[[np.ndarray, int], torch.Tensor]:
    """(prompt_BT, new tokens) -> ids, by GPT2LMHeadModel of the same shape."""
    try:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise InputError(f'{error.name} is not installed: pip install -e ".[parity,test]" brings it') from None

    shape = {"n_positions": cfg.context_length, "n_embd": cfg.emb_dim, "n_layer": cfg.n_layers, "n_head": cfg.n_heads}
    config = GPT2Config(
        vocab_size=cfg.vocab_size, **shape, tie_word_embeddings=cfg.tie_embeddings, bos_token_id=None, eos_token_id=None, pad_token_id=0
    )
    model = GPT2LMHeadModel(config).eval().to(getattr(torch, cfg.dtype))

    def generate(prompt_BT: np.ndarray, new_tokens: int) -> torch.Tensor:
        ids = torch.from_numpy(prompt_BT)
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, use_cache=True)

    return generate


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for i in range(rounds):
        for name in list(calls) if i % 2 == 0 else reversed(calls):
            started = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(label: str, unit: str, rates: dict[str, float]) -> None:
    """One line: what each reached, and how many times the others the first one is."""
    first = next(iter(rates))
    parts = [f"{first} {rates[first]:.1f} {unit}"]
    parts += [f"{name} {rate:.1f} (ratio {rates[first] / rate:.2f})" for name, rate in rates.items() if name != first]
    print(f"{label}: {', '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
