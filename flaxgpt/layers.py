"""What GPT-2 is built from: linear layers, norm, dropout, and how parameters are drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from flaxgpt.config import GPTConfig
from flaxgpt.convert.names import VOCAB_AXES
from flaxgpt.sharding import placed


class Linear(nn.Module):
    """The last axis of x times kernel plus bias, in the dtype of the model; initialised as the parameters at `path_of_layer` are."""

    cfg: GPTConfig
    path_of_layer: str
    features: int
    use_bias: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", initialiser(self.cfg, f"{self.path_of_layer}/kernel"), (x.shape[-1], self.features))
        y = matmul(x.astype(self.cfg.dtype), kernel.astype(self.cfg.dtype))
        if self.use_bias:
            y += self.param("bias", initialiser(self.cfg, f"{self.path_of_layer}/bias"), (self.features,)).astype(self.cfg.dtype)
        return y


def matmul(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """The product x @ kernel over the last axis of x, as one of two matrices; `dtype` is that of the result.

    With rows and positions as two axes, XLA's CPU backend transposes what the kernel's gradient is made of: 1.1 to 1.4 times the time.
    """
    y = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel, preferred_element_type=dtype)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


class Embedding(nn.Module):
    """A table of `rows` vectors, initialised as the parameter at this path is: ids of any shape -> their vectors.

    It is read laid out as `flaxgpt.sharding.ACTIVATIONS` says of `letters`.
    """

    cfg: GPTConfig
    path_of_table: str
    rows: int
    letters: str

    def setup(self) -> None:
        self.embedding = self.param("embedding", initialiser(self.cfg, f"{self.path_of_table}/embedding"), (self.rows, self.cfg.emb_dim))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return jnp.take(placed(self.embedding.astype(self.cfg.dtype), self.letters), ids, axis=0)


class OutHead(nn.Module):
    """The untied head's kernel_DV, without bias; what pads the vocabulary included."""

    cfg: GPTConfig

    def setup(self) -> None:
        self.kernel = self.param("kernel", initialiser(self.cfg, "out_head/kernel"), (self.cfg.emb_dim, self.cfg.padded_vocab))


@jax.named_scope("out_head")
def project(x_BTD: jax.Array, kernel_DV: jax.Array) -> jax.Array:
    """Logits (B, T, V): a product in the dtype of x, added up in float32 at least."""
    kernel_DV = placed(kernel_DV.astype(x_BTD.dtype), "DV")
    return matmul(x_BTD, kernel_DV, wide(x_BTD.dtype))


class LayerNorm(nn.Module):
    """Zero mean and unit (biased) variance over the last axis, eps 1e-5, computed in float32 at least; scaled and, on request, shifted."""

    use_shift: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        shift = self.param("shift", nn.initializers.zeros, (x.shape[-1],)) if self.use_shift else 0
        x_wide = x.astype(wide(x.dtype))
        mean = x_wide.mean(-1, keepdims=True)
        variance = x_wide.var(-1, keepdims=True)
        return (scale * (x_wide - mean) * jax.lax.rsqrt(variance + 1e-5) + shift).astype(x.dtype)


class Dropout(nn.Module):
    """Zeroes a part of the elements and scales the rest by 1 / (1 - rate).

    What to keep is drawn from the "dropout" stream and the row's number, so that a row's masks do not depend on the device or the
    microbatch that it is in. Without numbers, dropout is off. Masks can also be handed in: a boolean array `keep` of the shape of x, in
    the collection "dropout_masks" at this module's path. So a run of another implementation can be replayed. With
    `mutable=["dropout_masks"]` what was drawn comes back, to be replayed elsewhere.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, rows_B: jax.Array | None) -> jax.Array:
        if rows_B is None or self.rate == 0:
            return x
        if self.has_variable("dropout_masks", "keep"):
            keep = self.get_variable("dropout_masks", "keep")
            if keep.shape != x.shape:
                raise ValueError(f"the dropout mask of {'/'.join(self.path)} is {keep.shape}, expected {x.shape}")
        else:
            keys_B = jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng("dropout"), rows_B)
            keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[1:]))(keys_B)
            if self.is_mutable_collection("dropout_masks"):
                self.put_variable("dropout_masks", "keep", keep)
        return jnp.where(keep, x / (1 - self.rate), 0)

    def inert(self, rows_B: jax.Array | None) -> bool:
        """Whether a call would return x, and nobody looks at x there or edits it (`flaxgpt.interventions`): then x need not exist."""
        visited = self.is_mutable_collection("taps") or self.has_variable("perturbations", "input") or self.has_variable("layer", "number")
        return (rows_B is None or self.rate == 0) and not visited


class Identity(nn.Module):
    """x itself: a place in the forward pass that would otherwise belong to no module, so that it can be looked at."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


