"""A torch model in float64 that stays there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Wide(TorchFunctionMode):
    """Within it, who asks torch for float32 gets float64.

        with Wide():
            model.double()(inputs)

    Many models compute norms, softmax or rotary angles in float32, by casting to it. In bfloat16 that is wider than the rest; in float64 it
    is narrower, and would leave a truth that is true to seven digits.
    """

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(_widened, args), **{key: _widened(value) for key, value in (kwargs or {}).items()})


@contextlib.contextmanager
def default_float64() -> Iterator[None]:
    """Within it, what is made with no dtype said is float64: `torch.zeros(3)`, `torch.tensor(0.5)`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _widened(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument
