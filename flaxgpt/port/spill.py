"""Tensors kept in files, so that a check holds one pass at a time: at 100 million parameters four passes are gigabytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np


class Spilled(Mapping[str, np.ndarray]):
    """Arrays by name, read when they are asked for."""

    def __init__(self, arrays: Mapping[str, np.ndarray], folder: Path) -> None:
        folder.mkdir(parents=True)
        self.paths = {name: folder / f"{i}.npy" for i, name in enumerate(arrays)}
        for name, path in self.paths.items():
            np.save(path, arrays[name], allow_pickle=False)

    def __getitem__(self, name: str) -> np.ndarray:
        return np.load(self.paths[name], allow_pickle=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)
