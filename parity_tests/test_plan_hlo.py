"""The reader of compiled programs. The texts in data/hlo_*.txt are one small program, compiled with JAX 0.10.2 for eight CPU devices, eight
H100 and a TPU v5e 2x4, without their metadata: a mesh of (a 2, b 4) in shard_map, a loop of 3 around a loop of 5. A turn of the inner
one gathers (64, 128) weights along b, multiplies (8, 256) by (256, 128), scatters the result along b and permutes along a; the outer one
ends in a mean over all. After them come an all-to-all along b and a conditional, one of whose branches multiplies (32, 64) by (64, 32).
"""

from pathlib import Path

import pytest

from flaxgpt.plan.hlo import Program, read_program

DATA = Path(__file__).parent / "data"
PLATFORMS = ("cpu", "gpu", "tpu")
INNER, OUTER = 2 * 8 * 256 * 128, 2 * 32 * 64 * 32


@pytest.fixture(params=PLATFORMS)
def platform(request) -> tuple[str, Program]:
    return request.param, read_program((DATA / f"hlo_{request.param}.txt").read_text(encoding="utf-8"))


def module(*lines: str, before: str = "") -> Program:
    """A program of these instructions, for eight devices."""
    return read_program(
        "HloModule test, num_partitions=8\n\n" + before + "ENTRY %main (p: f32[16,8]) -> f32[16,8] {\n"
        "  %p = f32[16,8]{1,0} parameter(0)\n" + "".join(f"  {line}\n" for line in lines) + "}\n"
    )


def test_loops_are_counted_and_nested_ones_multiplied(platform):
    name, program = platform
    assert not program.uncounted
    placed = {(c.kind, c.loops) for c in program.collectives}
    assert {("collective-permute", (3, 5)), ("all-reduce", (3,)), ("all-to-all", ())} <= placed
    assert ("all-gather", () if name == "cpu" else (3, 5)) in placed, "on a CPU the gather of weights is moved out of the loops"


def test_asynchronous_collectives_are_counted_once(platform):
    assert len(platform[1].collectives) == 5


def test_the_bytes_on_the_wire_are_those_of_each_kind(platform):
    name, program = platform
    weights = 64 * 128 * (2 if name == "tpu" else 4)  # a TPU gathers what it multiplies in bfloat16
    scatter = {"all-reduce": 2} if name == "tpu" else {"reduce-scatter": 1}  # and adds up a small array whole
    kind, times = next(iter(scatter.items()))
    expected = [
        ("all-gather", 4, 3 * weights),
        (kind, 4, times * 8 * 128 * 4 * 3 / 4),
        ("collective-permute", 2, 8 * 256 * 4),
        ("all-reduce", 8, 2 * 8 * 256 * 4 * 7 / 8),
        ("all-to-all", 4, 8 * 256 * 4 * 3 / 4),
    ]
    assert sorted((c.kind, c.group, c.wire_bytes) for c in program.collectives) == sorted(expected)


def test_products_are_counted_through_loops_fusions_and_a_conditional(platform):
    assert sum(platform[1].flops.values()) == 15 * INNER + OUTER


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("{{0,1,2,3,4,5,6,7}}", 8),
        ("{}", 8),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}", 4),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", 4),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", 4),
    ],
)
def test_groups_are_read_in_every_syntax(groups, size):
    program = module(f"ROOT %r = f32[16,8]{{1,0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add")
    [collective] = program.collectives
    assert collective.group == size
    assert collective.wire_bytes == 2 * 16 * 8 * 4 * (size - 1) / size