def rematerialised(block: Callable[..., Any], cfg: GPTConfig) -> Callable[..., Any]:
    """A block, to be scanned, that keeps for the backward pass what `cfg.remat` says."""
    if cfg.remat == "none":
        return block
    policies = {"block": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    return nn.remat(block, prevent_cse=False, policy=policies[cfg.remat])


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """What norms, softmax and logits are computed in: float32, or float64 in a float64 model."""
    return jnp.promote_types(dtype, jnp.float32)


def initialiser(cfg: GPTConfig, path: str) -> Initializer:
    """How the parameter at this path is drawn: `cfg.init` chooses the column of INITIALISERS. What pads the vocabulary is zero."""
    gpt2, torch = INITIALISERS[path]
    draw = (gpt2 if cfg.init == "gpt2" else torch)(cfg)
    if path not in VOCAB_AXES:
        return draw

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        unpadded = tuple(cfg.vocab_size if axis == VOCAB_AXES[path] else size for axis, size in enumerate(shape))
        return jnp.pad(draw(key, unpadded, dtype), [(0, size - real) for size, real in zip(shape, unpadded, strict=True)])

    return init


def _normal(_: GPTConfig) -> Initializer:
    return nn.initializers.normal(0.02)


def _residual(cfg: GPTConfig) -> Initializer:
    """Of the two projections that write to the residual stream: what 2 L of them add up to keeps its size."""
    return nn.initializers.normal(0.02 * (2 * cfg.n_layers) ** -0.5)


def _zeros(_: GPTConfig) -> Initializer:
    return nn.initializers.zeros


def _unit(_: GPTConfig) -> Initializer:
    return nn.initializers.normal(1.0)


def _linear(_: GPTConfig) -> Initializer:
    """Uniform within 1/sqrt(fan_in), whose variance is 1 / (3 fan_in)."""
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _bias_from_D(cfg: GPTConfig) -> Initializer:
    return _uniform(cfg.emb_dim**-0.5)


def _bias_from_F(cfg: GPTConfig) -> Initializer:
    return _uniform((4 * cfg.emb_dim) ** -0.5)


def _uniform(limit: float) -> Initializer:
    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


# The paths of flaxgpt.convert.names, in its order. gpt2: Radford et al. 2019. torch: the defaults of torch 2's nn.Embedding and
# nn.Linear (a bias is drawn by the fan-in of its layer). Norms begin as the identity in both.
INITIALISERS: dict[str, tuple[Callable[[GPTConfig], Initializer], Callable[[GPTConfig], Initializer]]] = {
    #                                   gpt2        torch
    "tok_emb/embedding":               (_normal,    _unit),
    "pos_emb/embedding":               (_normal,    _unit),
    "trf_blocks/att/W_query/kernel":   (_normal,    _linear),
    "trf_blocks/att/W_query/bias":     (_zeros,     _bias_from_D),
    "trf_blocks/att/W_key/kernel":     (_normal,    _linear),
    "trf_blocks/att/W_key/bias":       (_zeros,     _bias_from_D),
    "trf_blocks/att/W_value/kernel":   (_normal,    _linear),
    "trf_blocks/att/W_value/bias":     (_zeros,     _bias_from_D),
    "trf_blocks/att/out_proj/kernel":  (_residual,  _linear),
    "trf_blocks/att/out_proj/bias":    (_zeros,     _bias_from_D),
    "trf_blocks/ff/layers_0/kernel":   (_normal,    _linear),
    "trf_blocks/ff/layers_0/bias":     (_zeros,     _bias_from_D),
    "trf_blocks/ff/layers_2/kernel":   (_residual,  _linear),
    "trf_blocks/ff/layers_2/bias":     (_zeros,     _bias_from_F),
    "out_head/kernel":                 (_normal,    _linear),
}  # fmt: skip
