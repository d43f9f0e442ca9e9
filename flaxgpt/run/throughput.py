"""How fast a run is, and what its time goes to."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from flaxgpt.config import GPTConfig
from flaxgpt.run.folder import PARTS, Record


class Stopwatch:
    """Seconds by what a loop spent them on: `with stopwatch("data"): ...`, of each part since it was last taken."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count what happens within for a part (of PARTS)."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] += time.perf_counter() - started

    def take(self, *parts: str) -> Record:
        """What these parts took, as a record has it; they begin again at 0."""
        taken = {f"seconds/{part}": round(self._seconds[part], 4) for part in parts}
        self._seconds |= dict.fromkeys(parts, 0.0)
        return taken


def spent(records: Sequence[Record]) -> dict[str, float]:
    """Seconds of a whole run, over all processes that it took: by part, and under "other" the rest (logging, pictures)."""
    parts = {part: sum(record.get(f"seconds/{part}", 0.0) for record in records) for part in PARTS}
    processes = [before for before, after in itertools.pairwise(records) if after["seconds"] < before["seconds"]] + [*records[-1:]]
    return parts | {"other": max(0.0, sum(record["seconds"] for record in processes) - sum(parts.values()))}


def flops_per_token(model: GPTConfig) -> int:
    """Operations that training on a token takes, by which PaLM defines MFU, model FLOPs utilisation: 6 N + 12 L D T.

    N are the weights that multiply (12 L D^2 of the blocks, D V of the head), each with 2 operations forward and 4 backward; what is
    computed a second time (remat) does not count. Pairs of positions are counted in full, also those that the mask leaves out, which
    `flaxgpt.plan` does not count: with T = 1024, MFU by this count is 7 % higher for GPT-2 124M.

    Source: Chowdhery et al. 2022, PaLM, appendix B.
    """
    L, D, V, T = model.n_layers, model.emb_dim, model.vocab_size, model.context_length
    return 6 * (12 * L * D**2 + D * V) + 12 * L * D * T
