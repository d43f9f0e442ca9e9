"""Several implementations of one piece of work, timed in alternating rounds."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """What one implementation took for one piece of work.

    Attributes:
        work: what was done, with its sizes; rows of the same work are compared.
        who: who did it.
        unit: of the values: "s" or "GB".
        values: one for each round.
        floor: below which no implementation on this machine can be, in the same unit; None: not known.
        note: what else is to be known, such as why there are no values.
    """

    work: str
    who: str
    unit: str
    values: tuple[float, ...]
    floor: float | None = None
    note: str = ""

    @property
    def is_ours(self) -> bool:
        """What the others are compared with."""
        return self.who in ("flaxgpt", "train_jax.py")

    @property
    def median(self) -> float | None:
        """None: there are no values."""
        return statistics.median(self.values) if self.values else None

    def to_dict(self, ours: float | None) -> dict[str, Any]:
        """For JSON; `ours` is our median of the same work: `ratio` is how many times theirs that is, below 1 where ours is less."""
        ratio = ours / self.median if ours and self.median else None
        return dataclasses.asdict(self) | {"median": self.median, "ratio": ratio}


LEAST = 0.2
"""Seconds that a call is repeated for, in each round, if it is shorter."""


def alternate(calls: dict[str, Call], rounds: int, *, warm: bool = True) -> dict[str, tuple[float, ...]]:
    """Seconds of each call in each round, every other round in the opposite order.

    Args:
        calls: each returns when its work is done. Short ones are repeated, and the mean is taken.
        rounds: how often each is timed.
        warm: call each twice before, not counted, so that compilation is not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    repeats = dict.fromkeys(calls, 1)
    for name, call in calls.items() if warm else ():
        call()
        started = time.perf_counter()
        call()
        repeats[name] = max(1, round(LEAST / (time.perf_counter() - started)))
    for i in range(rounds):
        for name in list(calls) if i % 2 == 0 else reversed(calls):
            started = time.perf_counter()
            for _ in range(repeats[name]):
                calls[name]()
            seconds[name].append((time.perf_counter() - started) / repeats[name])
    return {name: tuple(values) for name, values in seconds.items()}


def rows(work: str, calls: dict[str, Call], rounds: int, *, floor: float | None = None, warm: bool = True) -> list[Row]:
    """A row for each call, in their order."""
    return [Row(work, who, "s", values, floor) for who, values in alternate(calls, rounds, warm=warm).items()]
