"""The step that training would jit, compiled for a target, and what can be read off it: memory, traffic, arithmetic, bounds in time.

plan, compiled = make_plan(cfg, find_target("tpu:v5e:4x4"))
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flaxgpt.config import TrainConfig
from flaxgpt.errors import InputError
from flaxgpt.optim import adam_state, make_optimizer
from flaxgpt.plan.hlo import Collective, Program, read_program
from flaxgpt.plan.targets import Chip, Target
from flaxgpt.sharding import batch_sharding, check_batch, compute_mesh, make_mesh, state_shardings
from flaxgpt.state import TrainState, abstract_state
from flaxgpt.step import jit_train_step


@dataclass(frozen=True)
class Traffic:
    """Collectives of an update that are alike.

    Attributes:
        kind: all-gather, reduce-scatter, all-reduce, all-to-all or collective-permute.
        what: weights, gradients, activations, tokens or numbers (fewer than one for each token); see `what_moves`.
        dtype: of what is moved.
        place: layer loop, microbatch loop, another loop, or outside all loops.
        group: devices that take part together.
        times: how many there are in an update.
        wire_bytes: what each device sends for them in an update.
    """

    kind: str
    what: str
    dtype: str
    place: str
    group: int
    times: int
    wire_bytes: float


@dataclass(frozen=True)
class Seconds:
    """Lower bounds of the time that an update takes, each as if the chip had nothing else to do and reached its published peak.

    Attributes:
        arithmetic: the program's products.
        memory: parameters and moments read and written once, and the weights read forward and backward in each microbatch.
        interconnect: what a device sends, over all its links at once.
    """

    arithmetic: float
    memory: float
    interconnect: float

    @property
    def bound(self) -> float:
        """The largest: no update can take less."""
        return max(self.arithmetic, self.memory, self.interconnect)

    @property
    def apart(self) -> float:
        """Their sum: what it would take if nothing went on at the same time. By it plans are ranked."""
        return self.arithmetic + self.memory + self.interconnect


@dataclass(frozen=True)
class Plan:
    """One update as it would be run. Bytes are of one device, operations of all of them together.

    Attributes:
        target: the machine's name.
        device: the kind of its devices.
        mesh: axis -> devices along it.
        batch_size: rows in an update.
        grad_accum_steps: microbatches in an update.
        rows: that a device computes at once.
        attention: plain, or the kernel: cuDNN, splash.
        params_bytes: float32 parameters.
        moments_bytes: AdamW's two.
        arguments_bytes: all that goes in (state and batch), as the compiler lays it out: padded on a TPU.
        temporaries_bytes: activations, gradients, gathered weights and so on.
        peak_bytes: arguments, temporaries, results that are not written over arguments, and the program itself.
        memory_bytes: what a program may use.
        traffic: the collectives, the largest first.
        model_flops: of an update, by the model's shapes: forward and twice that backward, masked scores left out.
        program_flops: what the program does: also what it computes again, and masked scores where it computes them.
        uncounted_loops: whose number of turns could not be read: what is in them is counted once.
        seconds: bounds in time, where the chip's figures are known.
        compile_seconds: how long compiling took.
    """

    target: str
    device: str
    mesh: dict[str, int]
    batch_size: int
    grad_accum_steps: int
    rows: int
    attention: str
    params_bytes: int
    moments_bytes: int
    arguments_bytes: int
    temporaries_bytes: int
    peak_bytes: int
    memory_bytes: int
    traffic: tuple[Traffic, ...]
    model_flops: float
    program_flops: float
    uncounted_loops: int
    seconds: Seconds | None
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the peak is within the device's memory."""
        return self.peak_bytes <= self.memory_bytes

    @property
    def wire_bytes(self) -> float:
        """What a device sends in an update."""
        return sum(row.wire_bytes for row in self.traffic)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, with what follows from them, for `json.dumps`."""
        values = dataclasses.asdict(self) | {"fits": self.fits, "wire_bytes": self.wire_bytes}
        if self.seconds:
            values["seconds"] |= {"bound": self.seconds.bound, "apart": self.seconds.apart}
        return values


class TooLargeError(InputError):
    """The compiler refused a program that does not fit, as a TPU's does."""


