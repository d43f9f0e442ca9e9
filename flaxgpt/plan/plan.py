"""The step that training would jit, compiled for a target, and what can be read off it: memory, traffic, arithmetic, bounds in time.

plan = make_plan(cfg, find_target("tpu:v5e:4x4"))
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flaxgpt.config import TrainConfig
from flaxgpt.errors import InputError
from flaxgpt.kernels import choose_attention, choose_loss_chunk
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
        what: weights, gradients, weights or gradients, activations, tokens or numbers (fewer than one for each token); see `what_moves`.
        dtype: of what is moved.
        place: layer loop, loss loop, microbatch loop, another loop, or outside all loops.
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
        memory: parameters and moments read and written once, and the weights (a device's part of the tensor axis) read forward and backward
            in each microbatch.
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
        gather: layer or update.
        batch_size: rows in an update.
        grad_accum_steps: microbatches in an update.
        rows: that a device computes at once.
        attention: plain, cudnn or splash, and in parentheses why.
        loss_chunk: positions of each row whose logits are held at a time; all, or a part.
        doubts: where the program does not have what was chosen, or could not be read.
        params_bytes: float32 parameters.
        moments_bytes: AdamW's two.
        arguments_bytes: all that goes in (state and batch), as the compiler lays it out: padded on a TPU.
        temporaries_bytes: activations, gradients, gathered weights and so on.
        peak_bytes: the most that is held at once (see `peak_bytes`).
        memory_bytes: what a program may use.
        traffic: the collectives, the largest first.
        model_flops: of an update, by the model's shapes: forward and twice that backward, masked scores left out.
        program_flops: what the program does: also what it computes again, and masked scores where it computes them.
        seconds: bounds in time, where the chip's figures are known.
        hosts: machines that the devices are attached to; training on more than one is not supported yet.
        compile_seconds: how long compiling took.
        hlo: the compiled program's text.
    """

    target: str
    device: str
    mesh: dict[str, int]
    gather: Literal["layer", "update"]
    batch_size: int
    grad_accum_steps: int
    rows: int
    attention: str
    loss_chunk: int
    doubts: tuple[str, ...]
    params_bytes: int
    moments_bytes: int
    arguments_bytes: int
    temporaries_bytes: int
    peak_bytes: int
    memory_bytes: int
    traffic: tuple[Traffic, ...]
    model_flops: float
    program_flops: float
    seconds: Seconds | None
    hosts: int
    compile_seconds: float
    hlo: str = field(repr=False)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the device's memory."""
        return self.peak_bytes <= self.memory_bytes

    @property
    def wire_bytes(self) -> float:
        """What a device sends in an update."""
        return sum(row.wire_bytes for row in self.traffic)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, with what follows from them, for `json.dumps`; the program's text is left out."""
        values = dataclasses.asdict(self) | {"fits": self.fits, "wire_bytes": self.wire_bytes}
        del values["hlo"]
        if self.seconds:
            values["seconds"] |= {"bound": self.seconds.bound, "apart": self.seconds.apart}
        return values


class TooLargeError(InputError):
    """The compiler refused a program that does not fit, as a TPU's does."""


def make_plan(cfg: TrainConfig, target: Target) -> Plan:
    """Compile the step of a run for a target, and read the result.

    Args:
        cfg: the run, settled (see `settle`).
        target: as `find_target` returns it.

    Returns:
        The plan, which may not fit (`plan.fits`).

    Raises:
        TooLargeError: the compiler itself found that it does not fit.
        InputError: the mesh does not suit the devices, or they can't compute the attention that is asked for.
    """
    mesh, started = plan_mesh(cfg, target), time.perf_counter()
    attention = choose_attention(cfg.model, cfg.model.context_length, _platform(mesh), dropout=cfg.model.drop_rate > 0)
    chunk = loss_chunk(cfg, mesh)
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
    return Plan(
        target=target.name,
        device=target.devices[0].device_kind,
        mesh=dict(mesh.shape),
        gather=cfg.gather,
        batch_size=cfg.batch_size,
        grad_accum_steps=cfg.grad_accum_steps,
        rows=rows_at_once(cfg, mesh),
        attention=f"{attention.implementation} ({attention.reason})",
        loss_chunk=chunk,
        doubts=tuple(doubts(program, cfg, mesh, attention.implementation, chunk)),
        params_bytes=params,
        moments_bytes=moments,
        arguments_bytes=memory.argument_size_in_bytes,
        temporaries_bytes=memory.temp_size_in_bytes,
        peak_bytes=peak_bytes(memory, target.devices[0].platform),
        memory_bytes=target.memory,
        traffic=traffic_of(program, cfg, mesh),
        model_flops=model_flops(cfg),
        program_flops=sum(program.flops.values()) * mesh.size,
        seconds=bounds(cfg, program, target.chip, params + moments) if target.chip else None,
        hosts=target.hosts,
        compile_seconds=seconds,
        hlo=text,
    )


