"""The log of a process that writes nothing, since another one of the same run does."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from flaxgpt.run.log import RunLog


class SilentLog(RunLog):
    """A RunLog that listens to signals, and that is all: it takes no lock, writes no file and prints nothing."""

    def __enter__(self) -> Self:
        self.stop.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop.__exit__()

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    begin = compiling = update = skipped = evaluation = sync = profiled = summary = _nothing