def make_plan(cfg: TrainConfig, target: Target) -> tuple[Plan, str]:
    """Compile the step of a run for a target, and read the result.

    Args:
        cfg: the run, settled (see `settle`).
        target: as `find_target` returns it.

    Returns:
        The plan, which may not fit (`plan.fits`), and the compiled program's text.

    Raises:
        TooLargeError: the compiler itself found that it does not fit.
        InputError: the mesh does not suit the devices.
    """
    mesh, started = plan_mesh(cfg, target), time.perf_counter()
    try:
        compiled = lower_step(cfg, mesh).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sizes = re.search(r"\(([\d.]+)G\) exceeds .*?\(([\d.]+)G\)|Used ([\d.]+)G of ([\d.]+)G", str(error))
        needed, there = [float(size) for size in sizes.groups() if size] if sizes else (math.nan, math.nan)
        raise TooLargeError(f"it needs {needed} GiB of the {there} GiB of a {target.devices[0].device_kind}") from None
    seconds, text, memory = time.perf_counter() - started, compiled.as_text(), compiled.memory_analysis()
    program = read_program(text)
    params, moments = state_bytes(cfg, mesh)
    plan = Plan(
        target=target.name,
        device=target.devices[0].device_kind,
        mesh=dict(mesh.shape),
        batch_size=cfg.batch_size,
        grad_accum_steps=cfg.grad_accum_steps,
        rows=rows_at_once(cfg, mesh),
        attention=attention_of(program),
        params_bytes=params,
        moments_bytes=moments,
        arguments_bytes=memory.argument_size_in_bytes,
        temporaries_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + (memory.output_size_in_bytes - memory.alias_size_in_bytes)
        + memory.generated_code_size_in_bytes,
        memory_bytes=target.memory,
        traffic=traffic_of(program, cfg, mesh),
        model_flops=model_flops(cfg),
        program_flops=sum(program.flops.values()) * mesh.size,
        uncounted_loops=len(program.uncounted),
        seconds=bounds(cfg, program, target.chip, params + moments) if target.chip else None,
        compile_seconds=seconds,
    )
    return plan, text


def plan_mesh(cfg: TrainConfig, target: Target) -> Mesh:
    """The target's devices as the run would arrange them."""
    return make_mesh(cfg.fsdp, cfg.tensor, target.devices)


