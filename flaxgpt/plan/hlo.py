"""What a compiled program does, read from its text: collectives and products, and how often an execution comes to each."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Collective:
    """One instruction that moves data between devices.

    Attributes:
        kind: all-gather, reduce-scatter, all-reduce, all-to-all or collective-permute.
        arrays: what a device hands in, (dtype, dimensions) each; padding and changes of shape just before are undone.
        wire_bytes: what each device sends when it happens once. Of n devices and S bytes, the smaller and the larger end:
            all-gather to S and reduce-scatter of S are S (n - 1) / n, all-reduce is twice that, all-to-all once.
        group: n, the devices that take part together.
        loops: how often the loops around it run, the outermost first; none for what happens once.
        origin: the operation in the source that it was made for.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    wire_bytes: float
    group: int
    loops: tuple[int, ...]
    origin: str

    @property
    def times(self) -> int:
        """How often one execution of the program comes to it."""
        return math.prod(self.loops)

    @property
    def dtype(self) -> str:
        """Of the largest array."""
        return max(self.arrays, key=lambda array: _bytes(*array))[0]

    @property
    def gathered(self) -> tuple[int, ...]:
        """Elements of each array once it is whole on a device: n times what is handed in for an all-gather, else that."""
        return tuple(math.prod(dims) * (self.group if self.kind == "all-gather" else 1) for _, dims in self.arrays)


@dataclass(frozen=True)
class Product:
    """A matrix product, or a kernel that makes several: the dtype of what is multiplied, operations (a multiplication and an
    addition are two) when it happens once, the elements of its result, and the loops around it.
    """

    name: str
    dtype: str
    size: int
    flops: float
    loops: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """What one execution does on each device.

    Attributes:
        collectives: in the order of the text.
        products: likewise.
        kernels: the targets of its custom calls.
        uncounted: loops whose number of turns could not be read; what is in them is counted once.
    """

    collectives: tuple[Collective, ...]
    products: tuple[Product, ...]
    kernels: frozenset[str]
    uncounted: tuple[str, ...]

    @property
    def flops(self) -> dict[str, float]:
        """Dtype -> operations in products."""
        totals: dict[str, float] = {}
        for product in self.products:
            totals[product.dtype] = totals.get(product.dtype, 0) + product.flops * math.prod(product.loops)
        return totals

    @property
    def wire_bytes(self) -> float:
        """What each device sends."""
        return sum(c.wire_bytes * c.times for c in self.collectives)


def read_program(text: str) -> Program:
    """Read `compiled.as_text()` as XLA writes it for CPU, GPU and TPU (checked with JAX 0.10.2).

    Loops are followed by their count, nested ones multiplied; fusions and calls are followed into the computation they call. Of a
    conditional's branches the one with most products (then most traffic) is counted. An asynchronous collective counts where it
    starts.
    """
    computations, entry = _parse(text)
    partitions = re.search(r"num_partitions=(\d+)", text.split("\n", 1)[0])
    reader = _Reader(computations, int(partitions[1]) if partitions else 1)
    found = list(reader.read(entry, ()))
    return Program(
        tuple(x for x in found if isinstance(x, Collective)),
        tuple(x for x in found if isinstance(x, Product)),
        frozenset(target for c in computations.values() for i in c.values() if (target := i.attribute("custom_call_target"))),
        tuple(reader.uncounted),
    )


KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast")

Array = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    literal: str  # what stands between the parentheses, for constants and parameters
    attributes: str
    root: bool

    @property
    def arrays(self) -> tuple[Array, ...]:
        return tuple((dtype, tuple(map(int, filter(None, dims.split(","))))) for dtype, dims in _ARRAY.findall(self.type))

    def attribute(self, name: str) -> str:
        """Its text after `name=`, without quotes or braces; "" if there is none."""
        found = re.search(rf'[ ,{{]{name}=(?:"([^"]*)"|\{{([^}}]*)\}}|%?([^\s,}}]+))', f" {self.attributes}")
        return next(filter(None, found.groups()), "") if found else ""


