"""JAX's profiler over some updates of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import jax

from flaxgpt.errors import InputError


class Tracer:
    """`before` and `after` each update: from the first of `updates` until the last is computed, the profiler runs.

    It waits for the device at both ends, so the trace has these updates, evaluations between them, and nothing else. A context
    manager: a run that ends meanwhile writes what there is.

    Attributes:
        trace: the trace as Perfetto opens it, once it is written.
    """

    def __init__(self, updates: range | None, folder: Path) -> None:
        """The trace goes into `folder`, where xprof and TensorBoard's plugin look for it."""
        self._updates, self._folder, self.trace = updates or range(0), folder, None
        self._runs = False

    def check(self, to_come: range) -> None:
        """InputError if the updates are not all among those to come."""
        asked = self._updates
        if asked and not (asked[0] in to_come and asked[-1] in to_come):
            raise InputError(f"--profile {asked.start}:{asked.stop}: the updates to come are {to_come.start}:{to_come.stop}")

    def before(self, step: int, state: Any) -> None:
        """`state` is what the update starts from."""
        if step == self._updates.start and self._updates:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._runs = True

    def after(self, step: int, state: Any) -> None:
        """`state` is what the update makes."""
        if step == self._updates.stop - 1 and self._runs:
            jax.block_until_ready(state)
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._runs:
            self._stop()

    def _stop(self) -> None:
        self._runs = False
        jax.profiler.stop_trace()
        self.trace = max(self._folder.rglob("*.trace.json.gz"), default=None)  # their folders are named by the time
