"""Look at logits: what a model expects after each token of a text, what it would draw, and what changes it.

Examples:
  inspect_logits.py --checkpoint runs/tiny --text "The value of the"
  inspect_logits.py --init-from gpt2 --text "The sky is" --position -1 --top 10 --token " red" --token " blue"
  inspect_logits.py --init-from gpt2 --text "I like oat milk in my" --promote " coffee"
  inspect_logits.py --init-from gpt2 --text FILE:text.txt --lens 3 --json
  inspect_logits.py --checkpoint runs/tiny --text "The value of" --html page.html --plots pictures
  inspect_logits.py --checkpoint runs/tiny --text "The " --steps 20 --temperature 0.8 --top-k 10 --seed 1
  inspect_logits.py --preset gpt2-124m --seed 0 --text "Random weights expect nothing."
  inspect_logits.py --logits closer=4.51 every=0.89 effort=-1.90 forward=6.75 --top-k 2     # words and logits, without a model

Tables, or JSON, go to standard output; the seed, which repeats what was drawn, to standard error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from flaxgpt.config import GREEDY, SamplingConfig, TrainConfig
from flaxgpt.errors import InputError
from flaxgpt.run.cli import one_line_errors, typed_text
from flaxgpt.run.process import keep_memory_and_programs

if TYPE_CHECKING:
    from flaxgpt.checkpoint import LoadedModel


@dataclass(frozen=True)
class InspectArgs:
    """What to look at, and what to try."""

    checkpoint: Path | None = None
    """A run folder."""
    init_from: str | None = None
    """In place of it: a Hugging Face folder, an id on its hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2 or any other),
    nanoGPT's ckpt.pt, a state_dict of the reference (.pth, .safetensors), or a run folder."""
    preset: str | None = None
    """In place of it: a preset with random weights, those that training with this seed begins with."""
    logits: tuple[str, ...] = ()
    """In place of a model: words with their logits, as closer=4.51 every=0.89."""
    text: str | None = None
    """The text to look at, FILE:path for that of a file, or - for standard input."""
    position: int | None = None
    """Show predictions after this token only (from 0; negative counts from the end). --token, --draws, --promote and the table of --lens
    are about this position as well; None: predictions at all positions, the others at the last."""
    top: int = 5
    """Likeliest tokens to show at each position and step."""
    token: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Show this token's logit, rank and probability; may be repeated."""
    draws: int = 5
    """Tokens to draw without replacement, and as many with it; 0: none."""
    steps: int = 0
    """Continue the text by this many tokens, and show what was expected at each. The likeliest are chosen unless --temperature is set."""
    promote: str | None = None
    """Raise this token's logit to 10 above the largest, and take that away again."""
    lens: int = 0
    """The logit lens: this many of the likeliest tokens that each layer predicts; 0: none."""
    attention: bool = False
    """Attention weights in the JSON."""
    attention_maps: bool = True
    """Attention weights in the pictures and on the page, of which they are the most."""
    plots: Path | None = None
    """Draw pictures into this folder, each as a PNG and an SVG: the distribution at the position; surprise, lens and attention."""
    html: Path | None = None
    """Write a page to explore the text in a browser, without a network."""
    temperatures: tuple[float, ...] = (1.0, 0.1, 5.0)
    """Temperatures at which to show the probabilities of --logits."""
    count: int = 1000
    """Draws from --logits."""
    json: bool = False
    """Print one JSON document in place of tables."""
    seed: int | None = None
    """Of the draws and of a preset's weights; None: a new one, which is shown."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingConfig] = field(default_factory=lambda: GREEDY)


OF_TEXT = ("text", "position", "top", "token", "draws", "steps", "promote", "lens", "attention", "attention_maps", "html")
OF_WORDS = ("temperatures", "count")
"""Flags that mean nothing without a model, or with one."""
RANGES = {"top": (1, math.inf), "draws": (0, 1000), "steps": (0, math.inf), "lens": (0, math.inf), "count": (0, 1_000_000)}


@one_line_errors
def main() -> None:
    """Parse the flags, look, print."""
    keep_memory_and_programs()
    args = tyro.cli(InspectArgs, description=__doc__)
    check(args)
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    if args.logits:
        inspect_words(args, seed)
    else:
        inspect_text(args, seed)
    print(f"seed {seed}", file=sys.stderr)


def check(args: InspectArgs) -> None:
    """Refuse flags that exclude each other, and values out of range, before anything is loaded."""
    if sum(map(bool, (args.checkpoint, args.init_from, args.preset, args.logits))) != 1:
        raise InputError("give one of --checkpoint, --init-from, --preset and --logits")
    foreign = OF_TEXT if args.logits else OF_WORDS
    if given := [f"--{name.replace('_', '-')}" for name in foreign if getattr(args, name) != getattr(InspectArgs, name)]:
        raise InputError(f"{', '.join(given)}: only with {'a model, which --logits is in place of' if args.logits else '--logits'}")
    if not args.logits and args.text is None:
        raise InputError("give a text to look at with --text")
    if args.seed is not None and not 0 <= args.seed < 2**32:
        raise InputError(f"seed={args.seed}: expected a value in [0, 2**32)")
    for name, (least, most) in RANGES.items():
        if not least <= getattr(args, name) <= most:
            expected = f"at least {least}" if most == math.inf else f"{least} to {most:,}"
            raise InputError(f"{name}={getattr(args, name)}: expected {expected}")
    if args.attention and not args.json:
        raise InputError("--attention is for --json: the tables have no place for it")
    try:
        "".join([*args.logits, *args.token, args.promote or ""]).encode()  # the shell passes on any bytes
    except UnicodeEncodeError:
        raise InputError("--logits, --token and --promote: one of them is not UTF-8 text") from None
    if args.html:
        with can_write(args.html):
            if not args.html.absolute().parent.is_dir() or (args.html.exists() and not args.html.is_file()):
                raise InputError(f"can't write {args.html}: it is not a file, or is in a folder that is not there")
    if not all(1e-6 <= temperature <= 1e30 for temperature in args.temperatures):
        raise InputError(f"temperatures={args.temperatures}: expected positive numbers, at least 1e-6 and at most 1e30")


def inspect_text(args: InspectArgs, seed: int) -> None:
    """Look at a text with a model."""
    text = typed_text(args.text, "text")

    import jax

    from flaxgpt.generation.text import without_padding
    from flaxgpt.interpret.experiments import draw_tokens, go_on, promote
    from flaxgpt.interpret.labels import token_id
    from flaxgpt.interpret.page import save_page
    from flaxgpt.interpret.plots import save_plots
    from flaxgpt.interpret.record import inspect_tokens
    from flaxgpt.interpret.report import Report, candidates, layer_predictions, places
    from flaxgpt.interpret.tables import show
    from flaxgpt.state import seed_keys

    params, cfg, tokenizer = open_model(args, seed)
    ids = tokenizer.encode(text)
    T = len(ids)
    position = T - 1 if args.position is None else args.position
    if not -T <= position < T:
        raise InputError(f"position={position}: the text has {T} tokens, numbered 0 to {T - 1}, or -{T} to -1")
    position %= T
    tokens = [token_id(tokenizer, token) for token in args.token]
    promoted = None if args.promote is None else token_id(tokenizer, args.promote)
    pictures = bool(args.plots or args.html)
    attention = args.attention or (pictures and args.attention_maps)
    inspection = inspect_tokens(params, cfg, tokenizer, ids, lens=args.lens or 5 * pictures, attention=attention)
    labels_V = inspection.labels_V
    draw_key, step_key = jax.random.split(seed_keys(seed)[1])
    sampling = without_padding(tokenizer, cfg, args.sampling)
    report = Report(
        model=str(args.checkpoint or args.init_from or f"{args.preset} with random weights"),
        seed=seed,
        text=text,
        shape=inspection.logits_TV.shape,
        places=places(inspection, args.top),
        position=position,
        tokens=candidates(inspection.logits_TV[position], labels_V, tokens),
        draws=draw_tokens(inspection, position, sampling, draw_key, args.draws) if args.draws else None,
        steps=go_on(params, cfg, tokenizer, text, labels_V, args.steps, args.top, sampling, step_key) if args.steps else None,
        promotion=None if promoted is None else promote(params, cfg, inspection, position, promoted, args.top),
        lens=[layer_predictions(inspection, t) for t in range(T)] if args.lens else None,
        attention=inspection.weights_LNTS.tolist() if args.attention else None,
    )
    shown = inspection if args.attention_maps else dataclasses.replace(inspection, weights_LNTS=None)
    if args.html:
        with can_write(args.html):
            save_page(shown, args.html, title=report.model, top=max(args.top, 10))
    if args.plots:
        with can_write(args.plots):
            save_plots(shown, args.plots, position=position, target_id=next(iter(tokens), promoted), **filters(args.sampling))
    if args.json:
        print(json.dumps(dataclasses.asdict(report), ensure_ascii=False))
    else:
        show(report, every_position=args.position is None)


def inspect_words(args: InspectArgs, seed: int) -> None:
    """Look at words and logits that were given by hand."""
    logits = read_words(args.logits)

    import numpy as np

    from flaxgpt.interpret.experiments import choose_among
    from flaxgpt.interpret.plots import distribution_plots, save_figures
    from flaxgpt.interpret.tables import show_words
    from flaxgpt.state import seed_keys

    words = choose_among(logits, args.sampling, args.temperatures, args.count, seed_keys(seed)[1])
    if args.plots:
        logits_V = np.fromiter(logits.values(), np.float32)
        with can_write(args.plots):
            save_figures(distribution_plots(logits_V, [*logits], temperatures=args.temperatures, **filters(args.sampling)), args.plots)
    if args.json:
        print(json.dumps(dataclasses.asdict(words) | {"seed": seed}, ensure_ascii=False))
    else:
        show_words(words)


def filters(sampling: SamplingConfig) -> dict[str, float]:
    """The top-k and top-p to draw: those of the flags, if they set any; else what the picture has by default."""
    given = {"top_k": sampling.top_k, "top_p": sampling.top_p}
    return given if any(given.values()) else {}


@contextlib.contextmanager
def can_write(path: Path) -> Iterator[None]:
    """One line for a place that can't be written to."""
    try:
        yield
    except OSError as error:
        raise InputError(f"can't write {path} ({error.strerror})") from None