_Computation = dict[str, _Instruction]
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.$-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.$-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")
_CONTINUED = re.compile(r'\n(?="|\}\})')  # a TPU kernel's metadata has line breaks


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """The computations by name, and the name of the one that is executed."""
    computations: dict[str, _Computation] = {}
    entry = ""
    for line in _CONTINUED.sub(" ", text).splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.startswith(" ") and " = " in line:
            instruction = _parse_instruction(line.strip())
            current[instruction.name] = instruction
    return computations, entry


def _parse_instruction(line: str) -> _Instruction:
    left, right = _COMMENT.sub("", line).split(" = ", 1)
    kind, rest = _until_balanced(right) if right.startswith("(") else right.split(" ", 1)
    opcode, rest = rest.strip().split("(", 1)
    inside, attributes = _until_balanced("(" + rest)
    name = left.removeprefix("ROOT ").lstrip("%")
    return _Instruction(name, kind, opcode, tuple(_NAME.findall(inside)), inside[1:-1], attributes, left.startswith("ROOT "))


def _until_balanced(text: str) -> tuple[str, str]:
    """Text that begins with a parenthesis, split after the one that closes it."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return text[: found.end()], text[found.end() :]
    raise ValueError(f"parentheses do not match: {text[:200]}")


class _Reader:
    def __init__(self, computations: dict[str, _Computation], devices: int) -> None:
        self.computations, self.devices = computations, devices
        self.uncounted: list[str] = []

    def read(self, name: str, loops: tuple[int, ...]) -> Iterator[Collective | Product]:
        """What a computation does, with these loops around it."""
        computation = self.computations[name]
        # A TPU's asynchronous collective appears in each fusion that it runs beside; one of them starts it.
        starts = any(i.attribute("custom_call_target") == "AsyncCollectiveStart" for i in computation.values())
        for instruction in computation.values():
            opcode = instruction.opcode.removesuffix("-start")
            if opcode.endswith(("-done", "-update")):
                continue
            if opcode == "while":
                turns = self.turns(computation, instruction)
                yield from self.read(instruction.attribute("body"), (*loops, turns))
            elif opcode == "conditional":
                branches = _NAME.findall(instruction.attribute("branch_computations")) or [
                    instruction.attribute(f"{truth}_computation") for truth in ("true", "false")
                ]
                yield from max((list(self.read(branch, loops)) for branch in branches), key=_cost)
            elif opcode in KINDS:
                if starts or not instruction.attribute("chain_id"):
                    scatters = name.startswith("all-reduce-scatter")  # a TPU's, as an all-reduce of which a slice is kept
                    yield self.collective(computation, instruction, "reduce-scatter" if scatters else opcode, loops)
            elif flops := _flops(computation, instruction):
                dtypes = (dtype for operand in instruction.operands for dtype, _ in computation[operand].arrays)
                size = math.prod(instruction.arrays[0][1])
                yield Product(instruction.name, next(d for d in dtypes if "f" in d), size, flops, loops)
            elif called := instruction.attribute("calls") or (opcode == "call" and instruction.attribute("to_apply")):
                yield from self.read(called, loops)

    def turns(self, computation: _Computation, loop: _Instruction) -> int:
        """How often a loop runs: as XLA has noted it, else from a condition that compares a counter with a constant."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition, body = (self.computations[loop.attribute(part)] for part in ("condition", "body"))
        compare = next(i for i in condition.values() if i.root)
        initial = _source(computation, loop.operands[0])
        if compare.opcode == "compare" and compare.attribute("direction") == "LT" and initial.opcode == "tuple":
            counter, limit = (_source(condition, operand) for operand in compare.operands)
            if counter.opcode == "get-tuple-element":
                index = int(counter.attribute("index"))
                first, step = _integer(_source(computation, initial.operands[index])), self.step(body, index)
                if limit.opcode == "get-tuple-element" and self.carried(body, int(limit.attribute("index"))):
                    limit = _source(computation, initial.operands[int(limit.attribute("index"))])
                last = _integer(limit)
                if first is not None and last is not None and step:
                    return math.ceil((last - first) / step)
        self.uncounted.append(loop.name)
        return 1

    def carried(self, body: _Computation, index: int) -> bool:
        """Whether a turn leaves this element of the loop's tuple as it is."""
        root = next(i for i in body.values() if i.root)
        source = _source(body, root.operands[index]) if root.opcode == "tuple" else root
        return source.opcode == "get-tuple-element" and int(source.attribute("index")) == index

    def step(self, body: _Computation, index: int) -> int | None:
        """What a turn adds to the counter, the element `index` of the loop's tuple."""
        root = next(i for i in body.values() if i.root)
        added = _source(body, root.operands[index]) if root.opcode == "tuple" else root
        if added.opcode == "fusion":
            inner = self.computations[added.attribute("calls")]
            added, body = next(i for i in inner.values() if i.root), inner
        constants = [_integer(_source(body, operand)) for operand in added.operands] if added.opcode == "add" else []
        return next(filter(None, constants), None)

    def collective(self, computation: _Computation, instruction: _Instruction, kind: str, loops: tuple[int, ...]) -> Collective:
        operands = [computation[name] for name in instruction.operands]
        handed_in = sum(_bytes(*array) for operand in operands for array in operand.arrays)
        n = _group_size(instruction.attributes, self.devices)
        share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1, "collective-broadcast": 1}
        origin = instruction.attribute("op_name")
        arrays = tuple(array for name in instruction.operands for array in self.parts(computation, name))
        return Collective(kind, arrays, handed_in * share.get(kind, (n - 1) / n), n, loops, origin)

    def parts(self, computation: _Computation, name: str) -> tuple[Array, ...]:
        """The arrays that a value is made of, before they were reshaped and put end to end."""
        source = _source(computation, name, _RESHAPES)
        if source.opcode == "fusion":
            inner = self.computations[source.attribute("calls")]
            root = next(i for i in inner.values() if i.root)
            return self.parts(inner, root.name) if root.opcode == "concatenate" else source.arrays
        if source.opcode == "concatenate":
            return tuple(array for operand in source.operands for array in self.parts(computation, operand))
        return source.arrays


