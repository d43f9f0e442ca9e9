"""Ctrl-C as a request to stop after the update that is being made."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Self


class StopRequest:
    """A context manager that remembers SIGINT and SIGTERM in place of obeying them; a second Ctrl-C is obeyed at once.

    Attributes:
        signal: the number of the signal that came, None while none has.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._handlers: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.signal is not None

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
