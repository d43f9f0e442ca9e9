"""The state of torch.optim.AdamW <-> moments by the names of the parameters, as NumPy arrays. Imports no framework.

The optimizer's state_dict here is the one of `torch_ref.optim.make_optimizer(model, cfg)`, with NumPy arrays for tensors.
`flaxgpt.state` makes a whole training state of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from flaxgpt.config import TrainConfig
from flaxgpt.convert.layout import shape_faults
from flaxgpt.convert.params import check_finite, parameter_shapes
from flaxgpt.errors import InputError

MOMENTS = ("exp_avg", "exp_avg_sq")
"""torch's names of AdamW's first and second moment."""


def moments_from_torch(optimizer_state: Mapping[str, Any], cfg: TrainConfig) -> tuple[int, dict[str, dict[str, np.ndarray]]]:
    """The number of updates made, and both moments ("exp_avg", "exp_avg_sq") by the names of the parameters.

    Of an optimizer that has made no update yet, the moments are zero.

    Raises:
        InputError: naming every key, shape and option that is not of this config, or a value that is not finite.
    """
    _check_structure(optimizer_state)
    wanted, found = _param_groups(cfg), optimizer_state["param_groups"]
    if [len(group["params"]) for group in found] != [len(group["params"]) for group in wanted]:
        sizes = [[len(group["params"]) for group in groups] for groups in (found, wanted)]
        raise InputError(f"the optimizer's state is of another model or decay: its groups hold {sizes[0]} parameters, expected {sizes[1]}")
    faults = [
        f"{option} is {group.get(option)} in group {i}, {ours[option]} in the config"
        for i, (group, ours) in enumerate(zip(found, wanted, strict=True))
        for option in ("betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")
        if not _same(group.get(option, ours[option]), ours[option])  # older files lack the options that came later
    ]
    names = list(itertools.chain.from_iterable(names for names, _ in _groups(cfg)))
    shapes, state = parameter_shapes(cfg.model), optimizer_state["state"]
    if not state:  # as an optimizer has it before its first update
        state = {i: {"step": 0.0, **{part: np.zeros(shapes[name], np.float32) for part in MOMENTS}} for i, name in enumerate(names)}
    moments = {part: {name: np.asarray(state[i][part]) for i, name in enumerate(names) if part in state.get(i, ())} for part in MOMENTS}
    for part, named in moments.items():
        faults += [f"{part}: {fault}" for fault in shape_faults({name: array.shape for name, array in named.items()}, shapes)]
    steps = {int(entry["step"]) for entry in state.values()}
    if len(steps) > 1:
        faults.append(f"its parameters have made different numbers of updates: {sorted(steps)}")
    if faults:
        raise InputError("the optimizer's state does not fit the config: " + "; ".join(faults))
    for part, named in moments.items():
        check_finite(named, f"the optimizer's moments {part}")
    return steps.pop(), moments


def moments_to_torch(step: int, moments: Mapping[str, Mapping[str, np.ndarray]], cfg: TrainConfig) -> dict[str, Any]:
    """The inverse of `moments_from_torch`: an optimizer's state_dict, which loads into the reference's, strictly.

    The rate in the optimizer's groups is the peak rate: the reference's loop sets that of the schedule before every update.
    """
    names = itertools.chain.from_iterable(names for names, _ in _groups(cfg))
    entries = {i: {"step": np.array(step, np.float32), **{part: moments[part][name] for part in MOMENTS}} for i, name in enumerate(names)}
    return {"state": entries, "param_groups": _param_groups(cfg)}


def options_from_torch(optimizer_state: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of TrainConfig that an optimizer's groups imply.

    Raises:
        InputError: it is not the state of an AdamW as `torch_ref.optim.make_optimizer` makes it.
    """
    _check_structure(optimizer_state)
    groups = optimizer_state["param_groups"]
    (beta1, beta2), first = groups[0]["betas"], groups[0]
    options = {"eps": first["eps"], "weight_decay": first["weight_decay"], "decay": "all" if len(groups) == 1 else "matrices"}
    return {"beta1": beta1, "beta2": beta2, **options}


def _check_structure(optimizer_state: Any) -> None:
    groups = optimizer_state.get("param_groups") if isinstance(optimizer_state, Mapping) else None
    entries = optimizer_state.get("state") if isinstance(optimizer_state, Mapping) else None
    wanted = {"params", "lr", "betas", "eps", "weight_decay"}
    fits = isinstance(groups, list) and len(groups) in (1, 2) and all(isinstance(g, Mapping) and wanted <= set(g) for g in groups)
    if not fits or not isinstance(entries, Mapping) or not all(isinstance(e, Mapping) and "step" in e for e in entries.values()):
        raise InputError("the optimizer's state is not that of an AdamW with one group, or two of which one does not decay")


def _groups(cfg: TrainConfig) -> list[tuple[list[str], float]]:
    """Names and decay of the optimizer's groups, in its order."""
    shapes = parameter_shapes(cfg.model)
    decays = [name for name, shape in shapes.items() if cfg.decay == "all" or len(shape) >= 2]
    rest = [name for name in shapes if name not in decays]
    return [(names, decay) for names, decay in ((decays, cfg.weight_decay), (rest, 0.0)) if names]


def _param_groups(cfg: TrainConfig) -> list[dict[str, Any]]:
    """As torch 2.13 writes them."""
    options = {"lr": cfg.learning_rate, "betas": (cfg.beta1, cfg.beta2), "eps": cfg.eps, "weight_decay": None, "amsgrad": False}
    options |= {"maximize": False, "foreach": None, "capturable": False, "differentiable": False, "fused": None}
    options |= {"decoupled_weight_decay": True}
    numbers, groups = itertools.count(), []
    for names, decay in _groups(cfg):
        groups.append(options | {"weight_decay": decay, "params": [next(numbers) for _ in names]})
    return groups


def _same(a: Any, b: Any) -> bool:
    return tuple(a) == tuple(b) if isinstance(b, tuple) and a is not None else a == b
