"""A trained model to start from, whatever it is. Its weights are opened, not read, and no framework is needed for that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from flaxgpt.config import GPTConfig, TrainConfig
from flaxgpt.convert.files import ABOUT, Tensors, read_json
from flaxgpt.convert.hub import find_model
from flaxgpt.convert.huggingface import config_from_huggingface
from flaxgpt.convert.layout import open_params
from flaxgpt.convert.names import HUGGINGFACE, NANOGPT, REFERENCE
from flaxgpt.convert.nanogpt import config_from_nanogpt
from flaxgpt.convert.params import infer_config
from flaxgpt.data.tokenizer import GPT2Tokenizer, Tokenizer, load_tokenizer, tokenizer_from_dict
from flaxgpt.data.tokenizer_files import guess_tokenizer, read_meta, read_tokenizer
from flaxgpt.errors import InputError
from flaxgpt.run.folder import CHECKPOINTS, CONFIG, TOKENIZER, TORCH_WEIGHTS, load_config
from flaxgpt.types import Params

NANOGPT_FILE, META = "ckpt.pt", "meta.pkl"
"""What nanoGPT calls its checkpoint and its vocabulary of characters."""


class Source(NamedTuple):
    """Where a model is, and what it is.

    Attributes:
        path: its folder or file.
        cfg: the model.
        tokenizer: what its token ids mean, if that is known; its vocabulary may be smaller than the model's, which is then padded.
        params: its parameters, each read where it is indexed (see `flaxgpt.convert.layout.Parameter`); None if it is a run folder of
            train_jax.py, whose checkpoints `flaxgpt.checkpoint` reads.
        run: what it was trained with, of a run folder.
        rounded: tensors that are float64 in the file, and are read as float32.
    """

    path: Path
    cfg: GPTConfig
    tokenizer: Tokenizer | None
    params: Params | None
    run: TrainConfig | None = None
    rounded: tuple[str, ...] = ()


def open_source(path_or_id: Path | str, *, n_heads: int | None = None, meta: Path | None = None) -> Source:
    """Find a model and open it. What kind it is, is seen from what is in it.

    Args:
        path_or_id: a run folder; a Hugging Face folder; a file with a state_dict of the reference (of `torch.save`, or safetensors), or
            with nanoGPT's checkpoint, or nanoGPT's folder with a ckpt.pt; or an id on the hub (see `flaxgpt.convert.hub.find_model`).
        n_heads: attention heads of a bare state_dict, whose shapes don't imply them.
        meta: nanoGPT's vocabulary of characters; None: the meta.pkl beside its checkpoint, if there is one.

    Raises:
        InputError: there is none, or it is of another kind than flaxgpt computes.
    """
    path = find_model(path_or_id)
    if path.is_dir() and not (path / CONFIG).exists() and (path / NANOGPT_FILE).is_file():
        path = path / NANOGPT_FILE
    if path.is_dir() and n_heads is not None:
        raise InputError(f"n_heads={n_heads}: {path} has its own config; leave it out")
    source = _open_folder(path) if path.is_dir() else _open_file(path, n_heads, meta)
    if meta:
        source = source._replace(tokenizer=read_meta(meta))
    if source.tokenizer and source.tokenizer.vocab_size > source.cfg.vocab_size:
        raise InputError(f"the tokenizer has {source.tokenizer.vocab_size} tokens, the model {path} only {source.cfg.vocab_size}")
    return source


def open_run(folder: Path) -> Source:
    """Open a run folder, of either trainer.

    Raises:
        InputError: it is none, or its weights are not those of its config.
    """
    cfg, weights = load_config(folder), folder / CHECKPOINTS / TORCH_WEIGHTS
    params = open_params(Tensors(weights), cfg.model, REFERENCE) if weights.is_file() else None
    return Source(folder, cfg.model, load_tokenizer(folder / TOKENIZER), params, run=cfg)


def _open_folder(folder: Path) -> Source:
    values = read_json(folder / CONFIG)
    if "model" in values:  # as a run's config.json has it
        return open_run(folder)
    cfg = config_from_huggingface(values)
    tensors, tokenizer = Tensors.of_folder(folder), read_tokenizer(folder, cfg.vocab_size)
    return Source(folder, cfg, tokenizer, open_params(tensors, cfg, HUGGINGFACE), rounded=tensors.rounded)


def _open_file(path: Path, n_heads: int | None, meta: Path | None) -> Source:
    tensors = Tensors.of_pickle(path) if _is_pickle(path) else Tensors(path)
    about = _about(tensors, path)
    if about and n_heads is not None:
        raise InputError(f"n_heads={n_heads}: {path} has its own config; leave it out")
    if "model_args" in about:
        cfg = config_from_nanogpt(about["model_args"])
        beside = path.with_name(META)
        tokenizer = read_meta(beside) if meta is None and beside.is_file() else guess_tokenizer(cfg.vocab_size)
        return Source(path, cfg, tokenizer, open_params(tensors, cfg, NANOGPT), rounded=tensors.rounded)
    if not any("tok_emb." in name for name in tensors):
        hint = " (those of Hugging Face come in a folder with a config.json)" if any("wte." in name for name in tensors) else ""
        names = ", ".join([*tensors][:3])
        raise InputError(f"{path} is neither a state_dict of the reference nor a checkpoint of nanoGPT: it has {names} ...{hint}")
    if about:
        cfg = GPTConfig.from_dict(about["config"])
        tokenizer = tokenizer_from_dict(about["tokenizer"]) if about.get("tokenizer") else None
    elif n_heads is None:
        raise InputError(
            f"{path} does not say how many attention heads its model has, and shapes don't imply it: "
            "convert_checkpoint.py --to safetensors --n-heads N makes a file that does"
        )
    else:
        cfg = infer_config({name: tensors[key] for name, key in REFERENCE.full_names(tensors).items()}, n_heads)
        tokenizer = guess_tokenizer(cfg.vocab_size)
    return Source(path, cfg, tokenizer, open_params(tensors, cfg, REFERENCE), rounded=tensors.rounded)


def _is_pickle(path: Path) -> bool:
    """Whether `torch.save` wrote it: a zip, or a pickle by itself. Safetensors begin with a length, of any bytes, and a brace."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return False
    return start[:4] == b"PK\3\4" or start[:1] == b"\x80"


