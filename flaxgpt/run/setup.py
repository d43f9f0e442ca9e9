"""Everything that can be checked before a run folder is made or touched."""

from __future__ import annotations

import os
import re
from pathlib import Path

from flaxgpt.config import TrainConfig
from flaxgpt.data.corpora import Corpus, load_corpus
from flaxgpt.data.tokenizer import load_tokenizer
from flaxgpt.data.windows import split_windows
from flaxgpt.errors import InputError
from flaxgpt.run.folder import CHECKPOINTS, DATA, TOKENIZER, TORCH_WEIGHTS, flat, load_config, read_text
from flaxgpt.run.watchers import check_installed

CHANGEABLE = (
    "max_steps",
    "log_every",
    "eval_every",
    "eval_batches",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_checkpoints",
    "skip_nonfinite",
    "prompt",
    "sample_tokens",
    "tensorboard",
    "wandb",
    "peak_tflops",
    "grad_accum_steps",
    "fsdp",
    "tensor",
    "gather",
    "model.remat",
    "model.attention",
    "model.loss_chunk",
)
"""What `--resume` may change: how long to train, how to look and how to compute, not what is trained on what."""


def prepare(cfg: TrainConfig, out_dir: Path, *, resume: bool = False, overwrite: bool = False) -> tuple[TrainConfig, Corpus]:
    """Load the data, fit the config to it, and check all that can be checked before the run folder is made or touched.

    Args:
        cfg: the run as it was asked for.
        out_dir: the run folder.
        resume: go on with the run in it.
        overwrite: delete the run in it, once this one begins.

    Returns:
        The run as it is to be made, and its data. The vocabulary is the tokenizer's, and what was left to be derived (the end
        of the schedule, the prompt) is written out, so that a resumed run has the same.

    Raises:
        InputError: see `check_installed`, `check_out_dir`, `load_corpus` and `split_windows`; or the run to resume had another
            config or other data.
    """
    check_installed(cfg)
    check_out_dir(out_dir, resume=resume, overwrite=overwrite)
    corpus = load_corpus(cfg.data, cfg.tokenizer, cfg.train_ratio)
    split_windows(corpus.train, cfg, "training")
    split_windows(corpus.val, cfg, "validation")
    model = cfg.model.replace(vocab_size=corpus.tokenizer.vocab_size)
    cfg = cfg.replace(model=model, decay_steps=cfg.total_decay_steps, prompt=cfg.prompt or _opening_words(corpus))
    corpus.tokenizer.encode(cfg.prompt)
    cfg.check_vocabulary()
    if resume:
        saved, new = (flat(config) for config in (load_config(out_dir), cfg))
        if changed := [name for name in saved if saved[name] != new[name] and name not in CHANGEABLE]:
            raise InputError(f"--resume can't change {', '.join(changed)}; start another run with another --out-dir")
        same_data = any(read_text(out_dir / DATA) == corpus.fingerprint(scattered=scattered) for scattered in (False, True))
        if load_tokenizer(out_dir / TOKENIZER).to_dict() != corpus.tokenizer.to_dict() or not same_data:
            raise InputError(f"--resume: the text of {cfg.data} is not the one that {out_dir} was trained on")
    return cfg, corpus


def check_out_dir(out_dir: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder that this run must not touch; changes nothing.

    Raises:
        InputError: the folder has contents and neither flag is given, `resume` finds no run, `overwrite` would delete
            something that is not a run, or the folder can't be made.
    """
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    parent = next(p for p in (out_dir, *out_dir.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise InputError(f"{parent} is a file: choose another --out-dir")
    if not os.access(parent, os.W_OK):
        raise InputError(f"{parent} is not writable: choose another --out-dir")
    if resume:
        load_config(out_dir)
        if (out_dir / CHECKPOINTS / TORCH_WEIGHTS).is_file():
            raise InputError(f"{out_dir} has weights, but no state of an optimizer: start another run with --init-from {out_dir}")
    elif out_dir.is_dir() and any(out_dir.iterdir()):
        if not overwrite:
            raise InputError(f"{out_dir} exists: pass --resume to go on with it, --overwrite to delete it, or another --out-dir")
        load_config(out_dir)  # what is not a run folder is not for us to delete


def _opening_words(corpus: Corpus) -> str:
    """Two whole words from the start of the validation text, or its first characters where it has no words."""
    text = corpus.tokenizer.decode(corpus.val[:200].tolist())
    words = re.search(r"\s(\S+\s+\S+)\s", text)
    return words[1] if words else text[:8]
