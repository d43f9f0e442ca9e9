"""Which device holds what: a mesh of (data, fsdp, tensor), and tables from what an array is to its PartitionSpec."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flaxgpt.config import TrainConfig
from flaxgpt.errors import InputError
from flaxgpt.types import Batch, Params

Tree = TypeVar("Tree")

# Matrices are split along D by fsdp (ZeRO-3; Rajbhandari et al. 2020), and along their other axis by tensor (heads, feed-forward units and
# the vocabulary; Shoeybi et al. 2019, Megatron-LM). Vectors of D are small and copied. The paths are those of flaxgpt.convert.names, in its
# order, and with them those of the moments in the optimizer's state, which have the same shapes.
PARTITIONS: dict[str, P] = {
    "tok_emb/embedding":               P("tensor", "fsdp"),
    "pos_emb/embedding":               P(None, "fsdp"),
    "trf_blocks/att/W_query/kernel":   P(None, "fsdp", "tensor"),
    "trf_blocks/att/W_query/bias":     P(None, "tensor"),
    "trf_blocks/att/W_key/kernel":     P(None, "fsdp", "tensor"),
    "trf_blocks/att/W_key/bias":       P(None, "tensor"),
    "trf_blocks/att/W_value/kernel":   P(None, "fsdp", "tensor"),
    "trf_blocks/att/W_value/bias":     P(None, "tensor"),
    "trf_blocks/att/out_proj/kernel":  P(None, "tensor", "fsdp"),
    "trf_blocks/att/out_proj/bias":    P(),
    "trf_blocks/ff/layers_0/kernel":   P(None, "fsdp", "tensor"),
    "trf_blocks/ff/layers_0/bias":     P(None, "tensor"),
    "trf_blocks/ff/layers_2/kernel":   P(None, "tensor", "fsdp"),
    "trf_blocks/ff/layers_2/bias":     P(),
    "trf_blocks/norm1/scale":          P(),
    "trf_blocks/norm1/shift":          P(),
    "trf_blocks/norm2/scale":          P(),
    "trf_blocks/norm2/shift":          P(),
    "final_norm/scale":                P(),
    "final_norm/shift":                P(),
    "out_head/kernel":                 P("fsdp", "tensor"),
}  # fmt: skip

# By the letters of flaxgpt.config. Rows are those of one shard of the data axis (see `data_parallel`); VD, TD and DV are the two embeddings
# and the head when they are read.
ACTIVATIONS: dict[str, P] = {
    "VD":   P("tensor", None),
    "TD":   P(None, None),
    "DV":   P(None, "tensor"),
    "BTD":  P("fsdp", None, None),
    "BTV":  P("fsdp", None, "tensor"),
    "BNSH": P("fsdp", "tensor", None, None),
}  # fmt: skip

ROWS = P(("data", "fsdp"))
"""Of a batch: every device of one tensor group has the same rows."""


def make_mesh(fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices (all there are, if none are given) as a grid of (data, fsdp, tensor).

    Rows of a batch are split over the first two axes, parameters over the last two; the rest of the devices is the data axis.

    Raises:
        InputError: fsdp x tensor does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) % (fsdp * tensor):
        fits = ", ".join(str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0)
        raise InputError(f"fsdp={fsdp} x tensor={tensor} does not divide the {len(devices)} devices; their product can be {fits}")
    return Mesh(np.asarray(devices).reshape(-1, fsdp, tensor), ("data", "fsdp", "tensor"))


def compute_mesh(mesh: Mesh, gather: Literal["layer", "update"]) -> Mesh:
    """The mesh that an update is computed on, given the one that its state lies on.

    layer: the same, so each layer's weights are gathered when it is their turn, and their gradients scattered.
    update: the devices of the fsdp axis join the data axis. Weights are then gathered once, before the first layer, and gradients scattered
    once, after the last microbatch: ZeRO-1.
    """
    _, _, tensor = mesh.devices.shape
    return {"layer": mesh, "update": Mesh(mesh.devices.reshape(-1, 1, tensor), mesh.axis_names)}[gather]


def within(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, called with the mesh in context: it is for what `placed` and `data_parallel` find there."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.set_mesh(mesh):
            return function(*args, **kwargs)

    return call


def check_batch(cfg: TrainConfig, mesh: Mesh) -> None:
    """InputError if the rows of a microbatch can't be split evenly over the mesh."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if cfg.microbatch_size % shards:
        raise InputError(
            f"batch_size={cfg.batch_size} can't be split evenly into grad_accum_steps={cfg.grad_accum_steps} microbatches for "
            f"data x fsdp = {shards} devices: expected a multiple of {cfg.grad_accum_steps * shards}"
        )


