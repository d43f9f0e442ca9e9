"""Lower bounds of the time that work takes on this machine: its arithmetic at the rate, and its bytes at the bandwidth, measured here."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flaxgpt.benchmark.timing import alternate
from flaxgpt.config import GPTConfig, TrainConfig
from flaxgpt.plan.plan import model_flops


class Rates(NamedTuple):
    """What the machine reaches, each the best of several rounds.

    Attributes:
        flops: operations a second of products of large matrices, in the dtype asked for.
        bandwidth: bytes a second, of reading one large array, times two vectors: a product that is all reading.
        update_bandwidth: bytes a second of reading and writing large arrays element by element.
    """

    flops: float
    bandwidth: float
    update_bandwidth: float


def measure_rates(dtype: str, rounds: int = 5) -> Rates:
    """Measure them on the default device, in a second or two on a CPU."""
    n, m = (2048, 2**26) if jax.default_backend() == "cpu" else (8192, 2**29)
    square, long = jnp.ones((n, n), dtype), jnp.ones((m // 4096, 4096), dtype)
    vector = jnp.ones(4096, dtype)
    product, read, change = jax.jit(jnp.matmul), jax.jit(jnp.matmul), jax.jit(lambda x: x * 1.5 + 1, donate_argnums=0)
    held = [jnp.ones(m, dtype)]

    def update() -> None:
        held[0] = change(held[0]).block_until_ready()

    calls = {
        "product": lambda: product(square, square).block_until_ready(),
        "read": lambda: read(long, vector).block_until_ready(),
        "update": update,
    }
    best = {name: min(values) for name, values in alternate(calls, rounds).items()}
    return Rates(2 * n**3 / best["product"], long.nbytes / best["read"], 2 * held[0].nbytes / best["update"])


def of_forward(cfg: TrainConfig, rates: Rates) -> float:
    """Seconds of a forward pass and its loss, of one batch."""
    return model_flops(cfg) / 3 / rates.flops


def of_gradients(cfg: TrainConfig, rates: Rates) -> float:
    """Seconds of a forward and a backward pass: the products, forward and twice that backward; masked scores left out."""
    return model_flops(cfg) / rates.flops


def of_optimizer(n_params: int, rates: Rates) -> float:
    """Seconds of AdamW: parameters, gradients and two moments are read, all but the gradients written, in float32."""
    return 7 * 4 * n_params / rates.update_bandwidth


def of_decoding(cfg: GPTConfig, n_params: int, batch: int, new_tokens: int, prompt_tokens: int, rates: Rates) -> float:
    """Seconds of prompt and new tokens: the prompt's arithmetic, then of each token its own, or reading all weights if that is more."""
    size = 2 if cfg.dtype == "bfloat16" else 4
    matrices = n_params - cfg.context_length * cfg.emb_dim  # positions are looked up; the tied embedding is read as the head
    token = max(matrices * size / rates.bandwidth, 2 * matrices * batch / rates.flops)
    return 2 * (matrices - cfg.padded_vocab * cfg.emb_dim) * batch * prompt_tokens / rates.flops + new_tokens * token