def read_words(given: tuple[str, ...]) -> dict[str, float]:
    """Word -> logit."""
    logits = {}
    for item in given:
        word, _, value = item.rpartition("=")
        try:
            logit = float(value)
        except ValueError:
            logit = math.nan
        if not word or not abs(logit) < 1e30:
            raise InputError(f"logits: {item!r} is not a word and a finite logit, as closer=4.51")
        if word in logits:
            raise InputError(f"logits: {word!r} is there twice")
        logits[word] = logit
    return logits


def open_model(args: InspectArgs, seed: int) -> LoadedModel:
    """The model that the flags name, whose tokens have a known meaning."""
    from flaxgpt.checkpoint import LoadedModel, load_run, load_with_tokenizer
    from flaxgpt.data.corpora import load_corpus
    from flaxgpt.data.tokenizer import get_tokenizer
    from flaxgpt.model import init_params
    from flaxgpt.state import seed_keys

    if args.checkpoint:
        run = load_run(args.checkpoint)
        return LoadedModel(run.params, run.cfg.model, run.tokenizer)
    if args.init_from:
        return load_with_tokenizer(args.init_from)
    run = TrainConfig.preset(args.preset)
    char = run.tokenizer == "char"  # then it is that of the text which the preset is trained on
    tokenizer = load_corpus(run.data, "char", run.train_ratio).tokenizer if char else get_tokenizer(run.tokenizer)
    cfg = run.model.replace(vocab_size=tokenizer.vocab_size)
    return LoadedModel(init_params(cfg, seed_keys(seed)[0]), cfg, tokenizer)


if __name__ == "__main__":
    main()
