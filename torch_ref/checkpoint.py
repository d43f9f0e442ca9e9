"""Saving weights, and reading torch's files without running what is in them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flaxgpt.errors import InputError
from torch_ref.model import GPTModel


def save_model(model: GPTModel, path: Path) -> None:
    """The weights as safetensors, written atomically; the causal masks, which the config determines, are left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.endswith(".mask")}
    scratch = path.with_name(f".{path.name}.writing")
    save_file(tensors, scratch)
    os.replace(scratch, path)


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
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path} is not a state_dict that can be read safely ({reason})") from None
    optimizer = None
    if isinstance(loaded, dict) and "model_state_dict" in loaded:
        loaded, optimizer = loaded["model_state_dict"], loaded.get("optimizer_state_dict")
    if not isinstance(loaded, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in loaded.items()):
        raise InputError(f"{path} holds no state_dict: expected names and tensors")
    return to_numpy(loaded), to_numpy(optimizer)


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
