"""Saving weights, and reading torch's files without running what is in them."""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flaxgpt.config import GPTConfig
from flaxgpt.convert.files import write_tensors
from flaxgpt.convert.names import is_mask
from flaxgpt.convert.params import to_torch
from flaxgpt.data.tokenizer import Tokenizer
from flaxgpt.errors import InputError
from flaxgpt.run.cli import one_line_errors
from flaxgpt.run.source import open_source
from torch_ref.model import GPTModel


def save_model(model: GPTModel, path: Path) -> None:
    """The weights as safetensors, written atomically; the causal masks, which the config determines, are left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.endswith(".mask")}
    scratch = path.with_name(f".{path.name}.writing")
    save_file(tensors, scratch)
    os.replace(scratch, path)


class LoadedModel(NamedTuple):
    """The twin of `flaxgpt.checkpoint.LoadedModel`, whose parameters are in the module."""

    model: GPTModel
    cfg: GPTConfig
    tokenizer: Tokenizer | None


def load(path_or_id: Path | str, *, n_heads: int | None = None, meta: Path | None = None) -> LoadedModel:
    """A model in `eval()` mode, whatever it is: what `flaxgpt.load` takes, but run folders of train_jax.py.

    Arguments and errors are those of `flaxgpt.checkpoint.load`.
    """
    source = open_source(path_or_id, n_heads=n_heads, meta=meta)
    if source.params is None:
        raise InputError(f"{path_or_id} is a run of train_jax.py, whose checkpoints JAX reads: convert_checkpoint.py --to torch first")
    model = GPTModel(source.cfg).eval()
    model.load_state_dict(to_tensors(to_torch(source.params, source.cfg)))
    return LoadedModel(model, source.cfg, source.tokenizer)


def load_state_dicts(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    """A model's state_dict and, if the file has one, its optimizer's, as NumPy arrays (of what was saved in half precision, float32).

    Args:
        path: a safetensors file, or one that `torch.save` wrote: a state_dict, or a dict with "model_state_dict" and perhaps
            "optimizer_state_dict".

    Raises:
        InputError: the file is not there, damaged, or holds something else; a pickle with anything but tensors and plain
            containers is refused unread.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file: expected a state_dict in safetensors or torch.save format")
    if path.suffix != ".safetensors":
        state_dict, _, optimizer = read_pickle(path)
        return to_numpy(state_dict), to_numpy(optimizer)
    try:
        return to_numpy(load_file(path)), None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a state_dict that can be read safely ({_short(error)})") from None


def read_pickle(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], Any]:
    """What `torch.save` wrote: a model's state_dict, what else the file says about the model, and the optimizer's state_dict (None: none).

    Args:
        path: of a state_dict; of a dict with "model_state_dict", and perhaps "optimizer_state_dict" and (`write_pickle`'s) "config" and
            "tokenizer"; or of nanoGPT's checkpoint, with "model" and "model_args". It is read with `weights_only`, mapped into memory.

    Raises:
        InputError: the file is damaged, holds something else, or anything but tensors and plain containers.
    """
    misnamed = path.suffix == ".safetensors"  # torch.load would believe the name; of an open file, it sees none
    try:
        with path.open("rb") as file:
            mapped = zipfile.is_zipfile(path) and not misnamed
            loaded = torch.load(file if misnamed else path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError, AttributeError, TypeError) as error:
        raise InputError(f"{path} is not a state_dict that can be read safely ({_short(error)})") from None
    about, optimizer = {}, None
    if isinstance(loaded, dict) and "model_args" in loaded and "model" in loaded:
        about, loaded = {"model_args": loaded["model_args"]}, loaded["model"]
    elif isinstance(loaded, dict) and "model_state_dict" in loaded:
        about = {key: loaded[key] for key in ("config", "tokenizer") if key in loaded}
        optimizer, loaded = loaded.get("optimizer_state_dict"), loaded["model_state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in loaded.items()):
        raise InputError(f"{path} holds no state_dict: expected names and tensors")
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    others = {name: v for name, v in loaded.items() if not is_mask(name) and (v.dtype not in kinds or v.layout != torch.strided)}
    if others:
        named = ", ".join(f"{name} is {v.layout} of {v.dtype}".replace("torch.", "") for name, v in others.items())
        raise InputError(f"{path} has tensors that are not plain floating-point numbers: {named}")
    return loaded, about, optimizer


def write_pickle(path: Path, tensors: Mapping[str, np.ndarray], key: str, about: Mapping[str, Any]) -> None:
    """`torch.save` of {key: the state_dict, **about}; an array that has several names is saved once."""
    once = {id(array): torch.from_numpy(array) for array in tensors.values()}
    try:
        torch.save({key: {name: once[id(array)] for name, array in tensors.items()}, **about}, path)
    except RuntimeError as error:  # what torch makes of a disk that is full
        raise OSError(_short(error)) from None


def to_numpy(tree: Any) -> Any:
    """Tensors in nested dicts and lists as NumPy arrays; anything else as it is."""
    if isinstance(tree, torch.Tensor):
        tensor = tree.detach().cpu()
        return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()
    if isinstance(tree, dict):
        return {key: to_numpy(value) for key, value in tree.items()}
    return [to_numpy(value) for value in tree] if isinstance(tree, list) else tree


def to_tensors(tree: Any) -> Any:
    """The inverse of `to_numpy`; the tensors are copies."""
    if isinstance(tree, np.ndarray):
        return torch.tensor(tree)
    if isinstance(tree, dict):
        return {key: to_tensors(value) for key, value in tree.items()}
    return [to_tensors(value) for value in tree] if isinstance(tree, list) else tree


def _short(error: object) -> str:
    """The start of a message, or the name of what `weights_only` would have had to run."""
    if code := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it would run {code[1]}"
    return " ".join(str(error).split())[:120]


@one_line_errors
def main() -> None:
    """`python -m torch_ref.checkpoint SOURCE TARGET`: a model's tensors in a pickle as safetensors (see `flaxgpt.convert.files`)."""
    source, target = map(Path, sys.argv[1:])
    state_dict, about, _ = read_pickle(source)
    tensors = {name: tensor for name, tensor in state_dict.items() if not is_mask(name)}
    try:
        json.dumps(about)
    except (TypeError, ValueError):
        raise InputError(f"{source} describes its model by what is no plain value: {_short(about)}") from None
    try:
        write_tensors(target, to_numpy(tensors), about)
    except (OSError, SafetensorError) as error:
        raise InputError(f"can't copy {source} to {target.parent} ({_short(error)}): TMPDIR names another folder") from None


if __name__ == "__main__":
    main()
