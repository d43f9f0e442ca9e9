"""For a test of your own: `assert_ported(make_pair())`."""

from __future__ import annotations

from typing import Any

from flaxgpt.parity.report import verdict as lines_of
from flaxgpt.port.check import check
from flaxgpt.port.pair import Pair


def assert_ported(pair: Pair, **options: Any) -> None:
    """Compare the two models of a pair.

    Args:
        pair: the two.
        **options: those of `flaxgpt.port.check.check`.

    Raises:
        AssertionError: the first tensor that parts and why, in ten lines at most.
        InputError: as `check`.
    """
    __tracebackhide__ = True  # pytest then shows the test's own line
    verdict = check(pair, **options)
    if not verdict.passed:
        text = [*lines_of(verdict.results), *verdict.diagnosis]
        raise AssertionError("\n".join(line[:300] for line in text[:10]))