_MOVES = ("copy", "bitcast", "convert", "copy-done", "copy-start")
_RESHAPES = ("copy", "bitcast", "pad", "reshape", "transpose")


def _source(computation: _Computation, name: str, through: tuple[str, ...] = _MOVES) -> _Instruction:
    """The instruction whose value this is, but for such changes."""
    instruction = computation[name]
    while instruction.opcode in through:
        instruction = computation[instruction.operands[0]]
    return instruction


def _integer(instruction: _Instruction) -> int | None:
    return int(instruction.literal) if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.literal) else None


def _group_size(attributes: str, devices: int) -> int:
    """How many devices take part together, of any of the ways to write it.

    {{0,1},{2,3}} names them, [4,2]<=[8] is 4 groups of 2, mesh['a'=4,'b'=2], device_ids=(...) {'b'} is the size of the axes in braces, of
    which 'a':(2)2 is a part of size 2. Pairs of a collective-permute make rings.
    """
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=\w*mesh\S*?\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'?(\w+)'?=(\d+)", found[1]))
        return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'?([A-Za-z_]\w*)'?(?::\(\d+\)(\d+))?", found[2]))
    if found := re.search(r"source_target_pairs=\{([\d,{}]*)\}", attributes):
        targets = dict(re.findall(r"(\d+),(\d+)", found[1]))
        ring = [next(iter(targets))]
        while (target := targets.get(ring[-1], ring[0])) not in ring:
            ring.append(target)
        return len(ring)
    return devices