def lower_step(cfg: TrainConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The step as `train` jits it, traced with shapes in place of a state and a batch."""
    check_batch(cfg, mesh)
    shape_BT = cfg.batch_size, cfg.model.context_length
    tokens_BT = jax.ShapeDtypeStruct(shape_BT, jnp.int32, sharding=batch_sharding(mesh, cfg.batch_size))
    with jax.set_mesh(compute_mesh(mesh, cfg.gather)):
        return jit_train_step(cfg, make_optimizer(cfg), mesh).lower(_abstract_state(cfg, mesh), (tokens_BT, tokens_BT))


def _abstract_state(cfg: TrainConfig, mesh: Mesh) -> TrainState:
    """Shapes that know where they lie."""
    template = abstract_state(cfg, make_optimizer(cfg))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), template, state_shardings(template, mesh))


def state_bytes(cfg: TrainConfig, mesh: Mesh) -> tuple[int, int]:
    """Bytes of the parameters and of AdamW's two moments on each device."""
    state = _abstract_state(cfg, mesh)
    adam = adam_state(state.opt_state)

    def size(tree: Any) -> int:
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    return size(state.params), size((adam.mu, adam.nu))


def rows_at_once(cfg: TrainConfig, mesh: Mesh) -> int:
    """Rows of a microbatch on each device."""
    return cfg.microbatch_size // (mesh.shape["data"] * mesh.shape["fsdp"])


def model_flops(cfg: TrainConfig) -> float:
    """Operations that an update takes at least: of each weight that multiplies and each pair of positions that sees each other, 2
    forward and 4 backward.
    """
    L, D, V, T = cfg.model.n_layers, cfg.model.emb_dim, cfg.model.vocab_size, cfg.model.context_length
    return 6 * cfg.batch_size * (T * (12 * L * D**2 + D * V) + L * D * T * (T + 1))


def attention_of(program: Program) -> str:
    """Which kernel of attention is in the program."""
    if any(target.startswith("__cudnn$fmha") for target in program.kernels):
        return "cuDNN"
    return "splash" if any("splash" in product.name for product in program.products) else "plain"


def traffic_of(program: Program, cfg: TrainConfig, mesh: Mesh) -> tuple[Traffic, ...]:
    """The program's collectives, those that are alike added up, the largest first."""
    times: Counter[tuple[str, str, str, str, int]] = Counter()
    wire: Counter[tuple[str, str, str, str, int]] = Counter()
    sizes = weight_sizes(cfg, mesh)
    for c in program.collectives:
        key = (c.kind, what_moves(c, cfg, mesh, sizes), c.dtype, place(c.loops, cfg), c.group)
        times[key] += c.times
        wire[key] += c.wire_bytes * c.times
    return tuple(Traffic(*key, times[key], sent) for key, sent in wire.most_common())


def place(loops: tuple[int, ...], cfg: TrainConfig) -> str:
    """Which loop a thing stands in, by how often the loops around it turn: microbatches outside, layers within."""
    if not loops:
        return "outside"
    within = loops[1:] if cfg.grad_accum_steps > 1 and loops[0] == cfg.grad_accum_steps else loops
    if not within:
        return "microbatch loop"
    return "layer loop" if within[0] == cfg.model.n_layers else "another loop"


def what_moves(collective: Collective, cfg: TrainConfig, mesh: Mesh, sizes: set[int]) -> str:
    """What a collective moves, by how many elements its arrays have once they are whole: those of a parameter are weights (gathered) or
    gradients (added up).

    An array of another size is tokens if it holds integers or booleans, numbers if it has fewer than one element for each token on a
    device, and activations otherwise.
    """
    arrays = [(dtype, size) for (dtype, _), size in zip(collective.arrays, collective.gathered, strict=True)]
    other = [(dtype, size) for dtype, size in arrays if "f" not in dtype or size not in sizes]  # all floating dtypes have an f, no other
    large = [dtype for dtype, size in other if size >= rows_at_once(cfg, mesh) * cfg.model.context_length]
    if large:
        return "activations" if any("f" in dtype for dtype in large) else "tokens"
    if len(other) == len(arrays):
        return "numbers"
    return "gradients" if "reduce" in collective.kind else "weights"


def weight_sizes(cfg: TrainConfig, mesh: Mesh) -> set[int]:
    """Elements of each parameter, of one layer of it, and of the parts of both that devices hold."""
    params = abstract_state(cfg, make_optimizer(cfg)).params
    whole = {leaf.size for leaf in jax.tree.leaves(params)} | {
        leaf.size // cfg.model.n_layers for leaf in jax.tree.leaves(params["trf_blocks"])
    }
    splits = {math.prod(axes) for axes in ((), *((n,) for n in mesh.shape.values()), tuple(mesh.shape.values()))}
    return {size // n for size in whole for n in splits if size % n == 0}


def bounds(cfg: TrainConfig, program: Program, chip: Chip, held_bytes: int) -> Seconds:
    """Lower bounds in time from a chip's published peaks."""
    read = 2 * cfg.grad_accum_steps * jnp.dtype(cfg.model.dtype).itemsize * _multiplying_weights(cfg)
    return Seconds(
        arithmetic=sum(flops / chip.flops.get(dtype, max(chip.flops.values())) for dtype, flops in program.flops.items()),
        memory=(2 * held_bytes + read) / chip.bandwidth,
        interconnect=program.wire_bytes / chip.link,
    )


def _multiplying_weights(cfg: TrainConfig) -> int:
    return 12 * cfg.model.n_layers * cfg.model.emb_dim**2 + cfg.model.emb_dim * cfg.model.vocab_size


def settle(cfg: TrainConfig, target: Target) -> TrainConfig:
    """The run with what it leaves open (`auto`) found for these devices; nothing is compiled if nothing is open.

    Raises:
        InputError: no number of microbatches fits.
    """
    if cfg.grad_accum_steps != "auto":
        return cfg
    if plan := fewest_microbatches(cfg, target):
        return cfg.replace(grad_accum_steps=plan.grad_accum_steps)
    raise InputError(
        f"grad_accum_steps=auto: not even the smallest microbatch fits in the {target.memory / 2**30:.2f} GiB of each device; "
        "raise fsdp, or lower context_length"
    )


def fitting(cfg: TrainConfig, target: Target) -> Plan | None:
    """The plan, if it fits. Where parameters and moments alone are too large, nothing is compiled."""
    if sum(state_bytes(cfg, plan_mesh(cfg, target))) > target.memory:
        return None
    try:
        plan, _ = make_plan(cfg, target)
    except TooLargeError:
        return None
    return plan if plan.fits else None


def fewest_microbatches(cfg: TrainConfig, target: Target) -> Plan | None:
    """The plan with the fewest microbatches that fits, found by halving: more microbatches are smaller, and hold less."""
    mesh = plan_mesh(cfg, target)
    divisors = [n for n in range(1, cfg.batch_size + 1) if cfg.batch_size % n == 0]
    steps = [n for n in divisors if cfg.batch_size // n % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0]
    found, low, high, trial = None, 0, len(steps) - 1, 0  # the fewest first: often enough they fit
    while low <= high:
        if plan := fitting(cfg.replace(grad_accum_steps=steps[trial]), target):
            found, high = plan, trial - 1
        else:
            low = trial + 1
        trial = (low + high) // 2
    return found


def smallest_that_fits(cfg: TrainConfig, target: Target) -> Plan | None:
    """Of a run that does not fit: its mesh with another number of microbatches, else parameters split over more devices, or None."""
    meshes = (fsdp for fsdp in meshes_of(cfg, target) if fsdp >= cfg.fsdp)
    return next(filter(None, (fewest_microbatches(cfg.replace(fsdp=fsdp), target) for fsdp in meshes)), None)


def try_meshes(cfg: TrainConfig, target: Target) -> Iterator[tuple[int, Plan | None]]:
    """For each mesh of the target (its fsdp), the plan with the fewest microbatches that fits, or None."""
    for fsdp in meshes_of(cfg, target):
        yield fsdp, fewest_microbatches(cfg.replace(fsdp=fsdp), target)


def rank(plans: list[Plan]) -> list[Plan]:
    """The best first: the least time if nothing overlaps, or the least traffic where the chip's figures are not known."""
    return sorted(plans, key=lambda plan: plan.seconds.apart if plan.seconds else plan.wire_bytes)


def meshes_of(cfg: TrainConfig, target: Target) -> list[int]:
    """Every fsdp that divides the devices and the width."""
    n = len(target.devices)
    return [fsdp for fsdp in range(1, n + 1) if n % fsdp == 0 and cfg.model.emb_dim % fsdp == 0]
