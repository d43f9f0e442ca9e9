"""Sample text from a run of train_jax.py or train_torch.py, or from any GPT-2.

Examples:
  sample.py --checkpoint runs/tiny --prompt "The value of"
  sample.py --checkpoint runs/shakespeare-char --prompt "ROMEO:" --temperature 0.8 --top-k 10 --num-samples 3
  sample.py --checkpoint runs/tiny --prompt FILE:start.txt --stream      # the prompt from a file; - is standard input
  sample.py --checkpoint runs/tiny --prompts many.txt --json             # a prompt on each line, all in one batch
  sample.py --checkpoint runs/tiny --interactive --top-p 0.9 --stop . "?"
  sample.py --init-from gpt2-xl --prompt "The value of"                  # Hugging Face's hub (the extra hf), or a folder of its format
  sample.py --init-from out/ckpt.pt --prompt "The value of"              # nanoGPT's (its meta.pkl beside it, if it has one)

Text goes to standard output; the seed, which repeats it, and the speed to standard error.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from flaxgpt.config import SamplingConfig
from flaxgpt.errors import InputError
from flaxgpt.run.cli import one_line_errors, read_file, typed_text
from flaxgpt.run.process import keep_memory_and_programs

if TYPE_CHECKING:
    from flaxgpt.data.tokenizer import Tokenizer
    from flaxgpt.generation.text import Text


@dataclass(frozen=True)
class SampleArgs:
    """What to continue, and how."""

    checkpoint: Path | None = None
    """A run folder."""
    init_from: str | None = None
    """In place of it: a Hugging Face folder, an id on its hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2 or any other),
    nanoGPT's ckpt.pt, a state_dict of the reference (.pth, .safetensors), or a run folder."""
    prompt: str | None = None
    """Text to continue, FILE:path for the text of a file, or - for standard input; None: the prompt of the run's own samples; with
    --init-from, what separates texts (GPT-2's end of a text)."""
    prompts: Path | None = None
    """A file with a prompt on each line."""
    interactive: bool = False
    """Continue each line that is typed, as it is typed; lines know nothing of each other."""
    max_new_tokens: int = 200
    """Tokens to add to each prompt."""
    num_samples: int = 1
    """Continuations of each prompt, drawn side by side."""
    stop: tuple[str, ...] = ()
    """The new text ends before the first of these strings."""
    eos_id: int | None = None
    """The new text ends at this token (50256 is GPT-2's end of a text)."""
    stream: bool = False
    """Write the text as it comes; one prompt, one sample."""
    json: bool = False
    """A line of JSON for each sample: prompt, text, ids, log-probabilities, what ended it, seed, timing."""
    top_log_probs: int = 0
    """Likeliest tokens at each place to put into the JSON, with their log-probabilities."""
    seed: int | None = None
    """The same seed and settings give the same text; None: a new one, which is shown."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingConfig] = field(default_factory=lambda: SamplingConfig(temperature=0.8))


@one_line_errors
def main() -> None:
    """Parse the flags, load the run, generate, print."""
    keep_memory_and_programs()
    args = tyro.cli(SampleArgs, description=__doc__)
    if (args.checkpoint is None) == (args.init_from is None):
        raise InputError("give a run folder with --checkpoint, or a model with --init-from, and not both")
    if args.seed is not None and not 0 <= args.seed < 2**32:
        raise InputError(f"seed={args.seed}: expected a value in [0, 2**32)")
    if (args.prompt is not None) + (args.prompts is not None) + args.interactive > 1:
        raise InputError("--prompt, --prompts and --interactive exclude each other")
    if args.top_log_probs and not args.json:
        raise InputError("--top-log-probs is for --json: plain text has no place for them")
    if args.json and (args.stream or args.interactive):
        raise InputError("--json prints whole samples: leave out --stream and --interactive")
    if args.num_samples > 1 and (args.stream or args.interactive):
        raise InputError(f"num_samples={args.num_samples}: one text can be streamed at a time")
    prompts = read_prompts(args)
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed

    import jax

    from flaxgpt.checkpoint import load_run, load_with_tokenizer
    from flaxgpt.generation.decode import unstack
    from flaxgpt.generation.text import complete_text, stream

    if args.init_from is not None:
        params, model, tokenizer = load_with_tokenizer(args.init_from)
        default_prompt = tokenizer.separator
    else:
        params, cfg, tokenizer = load_run(args.checkpoint)
        model, default_prompt = cfg.model, cfg.prompt or tokenizer.separator
    params = unstack(params, model)
    options = {"sampling": args.sampling, "stop": args.stop, "eos_id": args.eos_id}

    def continued(prompt: str, seed: int) -> Generator[str, None, Text]:
        return stream(params, model, tokenizer, prompt, args.max_new_tokens, key=jax.random.key(seed), **options)

    if args.interactive:
        for i, line in enumerate(typed_lines(tokenizer)):
            line_seed = (seed + i) % 2**32
            write_stream(line, continued(line, line_seed), line_seed)
        return
    prompts = prompts or [default_prompt]
    if args.stream:
        if len(prompts) > 1:
            raise InputError(f"{args.prompts} has {len(prompts)} prompts: one text can be streamed at a time")
        write_stream(prompts[0], continued(prompts[0], seed), seed)
    else:
        options |= {"num_samples": args.num_samples, "top_log_probs": args.top_log_probs if args.json else None}
        started = time.perf_counter()
        texts = complete_text(params, model, tokenizer, prompts, args.max_new_tokens, key=jax.random.key(seed), **options)
        write_all(texts, args, seed, time.perf_counter() - started)
    if (longest := max(len(tokenizer.encode(prompt)) for prompt in prompts)) > model.context_length:
        print(f"the prompt has {longest} tokens; the model saw the last {model.context_length}", file=sys.stderr)


def read_prompts(args: SampleArgs) -> list[str]:
    """The prompts that the flags name; none if they name none."""
    if args.prompts is not None:
        lines = [line for line in read_file(args.prompts, "prompts").splitlines() if line]
        if not lines:
            raise InputError(f"prompts={args.prompts}: the file has no lines with text")
        return lines
    if args.prompt is None:
        return []
    return [typed_text(args.prompt, "prompt")]


def typed_lines(tokenizer: Tokenizer) -> Iterator[str]:
    """Lines from the keyboard (or a pipe), until its end; those that are empty or can't be encoded are asked for again."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except UnicodeDecodeError:
            raise InputError("standard input is not UTF-8 text") from None
        try:
            if tokenizer.encode(line):
                yield line
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)