def _flops(computation: _Computation, instruction: _Instruction) -> float:
    """Operations of an instruction that multiplies matrices, and 0 for any other."""
    operands = [computation[name].arrays for name in instruction.operands]
    if instruction.opcode == "dot":
        contracted = math.prod(operands[0][0][1][int(i)] for i in filter(None, instruction.attribute("lhs_contracting_dims").split(",")))
        return 2 * math.prod(instruction.arrays[0][1]) * contracted
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, operands[0][0][1], operands[1][0][1])
    target = instruction.attribute("custom_call_target")
    if target.startswith(("__cublas$gemm", "__cublas$lt$matmul")):
        contracted = re.search(r'"lhs_contracting_dimensions":\["(\d+)"', instruction.attributes)
        return 2 * math.prod(instruction.arrays[0][1]) * operands[0][0][1][int(contracted[1])] if contracted else 0
    products = next((n for name, n in _ATTENTION.items() if name in (target + instruction.attribute("op_name"))), 0)
    if target.startswith(("__cudnn$fmha", "tpu_custom_call")) and products:
        q, k = [dims for (dtype, dims), *_ in operands if len(dims) >= 3 and "f" in dtype][:2]
        T, S = (q[1], k[1]) if target.startswith("__cudnn") else (q[-2], k[-2])  # (B, T, N, H) there, (..., N, T, H) here
        return 2 * products * math.prod(q) * S * (T + 1) / (2 * T)
    return 0


# Kernels of attention and how many products each makes; backward, they compute the scores again. All are asked for with a causal mask
# here, and then compute little more than the visible half.
_ATTENTION = {
    "__cudnn$fmhaSoftmaxBackward": 5,
    "__cudnn$fmhaSoftmax": 2,
    "splash_mha_fwd": 2,
    "splash_mha_dkv": 4,  # 5 where it makes dq as well
    "splash_mha_dq": 3,
}


def _convolution_flops(instruction: _Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    """TPUs multiply matrices as convolutions, with a batch as a dilated window: only positions within the input count."""
    dims_in, rest = instruction.attribute("dim_labels").split("_")
    dims_kernel, dims_out = rest.split("->")
    window = dict(re.findall(r"(\w+)=(\S+)", instruction.attribute("window")))
    out = dict(zip(dims_out, instruction.arrays[0][1], strict=True))
    size_in, kernel = dict(zip(dims_in, lhs, strict=True)), dict(zip(dims_kernel, rhs, strict=True))
    valid = 1
    for i, dim in enumerate(sorted(d for d in dims_out if d.isdigit())):
        stride, dilate, kernel_dilate = (int(window[k].split("x")[i]) if k in window else 1 for k in ("stride", "lhs_dilate", "rhs_dilate"))
        low = int(window["pad"].split("x")[i].split("_")[0]) if "pad" in window else 0
        positions = (o * stride - low + k * kernel_dilate for o, k in itertools.product(range(out[dim]), range(kernel[dim])))
        valid *= sum(p % dilate == 0 and 0 <= p // dilate < size_in[dim] for p in positions)
    groups = int(instruction.attribute("batch_group_count") or 1)
    return 2 * size_in["b"] / groups * out["f"] * kernel["i"] * valid


def _cost(found: list[Collective | Product]) -> tuple[float, float]:
    flops = sum(x.flops * math.prod(x.loops) for x in found if isinstance(x, Product))
    return flops, sum(x.wire_bytes * x.times for x in found if isinstance(x, Collective))


def _bytes(dtype: str, dims: tuple[int, ...]) -> float:
    """The size of an array: pred is a byte, and the digits of any other dtype are its bits (f8e4m3fn, s4, bf16)."""
    bits = re.search(r"\d+", dtype)
    return math.prod(dims) * (int(bits[0]) / 8 if bits else float(dtype == "pred"))
