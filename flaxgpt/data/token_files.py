"""Files of tokens: uint16, little-endian, nothing else (nanoGPT's layout)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flaxgpt.errors import InputError

_CHECKED_AT_A_TIME = 2**22


def open_tokens(path: Path) -> np.ndarray:
    """The tokens of a file, (number of tokens,) uint16, memory-mapped. Their ids are not looked at.

    Raises:
        InputError: the file can't be read, or has an odd number of bytes.
    """
    try:
        size = path.stat().st_size
        if size % 2:
            raise InputError(f"{path} is not a file of uint16 tokens: it has {size} bytes, an odd number")
        # An empty file can't be memory-mapped.
        return np.memmap(path, dtype="<u2", mode="r") if size else np.zeros(0, np.uint16)
    except OSError as error:
        raise InputError(f"can't read {path} ({error.strerror})") from None


def check_ids(tokens: np.ndarray, vocab_size: int, path: Path) -> None:
    """Read all tokens of a file, a part at a time.

    Raises:
        InputError: an id is outside the vocabulary; it says where.
    """
    for start in range(0, len(tokens), _CHECKED_AT_A_TIME):
        part = tokens[start : start + _CHECKED_AT_A_TIME]
        if part.max() >= vocab_size:
            at = start + int(np.argmax(part >= vocab_size))
            raise InputError(f"{path} has the token id {tokens[at]} at token {at} (byte {2 * at}), outside the vocabulary of {vocab_size}")
