"""TrainState, the whole of what training changes, and its creation, sharded from the first moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flaxgpt.config import TrainConfig
from flaxgpt.model import GPT
from flaxgpt.sharding import state_shardings

Params = Any
"""A nested dict of arrays, as `GPT(cfg).init(...)["params"]` gives it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a train step reads and replaces.

    Attributes:
        step: () int32, the number of updates made.
        params: float32 parameters.
        opt_state: the optimizer's moments and counts.
        key: the run's typed PRNG key; never changed, the randomness of a step is `fold_in(key, step)`.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    key: jax.Array


def init_state(cfg: TrainConfig, tx: optax.GradientTransformation) -> TrainState:
    """A pure function of the config: the state before the first update."""
    init_key, run_key = jax.random.split(jax.random.key(cfg.seed))
    params = GPT(cfg.model).init(init_key, jnp.zeros((1, 1), jnp.int32))["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), run_key)


def create_state(cfg: TrainConfig, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """`init_state`, computed in place on the mesh: no host or device ever holds more than its shards."""
    return jax.jit(lambda: init_state(cfg, tx), out_shardings=state_shardings(abstract_state(cfg, tx), mesh))()


def abstract_state(cfg: TrainConfig, tx: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of `init_state`, nothing computed."""
    return jax.eval_shape(lambda: init_state(cfg, tx))


def count_params(params: Params) -> int:
    """The number of scalars in a tree of parameters (arrays or their shapes)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
