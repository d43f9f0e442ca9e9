"""A torch model that casts to float32 inside can still be the truth in float64."""

import pytest
import torch

from torch_ref.port.wide import Wide

X = torch.randn(3, 5, dtype=torch.float64)


@pytest.mark.parametrize(
    "compute",
    [
        lambda: X.float(),
        lambda: X.to(torch.float32),
        lambda: X.to(dtype=torch.float32),
        lambda: X.to("cpu", torch.float32),
        lambda: X.type(torch.float32),
        lambda: torch.softmax(X, -1, dtype=torch.float32),
        lambda: torch.nn.functional.softmax(X, dim=-1, dtype=torch.float32),
        lambda: torch.arange(3, dtype=torch.float),
        lambda: X.sum(dtype=torch.float32),
    ],
)
def test_whoever_asks_for_float32_gets_float64(compute):
    assert compute().dtype == torch.float32
    with Wide():
        assert compute().dtype == torch.float64
    assert compute().dtype == torch.float32, "and only as long as it lasts"


def test_other_precisions_are_left_alone():
    with Wide():
        assert X.to(torch.bfloat16).dtype == torch.bfloat16
        assert torch.zeros(2).dtype == torch.float32
        assert torch.arange(3).dtype == torch.int64
