"""TrainState, everything that training changes: how it is created, sharded from the start, and converted to and from torch's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from flaxgpt.config import TrainConfig
from flaxgpt.convert.optimizer import MOMENTS, moments_from_torch, moments_to_torch
from flaxgpt.convert.params import check_finite, from_torch, named_parameters, to_torch
from flaxgpt.model import init_params
from flaxgpt.optim import adam_state, make_optimizer, with_adam_state
from flaxgpt.sharding import state_shardings
from flaxgpt.types import Indexable, Params


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


def init_state(cfg: TrainConfig, tx: optax.GradientTransformation, params: Params | None = None) -> TrainState:
    """A pure function of the config: the state before the first update, with random parameters if none are given."""
    init_key, run_key = seed_keys(cfg.seed)
    params = init_params(cfg.model, init_key) if params is None else params
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), run_key)


def create_state(cfg: TrainConfig, tx: optax.GradientTransformation, mesh: Mesh, params: Params | None = None) -> TrainState:
    """`init_state`, computed in place on the mesh: no host or device ever holds more than its shards.

    Parameters that are given (arrays, or what is read where it is indexed, as `flaxgpt.convert.layout.Parameter`) are copied one by
    one: they stay the caller's when the state is donated, and no second copy of all of them is made.
    """
    shardings = state_shardings(abstract_state(cfg, tx), mesh)
    if params is None:
        return jax.jit(lambda: init_state(cfg, tx), out_shardings=shardings)()
    params = jax.tree.map(_place, params, shardings.params)
    rest = jax.jit(lambda params: replace(init_state(cfg, tx, params), params=None), out_shardings=replace(shardings, params=None))
    return replace(rest(params), params=params)


def _place(parameter: Indexable, sharding: NamedSharding) -> jax.Array:
    """A copy of a parameter, each device's shard of which is read by itself."""

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        return np.asarray(parameter[index])

    placed = jax.make_array_from_callback(parameter.shape, sharding, shard)
    return jnp.copy(placed).block_until_ready()  # what is placed may be the caller's own memory; wait, so that it is freed first


def abstract_state(cfg: TrainConfig, tx: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of `init_state`, nothing computed."""
    return jax.eval_shape(lambda: init_state(cfg, tx))


def seed_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """Two typed PRNG keys: of the initial parameters, and of everything drawn in the run."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    return init_key, run_key


def count_params(params: Params) -> int:
    """The number of scalars in a tree of parameters (arrays or their shapes)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def state_from_torch(state_dict: Mapping[str, Any], optimizer_state: Mapping[str, Any], cfg: TrainConfig) -> TrainState:
    """The training state that goes on where a run of the reference stopped.

    Args:
        state_dict: of the model, as NumPy arrays.
        optimizer_state: `optimizer.state_dict()` of the AdamW of `torch_ref.optim.make_optimizer(model, cfg)`, with NumPy
            arrays for tensors; also of one that has made no update yet.
        cfg: the run; its seed makes the key of what is drawn from here on.

    Returns:
        A state on the default device, float32 throughout, to be given to a train step of `make_optimizer(cfg)`.

    Raises:
        InputError: naming every key, shape and option of either that is not of this config, or a value that is not finite.
    """
    step, moments = moments_from_torch(optimizer_state, cfg)
    params = from_torch(state_dict, cfg.model)
    check_finite(named_parameters(params, cfg.model), "the parameters")
    mu, nu = (from_torch(moments[part], cfg.model) for part in MOMENTS)
    tx = make_optimizer(cfg)
    opt_state = with_adam_state(tx.init(params), mu, nu, step)
    _, run_key = seed_keys(cfg.seed)
    return jax.tree.map(jnp.asarray, TrainState(jnp.int32(step), params, opt_state, run_key))


def state_to_torch(state: TrainState, cfg: TrainConfig) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The inverse of `state_from_torch`: a model's and an optimizer's state_dict, which load into the reference's, strictly."""
    state = jax.device_get(TrainState(state.step, state.params, state.opt_state, None))
    adam = adam_state(state.opt_state)
    moments = {part: named_parameters(tree, cfg.model) for part, tree in zip(MOMENTS, (adam.mu, adam.nu), strict=True)}
    return to_torch(state.params, cfg.model), moments_to_torch(int(state.step), moments, cfg)
