"""Files of tokens, uint16 and little-endian: one or several for each split, with or without llm.c's header."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flaxgpt.errors import InputError

INDEX = "index.json"
"""In a folder that prepare_data.py made: {"shards": {file: {"bytes": its size, "largest": the largest id in it}}}."""

_MAGIC, _HEADER_BYTES = 20240520, 1024
"""Of llm.c's header, 256 int32: the magic number, the version (1: uint16 tokens), the number of tokens, zeros."""
_CHECKED_AT_A_TIME = 2**22


class Checked:
    """The tokens of a file, of which slices are read; each is checked then, so that nothing needs to be read before."""

    def __init__(self, tokens: np.ndarray, vocab_size: int, path: Path) -> None:
        self._tokens, self._vocab_size, self._path = tokens, vocab_size, path

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, part: slice) -> np.ndarray:
        """Raises InputError for an id outside the vocabulary; it says where."""
        found = self._tokens[part]
        if len(found) and found.max() >= self._vocab_size:
            at = range(len(self))[part][int(np.argmax(found >= self._vocab_size))]
            where = f"at token {at} (byte {getattr(self._tokens, 'offset', 0) + 2 * at})"
            raise InputError(f"{self._path} has the token id {self._tokens[at]} {where}, outside the vocabulary of {self._vocab_size}")
        return found


class Shards:
    """Several files of tokens as one, of which slices are read. Nothing is copied before."""

    def __init__(self, shards: Sequence[np.ndarray | Checked]) -> None:
        self._shards = shards
        self._starts = np.cumsum([0, *map(len, shards)]).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(len(self))
        if step < 1:
            raise ValueError(f"step {step}: expected at least 1")
        pieces = [np.zeros(0, np.uint16)]
        for shard, begin in zip(self._shards, self._starts, strict=False):
            first = max(start, begin)
            first += (start - first) % step
            if first < min(stop, begin + len(shard)):
                pieces.append(shard[first - begin : stop - begin : step])
        return np.concatenate(pieces)


Tokens = np.ndarray | Checked | Shards
"""(number of tokens,) uint16, memory-mapped: a length, and slices."""


def open_split(folder: Path, split: str, vocab_size: int) -> Tokens:
    """The tokens of one split: train.bin, or the shards train-*.bin or *_train_*.bin in the order of their names.

    Ids are checked where they are read, unless the folder's INDEX says that they were; so this reads none.

    Raises:
        InputError: there is no such file, or one that is damaged or has an id outside the vocabulary by the INDEX.
    """
    paths = split_files(folder, split)
    if not paths:
        raise InputError(
            f"{folder / split}.bin is missing: a folder of tokens holds train.bin and val.bin, or shards (train-00000.bin ...)"
        )
    index, shards = _read_index(folder), []
    for path in paths:
        tokens, known = open_tokens(path), index.get(path.name, {})
        if known.get("bytes") != path.stat().st_size:
            tokens = Checked(tokens, vocab_size, path)
        elif known["largest"] >= vocab_size:
            check_ids(tokens, vocab_size, path)
        shards.append(tokens)
    return shards[0] if len(shards) == 1 else Shards(shards)


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split, in their order."""
    patterns = (f"{split}.bin", f"{split}-*.bin", f"*_{split}_*.bin")
    return next((files for pattern in patterns if (files := sorted(folder.glob(pattern)))), [])


def open_tokens(path: Path) -> np.ndarray:
    """The tokens of a file, (number of tokens,) uint16, memory-mapped. Their ids are not looked at.

    Raises:
        InputError: the file can't be read, has an odd number of bytes, or another number of tokens than its header says.
    """
    try:
        size, head = path.stat().st_size, np.fromfile(path, "<i4", 3)
    except OSError as error:
        raise InputError(f"can't read {path} ({error.strerror})") from None
    if size % 2:
        raise InputError(f"{path} is not a file of uint16 tokens: it has {size} bytes, an odd number")
    offset = 0
    if len(head) == 3 and head[0] == _MAGIC:  # as tokens, it would begin with 55432, which GPT-2's vocabulary lacks
        _, version, count = map(int, head)
        if version != 1:
            raise InputError(f"{path}: its header has version {version}: expected 1, for uint16 tokens")
        if size != _HEADER_BYTES + 2 * count:
            raise InputError(f"{path} has {size} bytes: its header promises {count} tokens, {_HEADER_BYTES + 2 * count} bytes with itself")
        offset = _HEADER_BYTES
    # What is empty can't be memory-mapped.
    return np.memmap(path, dtype="<u2", mode="r", offset=offset) if size > offset else np.zeros(0, np.uint16)


def check_ids(tokens: np.ndarray, vocab_size: int, path: Path) -> None:
    """Read all tokens of a file, a part at a time.

    Raises:
        InputError: an id is outside the vocabulary; it says where.
    """
    checked = Checked(tokens, vocab_size, path)
    for start in range(0, len(tokens), _CHECKED_AT_A_TIME):
        _ = checked[start : start + _CHECKED_AT_A_TIME]


def _read_index(folder: Path) -> dict[str, dict[str, int]]:
    """What was checked of which file; nothing, if there is no index or it makes no sense."""
    try:
        shards = json.loads((folder / INDEX).read_text(encoding="utf-8"))["shards"]
        return {name: {key: int(known[key]) for key in ("bytes", "largest")} for name, known in shards.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