def peak_bytes(memory: Any, platform: str) -> int:
    """What a program holds at most, itself included.

    A TPU's compiler says. Its temporaries are not all held at once: a program that has 20.2 GiB of arguments and temporaries was compiled
    for a chip of 15.75, with a peak of 14.8. On other devices temporaries are one allocation.
    """
    if platform == "tpu":
        return memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes  # that are not written over arguments
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + results + memory.generated_code_size_in_bytes


def plan_mesh(cfg: TrainConfig, target: Target) -> Mesh:
    """The target's devices as the run would arrange them."""
    return make_mesh(cfg.fsdp, cfg.tensor, target.devices)


def lower_step(cfg: TrainConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The step as `train` jits it, traced with shapes in place of a state and a batch."""
    check_batch(cfg, mesh)
    cfg.check_vocabulary()
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


def loss_chunk(cfg: TrainConfig, mesh: Mesh) -> int:
    """Positions of each row whose logits are held at a time, as `flaxgpt.loss` chooses."""
    return choose_loss_chunk(cfg.model, rows_at_once(cfg, mesh), cfg.model.context_length)


def doubts(program: Program, cfg: TrainConfig, mesh: Mesh, attention: str, chunk: int) -> Iterator[str]:
    """Where the program differs from what was chosen, or could not be read with certainty."""
    if (found := attention_of(program)) != attention:
        yield f"{attention} attention was chosen, and the program has {found}"
    logits = rows_at_once(cfg, mesh) * chunk * cfg.model.padded_vocab // mesh.shape["tensor"]
    if logits not in {product.size for product in program.products}:
        yield f"the loss was to hold the logits of {chunk} positions of each row, and the program has no such product"
    if program.uncounted:
        yield f"the turns of {len(program.uncounted)} loops could not be read; what is in them is counted once"
    sizes = weight_sizes(cfg, mesh)
    both = sizes & activation_sizes(cfg, mesh)
    named = [sizes.intersection(c.gathered) for c in program.collectives if what_moves(c, cfg, mesh, sizes) in PARAMETERS]
    if unsure := [found for found in named if found and found <= both]:
        same = ", ".join(f"{size:,}" for size in sorted(set().union(*unsure)))
        yield f"{len(unsure)} collectives of weights or gradients may be of activations: arrays of {same} elements can be either"


def attention_of(program: Program) -> str:
    """Which attention is in the program: cudnn, splash, or none of the kernels."""
    if any(target.startswith("__cudnn$fmha") for target in program.kernels):
        return "cudnn"
    return "splash" if any("splash" in product.name for product in program.products) else "plain"


def traffic_of(program: Program, cfg: TrainConfig, mesh: Mesh) -> tuple[Traffic, ...]:
    """The program's collectives, those that are alike added up, the largest first."""
    times: Counter[tuple[str, str, str, str, int]] = Counter()
    wire: Counter[tuple[str, str, str, str, int]] = Counter()
    sizes = weight_sizes(cfg, mesh)
    for c in program.collectives:
        key = (c.kind, what_moves(c, cfg, mesh, sizes), c.dtype, place(c.loops, cfg, mesh), c.group)
        times[key] += c.times
        wire[key] += c.wire_bytes * c.times
    return tuple(Traffic(*key, times[key], sent) for key, sent in wire.most_common())


def place(loops: tuple[int, ...], cfg: TrainConfig, mesh: Mesh) -> str:
    """Which loop a thing stands in, by how often the loops around it turn: microbatches outside, layers or chunks of the loss within."""
    if not loops:
        return "outside"
    within = loops[1:] if cfg.grad_accum_steps > 1 and loops[0] == cfg.grad_accum_steps else loops
    if not within:
        return "microbatch loop"
    chunks = -(-cfg.model.context_length // loss_chunk(cfg, mesh))
    return {chunks: "loss loop", cfg.model.n_layers: "layer loop"}.get(within[0], "another loop")


def what_moves(collective: Collective, cfg: TrainConfig, mesh: Mesh, sizes: set[int]) -> str:
    """What a collective moves, by how many elements its arrays have once they are whole: those of a parameter are weights (gathered) or
    gradients (added up). Of the permutes in which a TPU does either it can't be told which.

    An array of another size is tokens if it holds integers or booleans, numbers if it has fewer than one element for each token on a
    device, and activations otherwise. Where a parameter and an activation have the same size, `doubts` says so.
    """
    weights, gradients, either = PARAMETERS
    if collective.kind == "collective-permute" and all(
        math.prod(dims) in sizes or _is_strip(dims, cfg, mesh) for _, dims in collective.arrays
    ):
        return either
    arrays = [(dtype, size) for (dtype, _), size in zip(collective.arrays, collective.gathered, strict=True)]
    other = [(dtype, size) for dtype, size in arrays if "f" not in dtype or size not in sizes]  # all floating dtypes have an f, no other
    large = [dtype for dtype, size in other if size >= rows_at_once(cfg, mesh) * cfg.model.context_length]
    if large:
        return "activations" if any("f" in dtype for dtype in large) else "tokens"
    if len(other) == len(arrays):
        return "numbers"
    return gradients if "reduce" in collective.kind else weights


PARAMETERS = ("weights", "gradients", "weights or gradients")


def activation_sizes(cfg: TrainConfig, mesh: Mesh) -> set[int]:
    """Elements of what a device can hold for its tokens, those of a chunk of the loss or all: a number, the width, the feed-forward units
    or the logits of each, whole or split over the tensor axis.
    """
    rows, model = rows_at_once(cfg, mesh), cfg.model
    widths = (model.emb_dim, 4 * model.emb_dim, model.padded_vocab)
    each = {1, *widths, *(width // cfg.tensor for width in widths)}
    return {rows * positions * n for positions in (model.context_length, loss_chunk(cfg, mesh)) for n in each}


def weight_sizes(cfg: TrainConfig, mesh: Mesh) -> set[int]:
    """Elements of each parameter, of one layer of it, and of the parts of both that devices hold."""
    axes = tuple(mesh.shape.values())
    splits = {math.prod(some) for n in range(len(axes) + 1) for some in itertools.combinations(axes, n)}
    return {size // n for size in map(math.prod, _weight_shapes(cfg)) for n in splits if size % n == 0}


def _weight_shapes(cfg: TrainConfig) -> set[tuple[int, ...]]:
    """Of each parameter, and of one layer of it."""
    params = abstract_state(cfg, make_optimizer(cfg)).params
    return {leaf.shape for leaf in jax.tree.leaves(params)} | {leaf.shape[1:] for leaf in jax.tree.leaves(params["trf_blocks"])}


def _is_strip(dims: tuple[int, ...], cfg: TrainConfig, mesh: Mesh) -> bool:
    """Whether an array is less than a device's part of a matrix of parameters, of its full width: a TPU scatters in parts of whole
    tiles, of which it then hands the edges on.
    """
    held = Counter(n for n in dims if n > 1)
    for shape in _weight_shapes(cfg):
        shorter, longer = held - Counter(shape), Counter(shape) - held
        if len(shape) == 2 and shorter.total() == longer.total() == 1 and min(shorter) < min(longer) // mesh.size:
            return True
    return False


def bounds(cfg: TrainConfig, program: Program, chip: Chip, held_bytes: int) -> Seconds:
    """Lower bounds in time from a chip's published peaks."""
    read = 2 * cfg.grad_accum_steps * jnp.dtype(cfg.model.dtype).itemsize * _multiplying_weights(cfg) / cfg.tensor
    return Seconds(
        arithmetic=sum(flops / chip.flops.get(dtype, max(chip.flops.values())) for dtype, flops in program.flops.items()),
        memory=(2 * held_bytes + read) / chip.bandwidth,
        interconnect=program.wire_bytes / chip.link,
    )


def _multiplying_weights(cfg: TrainConfig) -> int:
    return 12 * cfg.model.n_layers * cfg.model.emb_dim**2 + cfg.model.emb_dim * cfg.model.padded_vocab


def _platform(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform
