"""A Hugging Face folder on disk: config.json, and tensors as safetensors, in one file or several. Imports no framework."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  NumPy knows bfloat16 once this is imported
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flaxgpt.config import GPTConfig
from flaxgpt.convert.huggingface import config_to_huggingface
from flaxgpt.errors import InputError

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a folder by name, each read when it is asked for.

    What is in half precision is read as it is (bfloat16 as ml_dtypes' dtype).
    """

    def __init__(self, folder: Path) -> None:
        """Open the folder's files.

        Raises:
            InputError: one of them is missing or damaged, a tensor is not of floating-point numbers, or there are only pickles.
        """
        self._files = {}
        for path in _weight_files(folder):
            try:
                file = safe_open(path, "np")
                kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  it is no dict
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path} is damaged or can't be read ({error})") from None
            if others := [f"{name} is {kind}" for name, kind in kinds.items() if kind not in ("F16", "BF16", "F32", "F64")]:
                raise InputError(f"{path} has tensors that are not of floating-point numbers: {', '.join(others)}")
            self._files |= dict.fromkeys(kinds, file)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: the file is missing, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or not JSON
        raise InputError(f"can't read {path} ({getattr(error, 'strerror', None) or error})") from None
    if not isinstance(values, dict):
        raise InputError(f"can't read {path} (it holds no object)")
    return values


def check_target(target: Path) -> None:
    """Refuse a folder that `write_folder` could not make; changes nothing.

    Raises:
        InputError: it exists, or the one that it is to be in does not.
    """
    if target.exists() or target.is_symlink():
        raise InputError(f"{target} exists: choose another target")
    if not os.access(target.absolute().parent, os.W_OK):
        raise InputError(f"can't write {target}: there is no folder {target.absolute().parent}, or it is not writable")


def write_folder(target: Path, state_dict: Mapping[str, np.ndarray], cfg: GPTConfig, texts: Mapping[str, str]) -> None:
    """Write a model as a folder that `transformers` loads, whole or not at all.

    Args:
        target: where; it must not exist.
        state_dict: as `to_huggingface` makes it.
        cfg: the model's config.
        texts: further files, name -> content.

    Raises:
        InputError: as `check_target`, or it can't be written.
    """
    check_target(target)
    config = config_to_huggingface(cfg)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    texts = {name: json.dumps(values, indent=2) + "\n" for name, values in ((CONFIG, config), (GENERATION, generation))} | dict(texts)
    scratch = target.with_name(f".{target.name}.writing")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
        for name, text in texts.items():
            (scratch / name).write_text(text, encoding="utf-8", newline="\n")
        save_file(dict(state_dict), scratch / WEIGHTS, metadata={"format": "pt"})
        scratch.rename(target)
    except (OSError, SafetensorError) as error:
        raise InputError(f"can't write {target} ({error})") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise InputError(f"can't read {folder / INDEX} (it has no weight_map)")
        paths = [folder / shard for shard in sorted(set(shards.values()))]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise InputError(f"{folder} lacks {', '.join(missing)}, which its {INDEX} names")
        return paths
    pickles = [path.name for pattern in _PICKLES for path in sorted(folder.glob(pattern))]
    found = f": {', '.join(pickles)} can run code when read; save the model as safetensors (save_pretrained does)" if pickles else ""
    raise InputError(f"{folder} has no {WEIGHTS} (nor {INDEX}){found}")
