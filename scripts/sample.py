"""Sample text from a run of train_jax.py or train_torch.py.

Examples:
  sample.py --checkpoint runs/tiny --prompt "The value of"
  sample.py --checkpoint runs/shakespeare-char --prompt "ROMEO:" --temperature 0.8 --top-k 10 --num-samples 3
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from flaxgpt.cli import one_line_errors, parse
from flaxgpt.errors import InputError


@dataclass(frozen=True)
class SampleArgs:
    """What to continue, and how."""

    checkpoint: Path
    """A run folder."""
    prompt: str | None = None
    """Text to continue; None: the prompt of the run's own samples."""
    max_new_tokens: int = 200
    """Tokens to add to the prompt."""
    temperature: float = 0.8
    """Divides the logits before drawing; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Draw among the k likeliest tokens; None: among all."""
    num_samples: int = 1
    """Continuations of the prompt, drawn side by side."""
    seed: int = 123
    """The same seed and settings give the same text."""


@one_line_errors
def main() -> None:
    """Parse the flags, load the run, generate, print."""
    args = parse(SampleArgs, description=__doc__)
    if args.num_samples < 1:
        raise InputError(f"num_samples={args.num_samples}: expected at least 1")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"seed={args.seed}: expected a value in [0, 2**32)")

    import jax
    import numpy as np

    from flaxgpt.checkpoint import load_run
    from flaxgpt.generate import generate

    params, cfg, tokenizer = load_run(args.checkpoint)
    ids = tokenizer.encode(cfg.prompt or "" if args.prompt is None else args.prompt)
    if not ids:
        raise InputError("the prompt is empty: give at least one character with --prompt")
    started = time.perf_counter()
    ids_BT = np.asarray(
        generate(
            params,
            cfg.model,
            np.tile(np.asarray(ids, np.int32), (args.num_samples, 1)),
            args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            key=jax.random.key(args.seed),
        )
    )
    seconds = time.perf_counter() - started
    if len(ids) > cfg.model.context_length:
        print(f"the prompt has {len(ids)} tokens; the model sees the last {cfg.model.context_length}", file=sys.stderr)
    for i, row in enumerate(ids_BT):
        if args.num_samples > 1:
            print(f"--- sample {i + 1} ---")
        print(tokenizer.decode(row.tolist()))
    print(f"{args.num_samples * args.max_new_tokens / seconds:,.0f} tokens/s, compilation included", file=sys.stderr)


if __name__ == "__main__":
    main()
