"""Models on disk: tensors as safetensors, in one file or several, each read or written by itself. Imports no framework."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  NumPy knows bfloat16 once this is imported
import numpy as np
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flaxgpt.convert.names import is_mask
from flaxgpt.errors import InputError
from flaxgpt.types import Index

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ABOUT = "flaxgpt"
"""Key of a file's metadata under which it says what it is, as JSON."""
_KINDS = ("F16", "BF16", "F32", "F64")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Tensors(Mapping[str, "Tensor"]):
    """The tensors of safetensors files by name. What is in half precision is read as it is (bfloat16 as ml_dtypes' dtype)."""

    def __init__(self, *paths: Path) -> None:
        """Read the files' headers.

        Raises:
            InputError: one of them is missing or damaged, or a tensor is not of floating-point numbers.
        """
        self._tensors: dict[str, Tensor] = {}
        self.metadata: dict[str, str] = {}
        self.rounded: tuple[str, ...] = ()  # names of float64 tensors, which parameters are not
        for path in paths:
            try:
                with safe_open(path, "np") as file:
                    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  it is no dict
                    kinds = {name: part.get_dtype() for name, part in slices.items()}
                    self.file = File(path)
                    self._tensors |= {name: Tensor(self.file, name, tuple(part.get_shape())) for name, part in slices.items()}
                    self.metadata |= file.metadata() or {}
                    self.rounded += tuple(name for name, kind in kinds.items() if kind == "F64" and not is_mask(name))
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path} is damaged or can't be read ({error})") from None
            others = [f"{name} is {kind}" for name, kind in kinds.items() if kind not in _KINDS and not is_mask(name)]
            if others:
                raise InputError(f"{path} has tensors that are not of floating-point numbers: {', '.join(others)}")

    @classmethod
    def of_folder(cls, folder: Path) -> Tensors:
        """Those of model.safetensors, or of the files that the index names.

        Raises:
            InputError: as the constructor, or there are only pickles.
        """
        return cls(*_weight_files(folder))

    @classmethod
    def of_pickle(cls, path: Path) -> Tensors:
        """Those of a model's state_dict that `torch.save` wrote, and in the metadata what else the file says about the model.

        A pickle can run code when it is read. `torch.load` with `weights_only` refuses to, and flaxgpt does not import torch; so a process
        of its own (`python -m torch_ref.checkpoint`) reads it, and writes safetensors into a temporary file that goes with the result.

        Raises:
            InputError: torch is not installed, or the file is none that it reads safely.
        """
        if any(importlib.util.find_spec(name) is None for name in ("torch", "torch_ref")):
            raise InputError(f'{path} is a pickle, which only torch reads safely: pip install -e ".[parity]" (or "flaxgpt[parity]")')
        scratch = Path(tempfile.mkdtemp(prefix="flaxgpt-"))
        command = [sys.executable, "-m", "torch_ref.checkpoint", str(path.absolute()), str(scratch / WEIGHTS)]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        try:
            done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                if done.returncode != 2:  # a bug of ours
                    raise RuntimeError(done.stderr)
                raise InputError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))  # torch's warnings are before it
            tensors = cls(scratch / WEIGHTS)
        except BaseException:
            shutil.rmtree(scratch)
            raise
        weakref.finalize(tensors.file, shutil.rmtree, scratch)
        return tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class File:
    """A safetensors file. It is opened for each read, so that what was read before is no longer mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path


class Tensor:
    """One tensor of a file: read where it is indexed."""

    def __init__(self, file: File, name: str, shape: tuple[int, ...]) -> None:
        self._file, self._name, self.shape = file, name, shape

    def __getitem__(self, index: Index) -> np.ndarray:
        """A new array; the index is a slice for each axis, as far as it goes."""
        index = index if isinstance(index, tuple) else (index,)
        index = tuple(slice(*part.indices(size)) for part, size in zip(index, self.shape, strict=False))
        if any(part.start >= part.stop for part in index):  # what safetensors does not slice
            return np.empty([len(range(*part.indices(size))) for part, size in zip(index, self.shape, strict=False)], np.float32)
        with safe_open(self._file.path, "np") as file:
            return file.get_slice(self._name)[index]

    def __array__(self, dtype: DTypeLike = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[()], dtype)


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
    """Refuse a file or folder that `writing` could not make; changes nothing.

    Raises:
        InputError: it exists, or the folder that it is to be in does not.
    """
    if os.path.lexists(target):
        raise InputError(f"{target} exists: choose another target")
    if not os.access(target.absolute().parent, os.W_OK):
        raise InputError(f"can't write {target}: there is no folder {target.absolute().parent}, or it is not writable")


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """Make a file or a folder whole or not at all: what is made at the path that it gives becomes the target at the end.

    Raises:
        InputError: as `check_target`, or it can't be written.
    """
    check_target(target)
    scratch = target.with_name(f".{target.name}.writing")
    _remove(scratch)
    try:
        yield scratch
        scratch.rename(target)
    except (OSError, SafetensorError) as error:
        raise InputError(f"can't write {target} ({error})") from None
    finally:
        _remove(scratch)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, Any] | None = None) -> None:
    """Write one safetensors file, with what it is about in its metadata."""
    metadata = {"format": "pt"} | ({} if about is None else {ABOUT: json.dumps(about)})
    path.touch()
    mode = path.stat().st_mode  # as others are made here; safetensors makes files that only their owner may read
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path, metadata=metadata)
    path.chmod(mode)


def write_shards(folder: Path, tensors: Mapping[str, np.ndarray], sizes: Mapping[str, int], limit: int) -> None:
    """Write model.safetensors, or files of at most `limit` bytes (unless one tensor is larger) and their index, as `transformers` does.

    Args:
        folder: where.
        tensors: by name; those of one file are asked for at a time.
        sizes: of each tensor, in bytes.
        limit: in bytes.
    """
    shards: list[dict[str, int]] = [{}]
    for name, size in sizes.items():
        if shards[-1] and sum(shards[-1].values()) + size > limit:
            shards.append({})
        shards[-1][name] = size
    if len(shards) == 1:
        write_tensors(folder / WEIGHTS, tensors)
        return
    files = {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, 1)}
    for file, names in files.items():
        write_tensors(folder / file, {name: tensors[name] for name in names})
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise InputError(f"can't read {folder / INDEX} (it has no weight_map)")
        if outside := sorted({shard for shard in shards.values() if Path(shard).name != shard}):
            raise InputError(f"can't read {folder / INDEX} (it names {', '.join(outside)}, outside its folder)")
        paths = [folder / shard for shard in sorted(set(shards.values()))]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise InputError(f"{folder} lacks {', '.join(missing)}, which its {INDEX} names")
        return paths
    pickles = [path.name for pattern in _PICKLES for path in sorted(folder.glob(pattern))]
    found = f": {', '.join(pickles)} can run code when read; save the model as safetensors (save_pretrained does)" if pickles else ""
    raise InputError(f"{folder} has no {WEIGHTS} (nor {INDEX}){found}")
