"""Which device holds what: a mesh of (data, fsdp), and a table from parameter path to PartitionSpec."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flaxgpt.errors import InputError
from flaxgpt.types import Batch

Tree = TypeVar("Tree")

# Every weight matrix is split along D, which fsdp divides (TrainConfig checks it); vectors are small and copied. The paths are those of
# flaxgpt.convert.names, in its order, and with them those of the moments in the optimizer's state, which have the same shapes.
PARTITIONS: dict[str, P] = {
    "tok_emb/embedding":               P(None, "fsdp"),
    "pos_emb/embedding":               P(None, "fsdp"),
    "trf_blocks/att/W_query/kernel":   P(None, "fsdp", None),
    "trf_blocks/att/W_query/bias":     P(),
    "trf_blocks/att/W_key/kernel":     P(None, "fsdp", None),
    "trf_blocks/att/W_key/bias":       P(),
    "trf_blocks/att/W_value/kernel":   P(None, "fsdp", None),
    "trf_blocks/att/W_value/bias":     P(),
    "trf_blocks/att/out_proj/kernel":  P(None, None, "fsdp"),
    "trf_blocks/att/out_proj/bias":    P(),
    "trf_blocks/ff/layers_0/kernel":   P(None, "fsdp", None),
    "trf_blocks/ff/layers_0/bias":     P(),
    "trf_blocks/ff/layers_2/kernel":   P(None, None, "fsdp"),
    "trf_blocks/ff/layers_2/bias":     P(),
    "trf_blocks/norm1/scale":          P(),
    "trf_blocks/norm1/shift":          P(),
    "trf_blocks/norm2/scale":          P(),
    "trf_blocks/norm2/shift":          P(),
    "final_norm/scale":                P(),
    "final_norm/shift":                P(),
    "out_head/kernel":                 P("fsdp", None),
}  # fmt: skip


def make_mesh(fsdp: int = 1) -> Mesh:
    """All devices as a (data, fsdp) grid: batches are split over both axes, parameters over the second.

    Raises:
        InputError: fsdp does not divide the number of devices.
    """
    devices = jax.devices()
    if len(devices) % fsdp:
        raise InputError(f"fsdp={fsdp} does not divide the {len(devices)} devices")
    return Mesh(np.asarray(devices).reshape(-1, fsdp), ("data", "fsdp"))


def state_shardings(abstract_state: Tree, mesh: Mesh) -> Tree:
    """The NamedSharding of every leaf of a train state (or of its parameters): PARTITIONS by path; counts and keys are copied."""

    def sharding(path: tuple[Any, ...], _: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, next((spec for row, spec in PARTITIONS.items() if f"/{name}".endswith(f"/{row}")), P()))

    return jax.tree_util.tree_map_with_path(sharding, abstract_state)


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Host arrays (B, ...) -> global device arrays, rows split over all devices (copied where B does not divide).

    Every host computes the same batch and hands over the rows of its own devices: nothing is sent between hosts.
    """

    def put(x: np.ndarray) -> jax.Array:
        rows = P(("data", "fsdp")) if x.shape[0] % mesh.size == 0 else P()
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, rows), lambda index: x[index])

    return jax.tree.map(put, batch)
