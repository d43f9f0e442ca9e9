"""Looking at activations and changing them, by hooks that are put on a model and taken off. `flaxgpt/interventions.py` has neither.

    with edited(model, {"trf_blocks.3.att.out": scale(0), "logits": fn}):
        logits_BTV = model(tokens_BT)

While a hook is on, everybody who calls the model gets what it makes of it; so both functions are context managers.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from flaxgpt.config import GPTConfig
from flaxgpt.edits import Edit, Edits, check_result, check_value, checked_edits
from flaxgpt.errors import InputError
from flaxgpt.sites import Site, sites_meant

Points = Mapping[str, tuple[str, int | None]]
"""Name of a site -> its point in a model ("trf_blocks.0.norm1.output"), and which third of the last axis that is (None: all)."""


@contextlib.contextmanager
def tapped(model: nn.Module, points: Collection[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Collects the activations at these points in the forward pass made within.

    A point is a module's path and "input" or "output": its first argument, or its result (of several, the last).
    """
    taps: dict[str, torch.Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for point in points:
            hooks.callback(_hook(model, point, functools.partial(taps.__setitem__, point)).remove)
        yield taps


@contextlib.contextmanager
def edited(model: nn.Module, edits: Edits, *, cfg: GPTConfig | None = None, points: Points | None = None) -> Iterator[None]:
    """Makes these edits (`flaxgpt.edits`) in every forward pass within, cached ones and generation included.

    Args:
        model: a GPTModel, or another one.
        edits: by name of the site; functions are given tensors.
        cfg: what it is, unless it is a GPTModel.
        points: where the sites are in it, unless it is one.

    Raises:
        InputError: an edit that makes no sense: at once, or in the forward pass if it depends on the length of the text.
    """
    if hasattr(model, "_orig_mod") or model._compiled_call_impl is not None:
        raise InputError("the model is compiled by torch, which may pass over hooks: edit the one that was compiled, and call that")
    cfg = model.cfg if cfg is None else cfg
    reading: dict[str, Any] = {}  # the pass that is going on: its edits, and the positions of the tokens that it reads

    def begin(model: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        cached, tokens_BT = given.get("use_cache", False), next(iter(given.values()))
        first, T = model.n_cached if cached else 0, tokens_BT.shape[1]
        reading["positions"] = torch.arange(first, first + T)
        reading["edits"] = checked_edits(edits, cfg, None if cached else T)

    def edit(name: str, layer: int, site: Site, third: int | None, x: torch.Tensor) -> torch.Tensor:
        parts = [x] if third is None else [*x.tensor_split(3, dim=-1)]
        parts[third or 0] = _edit(reading["edits"][name], name, layer, site, parts[third or 0], cfg, reading["positions"])
        return torch.cat(parts, dim=-1)

    with contextlib.ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for name in sorted(edits):
            for layer, site in enumerate(sites_meant(name, cfg.n_layers)):
                point, third = points[site.name] if points else (site.point, None)
                hooks.callback(_hook(model, point, functools.partial(edit, name, layer, site, third)).remove)
        yield


def _hook(model: nn.Module, point: str, function: Callable[[torch.Tensor], torch.Tensor | None]) -> RemovableHandle:
    """Calls the function with the activation at a point; what it returns, unless that is None, takes its place."""
    path, _, end = point.rpartition(".")
    module = model.get_submodule(path)

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        new = function(args[0])
        return None if new is None else (new, *args[1:])

    def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        new = function(result[-1] if isinstance(result, tuple) else result)
        return (*result[:-1], new) if isinstance(result, tuple) and new is not None else new

    return module.register_forward_pre_hook(before) if end == "input" else module.register_forward_hook(after)


def _edit(edit: Edit, name: str, layer: int, site: Site, x: torch.Tensor, cfg: GPTConfig, positions: torch.Tensor) -> torch.Tensor:
    change = edit.change
    if callable(change):
        own = x.clone()  # which the function may write to
        new = change(own, layer) if "{}" in name else change(own)
    else:
        check_value(name, edit.value, x.shape)
        value = edit.value if isinstance(edit.value, torch.Tensor) else np.array(edit.value, np.float64)
        new = _CHANGES[change](x, torch.as_tensor(value, dtype=x.dtype, device=x.device))
    check_result(name, x, new)
    chosen = _chosen(edit, site, cfg, positions)
    return new if chosen is None else torch.where(chosen.to(x.device), new, x)


def _chosen(edit: Edit, site: Site, cfg: GPTConfig, positions: torch.Tensor) -> torch.Tensor | None:
    """Which elements are edited, to be broadcast to the activation; None: all."""
    chosen = None
    if edit.positions is not None:
        chosen = torch.isin(positions, torch.as_tensor(edit.positions))[:, None]  # (T, 1)
    if edit.heads is not None:
        hit_N = torch.isin(torch.arange(cfg.n_heads), torch.as_tensor(edit.heads))
        hit = hit_N[:, None, None] if "N" in site.axes else hit_N.repeat_interleave(cfg.emb_dim // cfg.n_heads)
        chosen = hit if chosen is None else chosen & hit
    return chosen


_CHANGES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "replace": lambda x, value: value.expand_as(x),
    "add": lambda x, value: x + value,
    "scale": lambda x, value: x * value,
}