def _about(tensors: Tensors, path: Path) -> dict[str, Any]:
    """What a file says about its model: "config" (a GPTConfig's fields) and "tokenizer", or nanoGPT's "model_args"; or nothing."""
    try:
        about = json.loads(tensors.metadata.get(ABOUT, "{}"))
        valid = isinstance(about, dict) and all(value is None or isinstance(value, dict) for value in about.values())
    except ValueError:
        valid = False
    if not valid or (about and not {"config", "model_args"} & set(about)):
        raise InputError(f"{path} describes its model by damaged metadata")
    return about


def start_from(source: Source, cfg: TrainConfig) -> TrainConfig:
    """A run's config with the architecture, the dropout and the tokenizer of a source, from which it then starts.

    Of a padded vocabulary, the tokens of the tokenizer are left: no text has any others.
    """
    vocab_size = source.tokenizer.vocab_size if source.tokenizer else source.cfg.vocab_size
    how = {name: getattr(cfg.model, name) for name in ("dtype", "attention", "loss_chunk", "vocab_multiple", "remat")}
    model = source.cfg.replace(vocab_size=vocab_size, **how)
    return cfg.replace(model=model, tokenizer=GPT2Tokenizer.kind)


def check_start(source: Source, cfg: TrainConfig) -> None:
    """Refuse a run that could not start from a source's weights.

    Raises:
        InputError: naming every field that contradicts the source; or the context is longer, or the tokenizer not GPT-2's.
    """
    kind = source.tokenizer.kind if source.tokenizer else "not known"
    if {kind, cfg.tokenizer} != {GPT2Tokenizer.kind}:
        kinds = f"the source's is {kind}, the run's {cfg.tokenizer}"
        raise InputError(f"--init-from needs the tokenizer gpt2, whose tokens mean the same on every text: {kinds}")
    fields = ("vocab_size", "emb_dim", "n_heads", "n_layers", "qkv_bias", "bias", "activation", "tie_embeddings")
    ours, theirs = cfg.model, start_from(source, cfg).model
    if other := [f"{f}={getattr(ours, f)} (there {getattr(theirs, f)})" for f in fields if getattr(ours, f) != getattr(theirs, f)]:
        raise InputError(f"--init-from brings the architecture of {source.path}: leave out {', '.join(other)}")
    if cfg.model.context_length > source.cfg.context_length:
        raise InputError(
            f"context_length={cfg.model.context_length}: {source.path} has learned {source.cfg.context_length} positions, "
            "and what comes after them has no embedding; a shorter context is possible"
        )