def write_stream(prompt: str, pieces: Generator[str, None, Text], seed: int) -> None:
    """Write one continuation as it comes. Ctrl-C ends it after what was written."""
    started = time.perf_counter()
    print(f"seed {seed}", file=sys.stderr, flush=True)
    print(prompt, end="", flush=True)
    try:
        while True:
            print(next(pieces), end="", flush=True)
    except StopIteration as done:
        n_tokens = len(done.value.ids)
    finally:
        print(flush=True)
    report_speed(n_tokens, time.perf_counter() - started)


def write_all(texts: list[Text], args: SampleArgs, seed: int, seconds: float) -> None:
    """Write all continuations, which took so many seconds."""
    n_tokens = sum(len(text.ids) for text in texts)
    for i, text in enumerate(texts):
        sample = i % args.num_samples + 1
        if args.json:
            timing = {"seconds": seconds, "tokens_per_second": n_tokens / seconds}
            print(json.dumps(dataclasses.asdict(text) | {"sample": sample, "seed": seed} | timing, ensure_ascii=False))
            continue
        if len(texts) > args.num_samples:
            print(f"--- prompt {i // args.num_samples + 1}, sample {sample} ---")
        elif args.num_samples > 1:
            print(f"--- sample {sample} ---")
        print(text.prompt + text.text)
    print(f"seed {seed}", file=sys.stderr)
    report_speed(n_tokens, seconds)


def report_speed(n_tokens: int, seconds: float) -> None:
    """Print how fast it was."""
    print(f"{n_tokens / seconds:,.0f} tokens/s, compilation included", file=sys.stderr)


if __name__ == "__main__":
    main()
