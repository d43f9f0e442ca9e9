"""Measure how well a model predicts a text: loss, perplexity and bits per byte, with their standard errors.

Examples:
  evaluate.py --checkpoint runs/tiny                                     # the validation split of what it was trained on
  evaluate.py --init-from gpt2 --text wiki.test.raw --stride 512         # or several files, folders of .txt files, or - (standard input)
  evaluate.py --init-from gpt2 --data tinyshakespeare --split val        # as train_jax.py's --data
  evaluate.py --init-from gpt2 --tokens val.bin --json                   # uint16, nanoGPT's layout

The numbers, or JSON, go to standard output; progress and the speed to standard error.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from flaxgpt.config import TrainConfig
from flaxgpt.errors import InputError
from flaxgpt.run.cli import one_line_errors
from flaxgpt.run.process import keep_memory_and_programs

if TYPE_CHECKING:
    import numpy as np

    from flaxgpt.data.tokenizer import Tokenizer
    from flaxgpt.evaluation.estimate import Estimate, Evaluation
    from flaxgpt.types import Batch


@dataclass(frozen=True)
class EvaluateArgs:
    """Which model, on what."""

    checkpoint: Path | None = None
    """A run folder."""
    init_from: str | None = None
    """In place of it: a Hugging Face folder, an id on its hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2 or any other),
    nanoGPT's ckpt.pt, a state_dict of the reference (.pth, .safetensors), or a run folder."""
    text: tuple[str, ...] = ()
    """Text files, folders of .txt files, or - for standard input: one text, with the end-of-text token between the parts."""
    data: str | None = None
    """In place of it: a corpus as train_jax.py takes it, of which one split is used. None, with a run folder: what it was trained on."""
    split: Literal["val", "train"] = "val"
    """Which part of the corpus."""
    train_ratio: float | None = None
    """The first part of the corpus, in characters, that is the training split; None: the run's, or 0.9."""
    tokens: Path | None = None
    """In place of it: a file of uint16 tokens (nanoGPT's layout)."""
    context: int | None = None
    """The most tokens to predict one from; None: the model's context length."""
    stride: int | None = None
    """Tokens between the starts of neighbouring windows, 1 to the context; None: half the context. A token has at least context - stride
    tokens before it, except at the beginning."""
    batch_size: int = 8
    """Windows that are computed at once."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of activations and matrix products; None: the model's own."""
    json: bool = False
    """Print one JSON object."""


@one_line_errors
def main() -> None:
    """Parse the flags, load model and text, evaluate, print."""
    keep_memory_and_programs()
    args = tyro.cli(EvaluateArgs, description=__doc__)
    if (args.checkpoint is None) == (args.init_from is None):
        raise InputError("give a run folder with --checkpoint, or a model with --init-from, and not both")
    if (n_texts := bool(args.text) + (args.data is not None) + (args.tokens is not None)) > 1:
        raise InputError("--text, --data and --tokens exclude each other")
    if not n_texts and args.checkpoint is None:
        raise InputError("give a text with --text, --data or --tokens")
    if args.train_ratio is not None and not 0 < args.train_ratio < 1:
        raise InputError(f"train_ratio={args.train_ratio}: expected a value between 0 and 1")

    from flaxgpt.checkpoint import load_run, load_with_tokenizer
    from flaxgpt.evaluation.evaluate import evaluate

    if args.init_from is not None:
        (params, cfg, tokenizer), run = load_with_tokenizer(args.init_from), None
    else:
        params, run, tokenizer = load_run(args.checkpoint)
        cfg = run.model
    if args.dtype:
        cfg = cfg.replace(dtype=args.dtype)
    what, tokens = read_tokens(args, tokenizer, run)
    started = time.perf_counter()
    options = {"context": args.context, "stride": args.stride, "batch_size": args.batch_size}
    evaluation = evaluate(params, cfg, tokenizer, tokens, track=progress, **options)
    model = str(args.checkpoint or args.init_from)
    if args.json:
        print(json.dumps({"model": model, "text": what, "dtype": cfg.dtype} | dataclasses.asdict(evaluation), ensure_ascii=False))
    else:
        show(model, what, cfg.dtype, evaluation)
    print(f"{evaluation.tokens / (time.perf_counter() - started):,.0f} tokens/s, compilation included", file=sys.stderr)


def read_tokens(args: EvaluateArgs, tokenizer: Tokenizer, run: TrainConfig | None) -> tuple[str, np.ndarray]:
    """What the flags name, in words, and its tokens."""
    from flaxgpt.data.held_out import tokens_of_file, tokens_of_split, tokens_of_texts

    if args.text:
        return ", ".join(args.text), tokens_of_texts(args.text, tokenizer)
    if args.tokens is not None:
        return str(args.tokens), tokens_of_file(args.tokens, tokenizer)
    run = run or TrainConfig()
    data, train_ratio = args.data or run.data, args.train_ratio or run.train_ratio
    return f"{data} ({args.split})", tokens_of_split(data, args.split, tokenizer, train_ratio)


def progress(batches: Sequence[Batch]) -> Iterable[Batch]:
    """The batches, with a bar on standard error, if that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(batches, "evaluating", console=console, disable=not console.is_terminal)


def show(model: str, what: str, dtype: str, evaluation: Evaluation) -> None:
    """The numbers, each with its standard error."""
    print(f"{model} ({dtype}) on {what}")
    print(f"{evaluation.tokens:,} tokens, {evaluation.bytes:,} bytes; context {evaluation.context}, stride {evaluation.stride}")
    for name, unit in (("loss", "nats per token"), ("perplexity", ""), ("bits_per_byte", "")):
        print(f"{name.replace('_', ' ') + ':':<15}{in_words(getattr(evaluation, name))} {unit}".rstrip())


def in_words(estimate: Estimate) -> str:
    """A value and its standard error."""
    if estimate.value is None:
        return "not defined"
    error = "(too short for a standard error)" if estimate.standard_error is None else f"{estimate.standard_error:.4f}"
    return f"{estimate.value:.4f} ± {error}"


if __name__ == "__main__":
    main()
