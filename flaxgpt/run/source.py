"""A trained model to start from, whatever it is: all of it but the weights, which need no framework to be understood."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from flaxgpt.config import GPTConfig, TrainConfig
from flaxgpt.convert.files import read_json
from flaxgpt.convert.hub import find_folder
from flaxgpt.convert.huggingface import config_from_huggingface
from flaxgpt.data.tokenizer import GPT2Tokenizer, Tokenizer, load_tokenizer
from flaxgpt.data.tokenizer_files import read_tokenizer
from flaxgpt.errors import InputError
from flaxgpt.run.folder import CONFIG, TOKENIZER, load_config


class Source(NamedTuple):
    """Where a model is, and what it is.

    Attributes:
        folder: its files.
        cfg: the model.
        tokenizer: what its token ids mean.
        is_run: whether it is a run folder of ours; otherwise it is a Hugging Face folder.
    """

    folder: Path
    cfg: GPTConfig
    tokenizer: Tokenizer
    is_run: bool


def open_source(path_or_id: Path | str) -> Source:
    """Find a model: a run folder, a Hugging Face folder, or an id on the hub (see `flaxgpt.convert.hub.find_folder`).

    Raises:
        InputError: there is none, or it is of another kind than flaxgpt computes.
    """
    folder = find_folder(path_or_id)
    values = read_json(folder / CONFIG)
    if "model" in values:  # as a run's config.json has it
        return Source(folder, load_config(folder).model, load_tokenizer(folder / TOKENIZER), is_run=True)
    cfg = config_from_huggingface(values)
    return Source(folder, cfg, read_tokenizer(folder, cfg.vocab_size), is_run=False)


def start_from(source: Source, cfg: TrainConfig) -> TrainConfig:
    """A run's config with the architecture, the dropout and the tokenizer of a source, from which it then starts."""
    how = {name: getattr(cfg.model, name) for name in ("dtype", "attention", "loss_chunk", "vocab_multiple", "remat")}
    model = source.cfg.replace(**how)
    return cfg.replace(model=model, tokenizer=GPT2Tokenizer.kind)


def check_start(source: Source, cfg: TrainConfig) -> None:
    """Refuse a run that could not start from a source's weights.

    Raises:
        InputError: naming every field that contradicts the source; or the context is longer, or the tokenizer not GPT-2's.
    """
    if {source.tokenizer.kind, cfg.tokenizer} != {GPT2Tokenizer.kind}:
        kinds = f"the source's is {source.tokenizer.kind}, the run's {cfg.tokenizer}"
        raise InputError(f"--init-from needs the tokenizer gpt2, whose tokens mean the same on every text: {kinds}")
    fields = ("vocab_size", "emb_dim", "n_heads", "n_layers", "qkv_bias", "tie_embeddings")
    if other := [
        f"{f}={getattr(cfg.model, f)} (there {getattr(source.cfg, f)})" for f in fields if getattr(cfg.model, f) != getattr(source.cfg, f)
    ]:
        raise InputError(f"--init-from brings the architecture of {source.folder}: leave out {', '.join(other)}")
    if cfg.model.context_length > source.cfg.context_length:
        raise InputError(
            f"context_length={cfg.model.context_length}: {source.folder} has learned {source.cfg.context_length} positions, "
            "and what comes after them has no embedding; a shorter context is possible"
        )
