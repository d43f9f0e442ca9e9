"""Looking at activations and changing them, as arguments of a pure function. `torch_ref/interventions.py` does it by hooks.

    logits_BTV = forward(params, cfg, tokens_BT, edits={"trf_blocks.3.att.out": scale(0), "logits": fn})

The model is not changed by it, nor is anything that is traced without.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxgpt.config import GPTConfig
from flaxgpt.convert.names import module_path
from flaxgpt.convert.params import insert
from flaxgpt.edits import Edit, check_result, check_value
from flaxgpt.sites import Site, sites_meant

jax.tree_util.register_dataclass(Edit, data_fields=["value", "positions", "heads"], meta_fields=["change"])

Visitor = Callable[[nn.Module, str, jax.Array], jax.Array]
"""A module, a point of it ("trf_blocks/norm1/output") and the activation there -> the activation, or another one in its place."""


def visiting(*visitors: Visitor, within: str = "") -> AbstractContextManager[None]:
    """Within it, these visitors, in this order, are handed what goes into and comes out of every module that is applied.

    Args:
        *visitors: none of them: nothing is intercepted.
        within: the path of the module that is applied, if that is not the model but a block of it.
    """

    def visit(module: nn.Module, end: str, x: jax.Array) -> jax.Array:
        for visitor in visitors:
            x = visitor(module, "/".join([*filter(None, [within]), *module.path, end]), x)
        return x

    def intercept(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
        # The model's own output is that of its head, which decoding calls by itself.
        if context.method_name != ("logits" if hasattr(context.module, "logits") else "__call__") or not args:
            return call(*args, **kwargs)
        x, *others = args
        result = call(visit(context.module, "input", x), *others, **kwargs)
        if isinstance(result, tuple):
            return visit(context.module, "output", result[0]), *result[1:]
        return visit(context.module, "output", result)

    return nn.intercept_methods(intercept) if visitors else contextlib.nullcontext()


def tapping(points: Collection[str]) -> Visitor:
    """Gives and takes activations at these points: module paths and "input" or "output", as "trf_blocks/norm1/output".

    With `mutable=["taps"]`, `GPT(cfg).apply` returns the activation in that collection at the point's path. An array of its shape in the
    collection "perturbations" at that path is added to it, so the gradient with respect to that array is the gradient with respect
    to the activation.
    """

    def tap(module: nn.Module, point: str, x: jax.Array) -> jax.Array:
        if point not in points:
            return x
        end = point.rpartition("/")[2]
        if module.has_variable("perturbations", end):
            x = x + module.get_variable("perturbations", end)
        module.sow("taps", end, x, init_fn=lambda: None, reduce_fn=lambda _, new: new)
        return x

    return tap


def editing(edits: Mapping[str, Edit], cfg: GPTConfig, positions: jax.Array, layer: int | None = None) -> list[Visitor]:
    """Makes these edits (`flaxgpt.edits.checked_edits`); none: no visitor.

    Args:
        edits: by name of the site.
        cfg: the model.
        positions: of the tokens that are read, (T,) or (B, T).
        layer: the block that is applied; None: all of them under the scan, which are told apart by what `layer_numbers` returns.
    """
    by_point: dict[str, list[tuple[str, Site, Edit]]] = {}
    for name, edit in edits.items():
        site = sites_meant(name, cfg.n_layers)[0]
        by_point.setdefault(module_path(site.point), []).append((name, site, edit))

    def visit(module: nn.Module, point: str, x: jax.Array) -> jax.Array:
        for name, site, edit in by_point.get(point, []):
            number = layer if layer is not None or not name.startswith("trf_blocks.") else module.get_variable("layer", "number")
            x = _edit_layer(edit, name, site, x, cfg, positions, number)
        return x

    return [visit] if by_point else []


def layer_numbers(edits: Mapping[str, Edit], cfg: GPTConfig) -> dict[str, Any]:
    """The collection "layer", split by the scan over the blocks: a module with a point that is edited learns which block it is in."""
    tree: dict[str, Any] = {}
    for name in edits:
        if name.startswith("trf_blocks."):
            module = module_path(sites_meant(name, cfg.n_layers)[0].point).rpartition("/")[0]
            insert(tree, f"{module}/number", jnp.arange(cfg.n_layers))
    return {"layer": tree} if tree else {}


def _edit_layer(
    edit: Edit, name: str, site: Site, x: jax.Array, cfg: GPTConfig, positions: jax.Array, layer: int | jax.Array | None
) -> jax.Array:
    """The activation of this block, edited if the name means this block."""

    def edited(x: jax.Array) -> jax.Array:
        change = edit.change
        if callable(change) and "{}" in name:
            new = change(x, layer)
        elif callable(change):
            new = change(x)
        else:
            check_value(name, edit.value, x.shape)
            new = _CHANGES[change](x, jnp.asarray(edit.value, x.dtype))
        check_result(name, x, new)
        new = jnp.asarray(new)
        chosen = _chosen(edit, site, x, cfg, positions)
        return new if chosen is None else jnp.where(chosen, new, x)

    meant = re.match(r"trf_blocks\.(\d+)\.", name)
    if meant is None:
        return edited(x)
    if isinstance(layer, int):
        return edited(x) if layer == int(meant[1]) else x
    return jax.lax.cond(layer == int(meant[1]), edited, lambda x: x, x)


def _chosen(edit: Edit, site: Site, x: jax.Array, cfg: GPTConfig, positions: jax.Array) -> jax.Array | None:
    """Which elements are edited, to be broadcast to x; None: all."""
    chosen = None
    if edit.positions is not None:
        positions = positions[..., -x.shape[-2] :]  # decoding computes the head of the last one alone
        hit = (positions[..., None] == jnp.atleast_1d(edit.positions)).any(-1)  # (T,) or (B, T)
        chosen = hit.reshape(*hit.shape[:-1], *[1] * (x.ndim - 1 - hit.ndim), hit.shape[-1], 1)
    if edit.heads is not None:
        hit_N = (jnp.arange(cfg.n_heads)[:, None] == jnp.atleast_1d(edit.heads)).any(-1)
        hit = hit_N[:, None, None] if "N" in site.axes else jnp.repeat(hit_N, cfg.emb_dim // cfg.n_heads)
        chosen = hit if chosen is None else chosen & hit
    return chosen


_CHANGES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "replace": lambda x, value: jnp.broadcast_to(value, x.shape),
    "add": lambda x, value: x + value,
    "scale": lambda x, value: x * value,
}