def state_shardings(abstract_state: Tree, mesh: Mesh) -> Tree:
    """The NamedSharding of every leaf of a train state (or of its parameters): PARTITIONS by path; counts and keys are copied."""
    return jax.tree_util.tree_map_with_path(lambda path, _: NamedSharding(mesh, _partition(path)), abstract_state)


def batch_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Of a host's arrays (B, ...): rows split over data and fsdp; copied where that does not divide them."""
    return NamedSharding(mesh, ROWS if rows % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else P())


def process_rows(mesh: Mesh, B: int) -> np.ndarray:
    """Which rows of a batch of B lie on this process's devices, in order."""
    slices = batch_sharding(mesh, B).addressable_devices_indices_map((B,)).values()
    return np.unique(np.concatenate([np.arange(B)[rows] for rows in slices]))


def shard_batch(batch: Batch, mesh: Mesh, B: int | None = None) -> Batch:
    """Host arrays of this process's rows -> global device arrays (B, ...), as `batch_sharding` says: nothing is sent between hosts.

    Args:
        batch: the rows that `process_rows` names; in a single process those are all.
        mesh: the devices.
        B: how many rows there are in all processes; None: these.
    """

    def place(x: np.ndarray) -> jax.Array:
        rows = len(x) if B is None else B
        return jax.make_array_from_process_local_data(batch_sharding(mesh, rows), x, (rows, *x.shape[1:]))

    return jax.tree.map(place, batch)


def placed(x: jax.Array, letters: str) -> jax.Array:
    """The same activation, laid out on the mesh in context as ACTIVATIONS says; as it is where there is none.

    Without it the partitioner leaves the weights where they are and moves activations: 2.7 TB in place of 0.3 for each device and update of
    gpt2-1558m on eight devices.
    """
    return constrained(x, ACTIVATIONS[letters])


def placed_params(params: Params) -> Params:
    """The same parameters (or their gradients), laid out on the mesh in context as PARTITIONS says."""
    return jax.tree_util.tree_map_with_path(lambda path, x: constrained(x, _partition(path)), params)


def data_parallel(function: Callable[..., Tree]) -> Callable[..., Tree]:
    """The mean of a function (params, rows, *others) over the shards of the data axis, each given its part of every array of rows.

    Parameters are laid out on the mesh in context first, as `placed_params` says, and the others copied.
    The mean is taken of the results alone. So the gradients of all microbatches and layers cross the data axis once, in their own
    precision, where the partitioner by itself would reduce them inside both loops. Nothing happens without a mesh in context, or where the
    axis has one shard, or does not divide the rows.
    """

    @functools.wraps(function)
    def mean(params: Params, rows: Any, *others: Any) -> Tree:
        params, others = placed_params(params), jax.tree.map(lambda x: constrained(x, P()), others)
        B = jax.tree.leaves(rows)[0].shape[0]
        shards = ways("data", B)
        if shards == 1:
            return function(params, rows, *others)
        split = jax.tree.map(lambda x: constrained(x.reshape(shards, B // shards, *x.shape[1:]), P("data", "fsdp")), rows)
        in_axes = (None, 0, *(None for _ in others))
        results = jax.vmap(function, in_axes=in_axes, spmd_axis_name="data")(params, split, *others)
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), results)

    return mean


def constrained(x: jax.Array, spec: P) -> jax.Array:
    """The same array, laid out so on the mesh in context, but for axes that do not divide its dimensions."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    axes = (None if isinstance(axis, str) and ways(axis, size) == 1 else axis for axis, size in zip(spec, x.shape, strict=False))
    return jax.lax.with_sharding_constraint(x, P(*axes))


def ways(axis: str, size: int) -> int:
    """In how many parts a dimension of this size is split along an axis of the mesh in context; 1 if it can't be split evenly."""
    parts = jax.sharding.get_abstract_mesh().shape.get(axis, 1)
    return parts if size % parts == 0 else 1


def _partition(path: tuple[Any, ...]) -> P:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return next((spec for row, spec in PARTITIONS.items() if f"/{name}".endswith(f"/{row}")), P())