def test_a_collective_that_runs_beside_fusions_on_a_tpu_counts_where_it_starts():
    started = 'replica_groups=[1,8]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}'
    gather = "%g{0} = f32[128,8]{{1,0}} all-gather(%q{0}), channel_id=1, {1}"
    before = ""
    for number, target in enumerate(("AsyncCollectiveStart", "Other", "AsyncCollectiveDone")):
        before += f"%fused.{number} (q{number}: f32[16,8]) -> f32[128,8] {{\n  %q{number} = f32[16,8]{{1,0}} parameter(0)\n"
        before += f"  {gather.format(number, started)}\n"
        before += f'  ROOT %c{number} = f32[128,8]{{1,0}} custom-call(%g{number}), custom_call_target="{target}"\n}}\n\n'
    fusions = [f"%f{number} = f32[128,8]{{1,0}} fusion(%p), kind=kCustom, calls=%fused.{number}" for number in range(3)]
    assert [c.wire_bytes for c in module(*fusions, before=before).collectives] == [7 * 16 * 8 * 4]


def test_an_all_reduce_of_which_a_tpu_keeps_a_slice_is_a_reduce_scatter():
    before = """%all-reduce-scatter.1 (q: f32[16,8]) -> f32[3,8] {
  %q = f32[16,8]{1,0} parameter(0)
  %zero = f32[] constant(0)
  %pad = f32[24,8]{1,0} pad(%q, %zero), padding=0_8x0_0
  %r = f32[24,8]{1,0} all-reduce(%pad), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %i = u32[] partition-id()
  ROOT %s = f32[3,8]{1,0} dynamic-slice(%r, %i), dynamic_slice_sizes={3,8}
}

"""
    [c] = module("ROOT %f = f32[3,8]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1", before=before).collectives
    assert (c.kind, c.arrays, c.wire_bytes) == ("reduce-scatter", (("f32", (16, 8)),), 24 * 8 * 4 * 7 / 8)


def test_arrays_that_are_put_end_to_end_are_told_apart():
    [c] = module(
        "%p2 = f32[16]{0} parameter(1)",
        "%b = f32[128]{0} reshape(%p)",
        "%c = f32[144]{0} concatenate(%b, %p2), dimensions={0}",
        "ROOT %r = f32[144]{0} all-reduce(%c), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add",
    ).collectives
    assert c.arrays == (("f32", (16, 8)), ("f32", (16,)))


def test_of_several_arrays_bytes_are_added_and_the_dtype_is_the_largest_ones():
    [c] = module(
        "%p2 = bf16[16,8]{1,0} parameter(1)",
        "%r = (f32[16,8]{1,0}, /*index=1*/bf16[16,8]{1,0}) all-reduce(%p, %p2), replica_groups={{0,1}}, to_apply=%add",
    ).collectives
    assert c.wire_bytes == 16 * 8 * (4 + 2)
    assert c.dtype == "f32"


# What a TPU makes of products, with their operands: a batch is a dilated window, of which most positions hold nothing.
CONVOLUTIONS = [
    ("bf16[16,1024,96]", "bf16[96,768,1]", "bf16[16,1024,768]", "window={size=1}, dim_labels=0bf_io0->0bf", 16 * 1024 * 96 * 768),
    ("bf16[16,1024,96]", "bf16[16,1024,768]", "bf16[96,768,1]", "window={size=16}, dim_labels=0fb_0io->bf0", 16 * 1024 * 96 * 768),
    (
        "bf16[16,12,1024,64]",
        "bf16[16,12,1024,64]",
        "f32[16,12,1024,1024]",
        "window={size=16x12 stride=15x11 lhs_dilate=16x12}, dim_labels=01bf_01oi->01bf",
        16 * 12 * 1024 * 1024 * 64,
    ),
    (
        "bf16[16,12,64,1024]",
        "f32[16,12,1024,1024]",
        "bf16[16,12,1024,64]",
        "window={size=16x12 stride=16x12 pad=15_15x11_11 lhs_dilate=15x11 rhs_reversal=1x1}, dim_labels=01bf_01oi->01fb",
        16 * 12 * 1024 * 1024 * 64,
    ),
]


