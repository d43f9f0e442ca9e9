"""A model -> a file or folder of any format, made whole or not at all. Imports no framework."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from flaxgpt.config import TrainConfig
from flaxgpt.convert.files import CONFIG, check_target, write_shards, write_tensors, writing
from flaxgpt.convert.huggingface import config_to_huggingface
from flaxgpt.convert.layout import Written
from flaxgpt.convert.names import HEAD, HUGGINGFACE, NANOGPT, PARAMETERS, REFERENCE
from flaxgpt.convert.nanogpt import config_to_nanogpt
from flaxgpt.convert.params import to_torch
from flaxgpt.data.tokenizer import CharTokenizer
from flaxgpt.data.tokenizer_files import meta_bytes, tokenizer_files
from flaxgpt.errors import InputError
from flaxgpt.run.folder import CHECKPOINTS, TOKENIZER, TORCH_WEIGHTS
from flaxgpt.run.source import META, Source

Format: TypeAlias = Literal["run", "huggingface", "nanogpt", "torch", "safetensors"]

PickleWriter: TypeAlias = Callable[[Path, Mapping[str, np.ndarray], str, Mapping[str, Any]], None]
"""(path, state_dict, its key, what is beside it): `torch_ref.checkpoint.write_pickle`."""

GENERATION = "generation_config.json"


def export(
    source: Source, target: Path, to: Format, *, shard_bytes: int = 5 * 10**9, write_pickle: PickleWriter | None = None
) -> list[str]:
    """Write a model.

    Args:
        source: the model, with its parameters.
        target: the file (nanogpt, torch, safetensors) or folder (run, huggingface) to make; it must not exist.
        to: the format.
        shard_bytes: of a Hugging Face folder, the most in one file.
        write_pickle: for nanogpt and torch, whose files only torch writes.

    Returns:
        What there is to know about the result, a line each.

    Raises:
        InputError: the target exists or can't be written, or the format has no such model.
    """
    check_target(target)
    with writing(target) as scratch:
        if to == "huggingface":
            return _huggingface(source, scratch, shard_bytes)
        if to == "run":
            return _run(source, scratch)
        if to == "safetensors":
            write_tensors(scratch, Written(source.params, source.cfg, REFERENCE), _about(source))
            return []
        assert write_pickle is not None
        if to == "torch":
            write_pickle(scratch, to_torch(source.params, source.cfg), "model_state_dict", _about(source))
            return []
        return _nanogpt(source, scratch, target.with_name(META), write_pickle)


def _huggingface(source: Source, folder: Path, shard_bytes: int) -> list[str]:
    cfg, tokenizer, notes = source.cfg, source.tokenizer, []
    config = config_to_huggingface(cfg)
    generation: dict[str, Any] = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    if tokenizer and (padding := [*range(tokenizer.vocab_size, cfg.vocab_size)]):
        generation["suppress_tokens"] = padding
        notes.append(f"its vocabulary is padded from {tokenizer.vocab_size} to {cfg.vocab_size}: {GENERATION} suppresses the padding")
    texts = {name: json.dumps(values, indent=2) + "\n" for name, values in ((CONFIG, config), (GENERATION, generation))}
    texts |= tokenizer_files(tokenizer) if tokenizer else {}
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    tensors = Written(source.params, cfg, HUGGINGFACE)
    write_shards(folder, tensors, {name: 4 * int(np.prod(shape)) for name, shape in tensors.shapes.items()}, shard_bytes)
    return notes + _zeros(source, "GPT-2") + ([] if tokenizer else ["its tokenizer is not known, so there is none"])


def _run(source: Source, folder: Path) -> list[str]:
    tokenizer = source.tokenizer
    if tokenizer is None:
        raise InputError(f"a run folder says what its tokens mean, and that is not known of {source.path}: --meta names nanoGPT's meta.pkl")
    cfg = source.run or TrainConfig(model=source.cfg, tokenizer=tokenizer.kind)
    (folder / CHECKPOINTS).mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(cfg.to_dict(), indent=2) + "\n", encoding="utf-8")
    (folder / TOKENIZER).write_text(json.dumps(tokenizer.to_dict()) + "\n", encoding="utf-8")
    write_tensors(folder / CHECKPOINTS / TORCH_WEIGHTS, Written(source.params, source.cfg, REFERENCE))
    return ["it has weights but no state of an optimizer: sample.py and --init-from take it, --resume does not"]


def _nanogpt(source: Source, path: Path, meta: Path, write_pickle: PickleWriter) -> list[str]:
    model_args = config_to_nanogpt(source.cfg)
    tensors = dict(Written(source.params, source.cfg, NANOGPT))
    (embedding,), (head,) = NANOGPT.names(PARAMETERS[0], source.cfg), NANOGPT.names(HEAD, source.cfg)
    write_pickle(path, tensors | {head: tensors[embedding]}, "model", {"model_args": model_args})
    if not isinstance(source.tokenizer, CharTokenizer):
        return _zeros(source, "nanoGPT's model")
    with writing(meta) as scratch:
        scratch.write_bytes(meta_bytes(source.tokenizer))
    return [*_zeros(source, "nanoGPT's model"), f"its characters are in {meta}: nanoGPT looks for it in the data folder of its config"]


def _about(source: Source) -> dict[str, Any]:
    return {"config": source.cfg.to_dict(), "tokenizer": source.tokenizer and source.tokenizer.to_dict()}


def _zeros(source: Source, theirs: str) -> list[str]:
    if source.cfg.qkv_bias or (theirs != "GPT-2" and not source.cfg.bias):
        return []
    where = "on query, key and value" if source.cfg.bias else "anywhere"
    return [f"it has no biases {where}, and {theirs} has them: they were written as zeros"]
