"""Which mesh, which way to gather and how many microbatches: what fits, and of that what sends least or takes least time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from flaxgpt.config import TrainConfig
from flaxgpt.errors import InputError
from flaxgpt.plan.plan import Plan, TooLargeError, make_plan, plan_mesh, state_bytes
from flaxgpt.plan.targets import Target
from flaxgpt.sharding import check_batch


def settle(cfg: TrainConfig, target: Target) -> TrainConfig:
    """The run with what it leaves open (`auto`) found for these devices; nothing is compiled if nothing is open.

    Raises:
        InputError: nothing that was tried fits.
    """
    if cfg.gather == "auto" and cfg.fsdp == 1:
        cfg = cfg.replace(gather="layer")  # there is nothing to gather
    if "auto" not in (cfg.gather, cfg.grad_accum_steps):
        return cfg
    try:
        best = options(cfg, target)[0]
        if not best.fits:
            raise TooLargeError(f"it needs {best.peak_bytes / 2**30:.2f} GiB of the {target.memory / 2**30:.2f} GiB of each device")
    except TooLargeError as error:
        raise InputError(f"{error}; raise grad_accum_steps or fsdp, or lower context_length (flaxgpt-plan finds what fits)") from None
    return cfg.replace(gather=best.gather, grad_accum_steps=best.grad_accum_steps)


def options(cfg: TrainConfig, target: Target) -> list[Plan]:
    """A plan for each way to gather that the run leaves open, with the fewest microbatches that fit if those are open too.

    What fits comes first, and of that what sends the least; nothing else decides what `auto` becomes.

    Raises:
        TooLargeError: there is none, since the compiler refused, or no number of microbatches fits.
    """
    plans, refused = [], None
    for gather in ways_to_gather(cfg):
        run = cfg.replace(gather=gather)
        try:
            plans.append(make_plan(run, target) if run.grad_accum_steps != "auto" else fewest_microbatches(run, target))
        except TooLargeError as error:
            refused = error
    if found := [plan for plan in plans if plan]:
        return sorted(found, key=lambda plan: (not plan.fits, plan.wire_bytes))
    raise refused or TooLargeError(
        f"grad_accum_steps=auto: not even the smallest microbatch fits in the {target.memory / 2**30:.2f} GiB of each device"
    )


def ways_to_gather(cfg: TrainConfig) -> tuple[Literal["layer", "update"], ...]:
    """What the run's `gather` can be."""
    if cfg.gather != "auto":
        return (cfg.gather,)
    return ("update", "layer") if cfg.fsdp > 1 else ("layer",)


def fitting(cfg: TrainConfig, target: Target) -> Plan | None:
    """The plan, if it fits. Where parameters and moments alone are too large, nothing is compiled."""
    if sum(state_bytes(cfg, plan_mesh(cfg, target))) > target.memory:
        return None
    try:
        plan = make_plan(cfg, target)
    except TooLargeError:
        return None
    return plan if plan.fits else None


def fewest_microbatches(cfg: TrainConfig, target: Target, more_than: float = 0) -> Plan | None:
    """The plan with the fewest microbatches (but more than so many) that fits, found by halving: more are smaller, and hold less.

    Raises:
        InputError: no number of microbatches splits the batch evenly over the mesh.
    """
    mesh = plan_mesh(cfg, target)
    check_batch(cfg.replace(grad_accum_steps=1), mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    steps = [n for n in _divisors(cfg.batch_size // shards) if n > more_than]
    found, low, high, trial = None, 0, len(steps) - 1, 0  # the fewest first: often enough they fit
    while low <= high:
        if plan := fitting(cfg.replace(grad_accum_steps=steps[trial]), target):
            found, high = plan, trial - 1
        else:
            low = trial + 1
        trial = (low + high) // 2
    return found


def smallest_that_fits(cfg: TrainConfig, target: Target) -> Plan | None:
    """Of a run that does not fit, the first of these that does, each with the fewest microbatches: its own mesh with more microbatches,
    that with weights gathered layer by layer, and parameters split over more devices, layer by layer. None if none does.
    """
    tried = math.inf if cfg.grad_accum_steps == "auto" else cfg.grad_accum_steps
    runs = {cfg.replace(gather=gather): tried for gather in ways_to_gather(cfg)}
    runs.setdefault(cfg.replace(gather="layer"), 0)
    for fsdp, tensor in meshes_of(cfg, target):
        even = cfg.batch_size * tensor % len(target.devices) == 0  # all devices but those of a tensor group share the rows
        if fsdp * tensor > cfg.fsdp * cfg.tensor and even:
            runs[cfg.replace(fsdp=fsdp, tensor=tensor, gather="layer")] = 0
    return next(filter(None, (fewest_microbatches(run, target, more_than) for run, more_than in runs.items())), None)


def try_meshes(cfg: TrainConfig, target: Target) -> Iterator[tuple[TrainConfig, Plan | str]]:
    """Each mesh of the target, each way to gather on it, and there the plan with the fewest microbatches that fits, or why not."""
    for fsdp, tensor in meshes_of(cfg, target):
        run = cfg.replace(fsdp=fsdp, tensor=tensor)
        for gather in ways_to_gather(run):
            run = run.replace(gather=gather)
            try:
                found = fewest_microbatches(run, target) or "does not fit with any number of microbatches"
            except InputError as error:
                found = str(error)
            yield run, found


def rank(plans: list[Plan]) -> list[Plan]:
    """The best first: the least time if nothing overlaps, or the least traffic where the chip's figures are not known."""
    return sorted(plans, key=lambda plan: plan.seconds.apart if plan.seconds else plan.wire_bytes)


def meshes_of(cfg: TrainConfig, target: Target) -> list[tuple[int, int]]:
    """Every (fsdp, tensor) that divides the devices, the width, the heads and the vocabulary; fewest parts first, and then fsdp."""
    n, model = len(target.devices), cfg.model
    sizes = _divisors(n)
    splits = [i for i in sizes if model.n_heads % i == 0 and model.padded_vocab % i == 0]
    meshes = [(fsdp, tensor) for fsdp in sizes for tensor in splits if n % (fsdp * tensor) == 0 and model.emb_dim % fsdp == 0]
    return sorted(meshes, key=lambda mesh: (math.prod(mesh), mesh[1]))


def left_out(cfg: TrainConfig, target: Target) -> str:
    """Sizes of the tensor axis that `meshes_of` leaves out, why, and the flag that would allow them; "" if there are none."""
    model, sizes = cfg.model, _divisors(len(target.devices))
    heads = [i for i in sizes if model.n_heads % i]
    vocabulary = [i for i in sizes if i not in heads and model.padded_vocab % i]
    said = []
    if vocabulary:
        flag = f"--vocab-multiple {math.lcm(model.vocab_multiple, *vocabulary)}"
        said.append(
            f"tensor {', '.join(map(str, vocabulary))} (does not divide the vocabulary of {model.padded_vocab}; {flag} would allow it)"
        )
    if heads:
        said.append(f"tensor {', '.join(map(str, heads))} (does not divide the {model.n_heads} heads)")
    return f"left out: {'; '.join(said)}" if said else ""


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]