@pytest.mark.parametrize(("left", "right", "out", "attributes", "multiplications"), CONVOLUTIONS)
def test_products_that_a_tpu_writes_as_convolutions_are_counted_as_products(left, right, out, attributes, multiplications):
    program = module(f"%a = {left} parameter(1)", f"%b = {right} parameter(2)", f"%c = {out} convolution(%a, %b), {attributes}")
    assert sum(program.flops.values()) == 2 * multiplications


def test_kernels_of_attention_count_the_visible_half():
    half = 2 * 4 * 12 * 64 * 1024 * 1025 / 2
    qkv = [f"%{x} = bf16[4,1024,12,64]{{3,2,1,0}} parameter({i})" for i, x in enumerate("qkv", 1)]
    call = "%{} = bf16[4,1024,12,64]{{3,2,1,0}} custom-call({}), custom_call_target={}"
    forward, backward = (call.format(name, "%q, %k, %v", f'"__cudnn$fmhaSoftmax{name}"') for name in ("", "Backward"))
    assert module(*qkv, forward, backward).flops == {"bf16": (2 + 5) * half}
    heads = ["%m = s8[1,8,8]{2,1,0} parameter(4)", *(line.replace("4,1024,12", "4,12,1024") for line in qkv)]
    broken = (
        ', frontend_attributes={kernel_metadata={\n"a":"b = c"\n}}, metadata={op_name="jit(f)/splash_mha_'  # over lines, as libtpu does
    )
    splash = [
        call.format(name, "%m, %q, %k, %v", '"tpu_custom_call"') + f'{broken}{name}/pallas_call"}}'
        for name in ("fwd_residuals", "dkv_no_residuals", "dq_no_residuals")
    ]
    assert module(*heads, *splash).flops == {"bf16": (2 + 4 + 3) * half}


def test_a_product_that_cublas_makes_is_counted():
    config = '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}'
    line = f'%c = (f32[16,4]{{1,0}}, s8[1024]{{0}}) custom-call(%p, %w), custom_call_target="__cublas$gemm", backend_config={config}'
    assert module("%w = f32[8,4]{1,0} parameter(1)", line).flops == {"f32": 2 * 16 * 8 * 4}


LOOP = """%body (s: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {{
  %s = (s32[], f32[16,8]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  %x = f32[16,8]{{1,0}} get-tuple-element(%s), index=1
  %r = f32[16,8]{{1,0}} all-reduce(%x), replica_groups={{}}, to_apply=%add
  ROOT %t = (s32[], f32[16,8]{{1,0}}) tuple(%next, %r)
}}

%condition (s.1: (s32[], f32[16,8])) -> pred[] {{
  %s.1 = (s32[], f32[16,8]{{1,0}}) parameter(0)
  %j = s32[] get-tuple-element(%s.1), index=0
  %limit = s32[] {limit}
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}}

"""
WHILE = ["%zero = s32[] constant({first})", "%t0 = (s32[], f32[16,8]{{1,0}}) tuple(%zero, %p)"]


@pytest.mark.parametrize(("first", "step", "limit", "turns"), [(0, 1, 12, 12), (0, 2, 4, 2), (3, 4, 12, 3)])
def test_a_loop_without_a_known_count_is_read_from_its_condition(first, step, limit, turns):
    before = LOOP.format(step=step, limit=f"constant({limit})")
    lines = [line.format(first=first) for line in WHILE]
    program = module(*lines, "%w = (s32[], f32[16,8]{1,0}) while(%t0), condition=%condition, body=%body", before=before)
    assert [c.loops for c in program.collectives] == [(turns,)]
    assert not program.uncounted


def test_a_loop_whose_end_is_data_is_reported_and_counted_once():
    before = LOOP.format(step=1, limit="convert(%j)")
    lines = [line.format(first=0) for line in WHILE]
    program = module(*lines, "%w = (s32[], f32[16,8]{1,0}) while(%t0), condition=%condition, body=%body", before=before)
    assert program.uncounted == ("w",)
    assert [c.times for c in program.collectives] == [1]
