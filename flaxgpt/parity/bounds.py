"""What a kind of tensor may differ by, in float32, float64 and bfloat16."""

from __future__ import annotations

from typing import NamedTuple


class Bounds(NamedTuple):
    """What a kind of tensor may differ by, and the largest that was measured: a bound is at most ten times that."""

    float32: float
    measured32: float
    float64: float = 0.0
    measured64: float = 0.0


BOUNDS: dict[str, Bounds] = {
    "activations": Bounds(2e-6, 6.3e-7, 1e-14, 2.8e-15),
    "loss": Bounds(2e-6, 2.1e-7, 3e-15, 3.8e-16),
    "gradients": Bounds(7e-5, 1.8e-5, 2e-13, 3.4e-14),
    "clipping": Bounds(3e-6, 3.8e-7, 1e-13, 1.7e-14),
    "adamw/parameter": Bounds(4e-4, 5.3e-5, 7e-13, 9.0e-14),
    "adamw/exp_avg": Bounds(7e-7, 9.8e-8, 1e-15, 1.6e-16),
    "adamw/exp_avg_sq": Bounds(1e-6, 1.3e-7, 1e-15, 2.0e-16),
    "accumulation/loss": Bounds(1e-6, 1.3e-7, 3e-15, 3.0e-16),
    "accumulation/grad_norm": Bounds(2e-6, 2.6e-7, 2e-14, 2.5e-15),
    "accumulation/parameter": Bounds(7e-3, 7.7e-4, 7e-10, 8.5e-11),
    "accumulation/exp_avg": Bounds(9e-5, 1.3e-5, 2e-13, 3.3e-14),
    "accumulation/exp_avg_sq": Bounds(9e-5, 1.3e-5, 2e-13, 3.3e-14),
    "training/loss": Bounds(1e-6, 1.4e-7, 2e-15, 2.7e-16),
    "training/grad_norm": Bounds(3e-6, 4.1e-7, 1e-13, 2.3e-14),
    "training/parameter": Bounds(9e-3, 9.5e-4, 1e-9, 1.1e-10),
    "training/exp_avg": Bounds(9e-5, 1.7e-5, 6e-13, 6.5e-14),
    "training/exp_avg_sq": Bounds(9e-5, 1.4e-5, 6e-13, 6.3e-14),
    "dropout/loss": Bounds(1e-6, 1.4e-7, 3e-15, 3.3e-16),
    "dropout/grad_norm": Bounds(4e-6, 4.4e-7, 1e-13, 2.4e-14),
    "dropout/parameter": Bounds(2e-2, 2.9e-3, 1e-9, 1.4e-10),
    "dropout/exp_avg": Bounds(3e-4, 3.2e-5, 2e-13, 3.1e-14),
    "dropout/exp_avg_sq": Bounds(3e-4, 3.9e-5, 5e-13, 5.6e-14),
    "dropout/chance": Bounds(7.0, 4.5),  # standard deviations: beyond 7 once in 4e11 draws
    "generation/text": Bounds(0.0, 0.0),
    "generation/draws": Bounds(0.0, 0.0),
    "edits/edited": Bounds(2e-6, 6.3e-7, 1e-14, 2.8e-15),
    "edits/backward": Bounds(7e-5, 1.8e-5, 2e-13, 3.4e-14),
    "edits/gradients": Bounds(7e-5, 1.8e-5, 2e-13, 3.4e-14),
    "edits/after": Bounds(2e-6, 6.3e-7, 1e-14, 2.8e-15),
}
"""By rung, or by rung and kind of tensor (the first word of its name).

Measured on an x86-64 CPU: the worst of three small configs with 100, 20 and 20 seeds, and of the 124M reference (there flaxgpt's own
error, where that is smaller than the difference: see Measurement.share_of_bound).
"""


def bfloat16_error(float32_error: float) -> float:
    """The error to expect in bfloat16, from the error in float32 against float64.

    bfloat16 has 8 bits of significand and float32 has 24, so each rounding is 2**16 times as large, and to first order so is what they
    add up to. A float32 error below one rounding, 2**-24, is luck, and counts as one.
    """
    return 2.0**16 * max(float32_error, 2.0**-24)
