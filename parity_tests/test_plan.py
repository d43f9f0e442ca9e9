"""A plan says what a run really holds and computes; compiled for the CPU, where both can be looked at."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import plan as script
import pytest
import train_jax
import train_torch
from conftest import ONE_LAYER, SMALL, refused, refused_by_tyro

from flaxgpt.config import TrainConfig
from flaxgpt.errors import InputError
from flaxgpt.plan import plan as plans
from flaxgpt.plan import report, search, targets
from flaxgpt.plan.hlo import Collective, Program, read_program
from flaxgpt.plan.plan import (
    Plan,
    Traffic,
    bounds,
    doubts,
    make_plan,
    model_flops,
    place,
    plan_mesh,
    what_moves,
)
from flaxgpt.plan.search import fewest_microbatches, left_out, meshes_of, settle
from flaxgpt.plan.targets import CHIPS, Target, find_target, present
from flaxgpt.train import describe_choices

RUN = TrainConfig(model=ONE_LAYER, batch_size=16, gather="layer")
SMALL_FLAGS = ("--batch-size", 4, "--context-length", 16, "--emb-dim", 32, "--n-layers", 1)

LIVE = """
import json, sys
import jax, numpy as np
from flaxgpt.config import TrainConfig
from flaxgpt.optim import adam_state, make_optimizer
from flaxgpt.plan.plan import plan_mesh
from flaxgpt.plan.search import options
from flaxgpt.plan.targets import find_target
from flaxgpt.state import abstract_state, create_state

def held(tree):
    shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
    return [sum(s.data.nbytes for s in shards if s.device == device) for device in jax.devices()]

target = find_target("here")
for cfg in map(TrainConfig.from_dict, json.loads(sys.argv[1])):
    tx = make_optimizer(cfg)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_state(cfg, tx).params)
    state = create_state(cfg, tx, plan_mesh(cfg, target), zeros)  # drawing them would be compiled for seconds
    adam = adam_state(state.opt_state)
    print(json.dumps([[plan.to_dict() for plan in options(cfg, target)], held(state.params), held((adam.mu, adam.nu))]))
"""

SPLIT = RUN.replace(batch_size=48, fsdp=4, grad_accum_steps=2, gather="auto")  # 3 rows: no activation is as large as a parameter
MEGATRON = RUN.replace(batch_size=12, fsdp=2, tensor=2, model=ONE_LAYER.replace(vocab_multiple=4))


@functools.cache
def live() -> list[tuple[list[dict], list[int], list[int]]]:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", LIVE, json.dumps([cfg.to_dict() for cfg in (RUN, SPLIT, MEGATRON)])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def on_eight_devices(cfg: TrainConfig) -> tuple[list[dict], list[int], list[int]]:
    """The plans, and the bytes of parameters and of moments that each device really holds."""
    return live()[(RUN, SPLIT, MEGATRON).index(cfg)]


@pytest.fixture
def target() -> Target:
    return present(jax.devices())


@functools.cache
def small_plan(**changes: object) -> Plan:
    return make_plan(RUN.replace(**changes), present(jax.devices()))


def with_memory(target: Target, memory: float) -> Target:
    return dataclasses.replace(target, memory=int(memory))


@pytest.mark.parametrize("cfg", [RUN, SPLIT, MEGATRON], ids=["data", "data-fsdp", "data-fsdp-tensor"])
def test_parameters_and_moments_are_the_live_buffers_of_each_of_eight_devices(cfg):
    plans, params, moments = on_eight_devices(cfg)
    for plan in plans:
        assert params == [plan["params_bytes"]] * 8
        assert moments == [plan["moments_bytes"]] * 8
        assert plan["arguments_bytes"] >= plan["params_bytes"] + plan["moments_bytes"]
        assert plan["mesh"] == {"data": 8 // (cfg.fsdp * cfg.tensor), "fsdp": cfg.fsdp, "tensor": cfg.tensor}
        assert not plan["doubts"]


def test_what_gathers_once_an_update_sends_less_and_is_taken():
    (taken, other), _, _ = on_eight_devices(SPLIT)
    assert (taken["gather"], other["gather"]) == ("update", "layer")
    assert taken["fits"]
    assert taken["wire_bytes"] < other["wire_bytes"]
    loops = {row["place"] for row in taken["traffic"] if row["what"] != "numbers"}
    assert loops == {"outside"}, f"gathered once an update, and yet something is sent in {loops}"


def test_heads_that_are_split_add_up_activations_and_gather_none():
    [plan], _, _ = on_eight_devices(MEGATRON)
    moved = {row["kind"] for row in plan["traffic"] if row["what"] == "activations"}
    assert moved == {"all-reduce"}, plan["traffic"]


def by_hand(cfg: TrainConfig) -> float:
    """Operations of an update with plain attention, from the shapes: every product has two gradients of its own size.

    Recomputed, a block makes its products again but for the last one, whose result nothing in the backward pass needs.
    """
    L, D, V, T = cfg.model.n_layers, cfg.model.emb_dim, cfg.model.vocab_size, cfg.model.context_length
    qkv, out, up, down = 3 * D * D, D * D, 4 * D * D, 4 * D * D
    scores = context = T * D
    block, head = qkv + scores + context + out + up + down, D * V
    again = block - down if cfg.model.remat == "block" else 0
    return 2 * cfg.batch_size * T * (3 * (L * block + head) + L * again)


@pytest.mark.parametrize(("remat", "steps", "n_layers"), [("none", 4, 1), ("block", 1, 2)])
def test_the_programs_arithmetic_agrees_with_a_count_by_hand(target, remat, steps, n_layers):
    cfg = RUN.replace(grad_accum_steps=steps, model=SMALL.replace(remat=remat, vocab_size=331, n_layers=n_layers))
    plan = make_plan(cfg, target)
    assert plan.program_flops == pytest.approx(by_hand(cfg), rel=0.01)
    assert plan.doubts == ()


def test_the_models_arithmetic_is_the_count_by_hand_without_masked_scores():
    cfg = TrainConfig.preset("gpt2-124m")
    masked = 6 * cfg.batch_size * 12 * 768 * 1024 * 1023  # of two products, half but for the diagonal
    whole = by_hand(cfg.replace(model=cfg.model.replace(remat="none")))
    assert model_flops(cfg) == whole - masked
    padded = cfg.replace(model=cfg.model.replace(vocab_multiple=64))
    assert model_flops(padded) == model_flops(cfg), "padding is the program's work, not the model's"


def test_arithmetic_on_eight_devices_is_that_of_one(target):
    [eight], _, _ = on_eight_devices(RUN)
    assert eight["program_flops"] == small_plan().program_flops


def test_one_device_sends_nothing_and_eight_send_their_gradients():
    assert small_plan().traffic == ()
    [eight], _, _ = on_eight_devices(RUN)
    kinds = {(row["kind"], row["what"]) for row in eight["traffic"]}
    assert ("all-reduce", "gradients") in kinds, kinds
    assert eight["wire_bytes"] >= 1.75 * eight["params_bytes"], "fewer bytes than the gradients of all parameters"


def test_the_peak_holds_what_the_compiler_says(target):
    plan = small_plan()
    assert plan.peak_bytes >= plan.params_bytes + plan.moments_bytes + plan.temporaries_bytes
    assert plan.fits == (plan.peak_bytes <= target.memory)


@pytest.mark.parametrize("least", [1, 2, 4, 8, 16, 32])
def test_the_fewest_microbatches_that_fit_are_found_with_few_trials(target, monkeypatch, least):
    tried = []

    def fits(cfg, _):
        tried.append(cfg.grad_accum_steps)
        return cfg if cfg.grad_accum_steps >= least else None

    monkeypatch.setattr(search, "fitting", fits)
    found = fewest_microbatches(RUN, target)
    assert (found and found.grad_accum_steps) == (least if least <= 16 else None)
    assert len(tried) == len(set(tried)) <= 4


def test_microbatches_are_found_by_the_compiled_peak(target, monkeypatch):
    whole, halves = small_plan(), small_plan(grad_accum_steps=2)
    half = halves.peak_bytes
    assert half < whole.peak_bytes, "a smaller microbatch does not hold less"

    def made(cfg, target):
        """More than two microbatches hold no more than two."""
        plan = whole if cfg.grad_accum_steps == 1 else halves
        return dataclasses.replace(plan, grad_accum_steps=cfg.grad_accum_steps, memory_bytes=target.memory)

    monkeypatch.setattr(search, "make_plan", made)
    auto = RUN.replace(grad_accum_steps="auto")
    assert settle(auto, with_memory(target, half)).grad_accum_steps == 2
    with pytest.raises(InputError, match="not even the smallest microbatch fits"):
        settle(auto, with_memory(target, 1000))


def test_nothing_is_compiled_where_the_state_alone_is_too_large(target, monkeypatch):
    monkeypatch.setattr(search, "make_plan", lambda *_: pytest.fail("compiled"))
    assert fewest_microbatches(RUN, with_memory(target, 1000)) is None


def test_a_number_of_microbatches_is_left_as_it_is(target, monkeypatch):
    monkeypatch.setattr(search, "make_plan", lambda *_: pytest.fail("compiled"))
    assert settle(RUN, target) is RUN


def test_one_device_has_nothing_to_gather_and_compiles_nothing_to_find_that_out(target, monkeypatch):
    monkeypatch.setattr(search, "make_plan", lambda *_: pytest.fail("compiled"))
    assert settle(RUN.replace(gather="auto"), target) == RUN


@pytest.mark.parametrize(
    ("memory", "steps", "gather", "becomes"),
    [
        (100, 2, "auto", ("update", 2)),  # both fit: the least traffic
        (50, 2, "auto", ("layer", 2)),
        (100, "auto", "auto", ("update", 1)),
        (50, "auto", "auto", ("update", 4)),  # more microbatches, but still less on the wire
        (15, "auto", "auto", ("layer", 4)),
        (50, "auto", "layer", ("layer", 2)),
        (15, 2, "auto", None),
    ],
)
def test_auto_is_the_least_traffic_that_fits(target, monkeypatch, memory, steps, gather, becomes):
    def made(cfg, target):
        n = cfg.grad_accum_steps
        peak, sent = {"update": (20 + 80 // n, 4), "layer": (60 // n, 5 * n)}[cfg.gather]
        traffic = (Traffic("all-gather", "weights", "bf16", "outside", 4, 1, sent),)
        return dataclasses.replace(
            small_plan(), gather=cfg.gather, grad_accum_steps=n, peak_bytes=peak, memory_bytes=target.memory, traffic=traffic
        )

    monkeypatch.setattr(search, "make_plan", made)
    monkeypatch.setattr(search, "state_bytes", lambda *_: (0, 0))
    machine = with_memory(dataclasses.replace(target, devices=target.devices * 4), memory)
    cfg = RUN.replace(fsdp=4, gather=gather, grad_accum_steps=steps)
    if becomes:
        found = settle(cfg, machine)
        assert (found.gather, found.grad_accum_steps) == becomes
    else:
        with pytest.raises(InputError, match="it needs"):
            settle(cfg, machine)


def test_the_first_line_says_what_auto_became():
    asked = RUN.replace(fsdp=4, gather="auto")
    assert describe_choices(asked, asked.replace(gather="update")) == ", gather update (the least traffic that fits)"
    assert describe_choices(RUN.replace(gather="auto"), RUN) == "", "there is no choice on one device"


def test_training_finds_the_microbatches_says_so_and_writes_them(call, monkeypatch, tmp_path):
    small = small_plan()  # before there is nothing to compile with
    monkeypatch.setattr(
        search, "fitting", lambda cfg, _: dataclasses.replace(small, grad_accum_steps=4) if cfg.grad_accum_steps >= 4 else None
    )
    flags = (*SMALL_FLAGS, "--max-steps", 1, "--sample-tokens", 0, "--eval-batches", 1)
    code, out, err = call(train_jax, "--out-dir", tmp_path / "run", "--grad-accum-steps", "auto", *flags)
    assert code == 0, err
    assert "grad_accum_steps 4 (the fewest that fit)" in out.splitlines()[0]
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (written["grad_accum_steps"], written["gather"]) == (4, "layer")


def test_the_reference_wants_a_number_of_microbatches(call, tmp_path):
    refused(call(train_torch, "--out-dir", tmp_path / "run", "--grad-accum-steps", "auto"), "grad_accum_steps=auto.*pass a number")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("loops", "steps", "where"),
    [
        ((), 32, "outside"),
        ((32,), 32, "microbatch loop"),
        ((32, 2), 32, "layer loop"),
        ((2,), 1, "layer loop"),
        ((2, 2), 2, "layer loop"),
        ((2,), 2, "microbatch loop"),
        ((7,), 1, "another loop"),
        ((32, 7), 32, "another loop"),
        ((32, 4), 32, "loss loop"),
    ],
)
def test_a_place_is_told_by_how_often_its_loops_turn(loops, steps, where, target):
    cfg = RUN.replace(batch_size=32, grad_accum_steps=steps, model=SMALL.replace(loss_chunk=4))
    assert place(loops, cfg, plan_mesh(cfg, target)) == where


@pytest.mark.parametrize(
    ("kind", "arrays", "what"),
    [
        ("all-gather", [("bf16", (4, 128))], "weights"),  # the first of eight parts of a layer's (32, 128)
        ("all-gather", [("f32", (2, 4, 128)), ("f32", (32,))], "weights"),
        ("reduce-scatter", [("f32", (97, 32))], "gradients"),
        ("all-reduce", [("f32", (97, 32)), ("f32", ())], "gradients"),
        ("all-gather", [("f32", (2, 16, 97))], "activations"),
        ("all-gather", [("s32", (2, 16))], "tokens"),
        ("all-reduce", [("f32", ())], "numbers"),
        ("collective-permute", [("bf16", (4, 128))], "weights or gradients"),
        ("collective-permute", [("bf16", (97, 3))], "weights or gradients"),  # the edge of a part
        ("collective-permute", [("bf16", (3, 16, 32))], "activations"),
        ("all-gather", [("bf16", (100, 4))], "weights"),  # of the padded vocabulary
    ],
)
def test_what_moves_is_told_by_its_size(kind, arrays, what, target):
    cfg = RUN.replace(fsdp=8, model=SMALL.replace(vocab_multiple=4) if 100 in arrays[0][1] else SMALL)
    devices = dataclasses.replace(target, devices=target.devices * 8)
    mesh = plan_mesh(cfg, devices)
    collective = Collective(kind, tuple(arrays), 0.0, 8, (), "")
    assert what_moves(collective, cfg, mesh, plans.weight_sizes(cfg, mesh)) == what


def test_the_command_prints_what_the_machine_needs(call, tmp_path):
    code, out, err = call(script, *SMALL_FLAGS)
    assert code == 0, err
    for said in ("here: cpu", "parameters", "moments", "temporaries", "fits, with room for", "nothing is sent", "nothing was run", "plain"):
        assert said in out, out


def test_the_plan_as_json_and_the_program_as_text_say_the_same(call, tmp_path):
    code, out, err = call(script, *SMALL_FLAGS, "--json", "--hlo", tmp_path / "step.hlo")
    assert code == 0, err
    plan = json.loads(out)
    program = read_program((tmp_path / "step.hlo").read_text())
    assert plan["program_flops"] == sum(program.flops.values())
    assert plan["fits"]
    assert plan["grad_accum_steps"] == 1


def test_a_sweep_ranks_the_meshes_that_fit_and_writes_the_best_program(call, tmp_path):
    code, out, err = call(script, *SMALL_FLAGS, "--sweep", "--json", "--hlo", tmp_path / "best.hlo")
    assert code == 0, err
    [best] = json.loads(out)
    assert best["mesh"]["fsdp"] == 1
    assert best["program_flops"] == sum(read_program((tmp_path / "best.hlo").read_text()).flops.values())
    assert sorted(path.name for path in tmp_path.glob("best*")) == ["best.hlo"]
    assert "fsdp 1, tensor 1, gather layer: grad_accum_steps 1" in err


@pytest.mark.parametrize(
    ("vocab_multiple", "meshes"),
    [(1, [(1, 1), (2, 1), (4, 1), (8, 1)]), (4, [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (8, 1), (4, 2), (2, 4)])],
)
def test_meshes_are_those_that_divide_the_devices_and_the_model(vocab_multiple, meshes, target):
    machine = dataclasses.replace(target, devices=target.devices * 8)
    assert meshes_of(RUN.replace(model=SMALL.replace(vocab_multiple=vocab_multiple)), machine) == meshes


def test_meshes_that_the_model_rules_out_are_named_with_the_flag_that_allows_them(target):
    machine = dataclasses.replace(target, devices=target.devices * 8)
    assert left_out(RUN, machine) == (
        "left out: tensor 2, 4 (does not divide the vocabulary of 97; --vocab-multiple 4 would allow it); "
        "tensor 8 (does not divide the 4 heads)"
    )
    allowed = RUN.replace(model=SMALL.replace(vocab_multiple=4, n_heads=8))
    assert left_out(allowed, machine) == "left out: tensor 8 (does not divide the vocabulary of 100; --vocab-multiple 8 would allow it)"
    assert left_out(RUN, target) == ""


def test_a_batch_that_no_mesh_can_share_is_called_indivisible_and_not_too_large(target, monkeypatch):
    monkeypatch.setattr(search, "make_plan", lambda cfg, _: dataclasses.replace(small_plan(), mesh={"tensor": cfg.tensor}))
    machine = dataclasses.replace(target, devices=target.devices * 8)
    cfg = RUN.replace(batch_size=10, grad_accum_steps="auto", model=SMALL.replace(vocab_multiple=4))
    with pytest.raises(InputError, match=r"batch_size=10 can't be split evenly .* expected a multiple of 8"):
        settle(cfg, machine)
    found = [(run.tensor, said) for run, said in search.try_meshes(cfg, machine)]
    assert {type(said) for tensor, said in found if tensor == 4} == {Plan}, "two shards of rows divide a batch of 10"
    skipped = {said for tensor, said in found if tensor < 4}
    assert len(skipped) == 2
    assert all("can't be split evenly" in said for said in skipped)


def test_what_has_failed_is_not_compiled_again_and_uneven_meshes_are_not_tried(target, monkeypatch):
    tried = []
    monkeypatch.setattr(search, "fitting", lambda cfg, _: tried.append((cfg.fsdp, cfg.tensor, cfg.gather, cfg.grad_accum_steps)))
    machine = dataclasses.replace(target, devices=target.devices * 8)
    cfg = RUN.replace(batch_size=20, fsdp=1, tensor=2, gather="auto", model=SMALL.replace(vocab_multiple=4))
    assert search.smallest_that_fits(cfg, machine) is None
    assert tried[0] == (1, 2, "layer", 5), "with one microbatch it has just failed"
    assert {tensor for _, tensor, _, _ in tried} == {2, 4}, "20 rows can't be shared by 8"
    tried.clear()
    search.smallest_that_fits(cfg.replace(grad_accum_steps="auto"), machine)
    assert (1, 2) not in {(fsdp, tensor) for fsdp, tensor, _, _ in tried}, "auto has tried every number of microbatches"


def test_a_tensor_axis_divides_the_weights_that_a_device_reads(target):
    one = RUN.replace(model=SMALL.replace(vocab_multiple=4), grad_accum_steps=4)
    nothing, chip = Program((), (), frozenset(), ()), CHIPS["gpu:h100"]
    read = [bounds(cfg, nothing, chip, 0).memory * chip.bandwidth for cfg in (one, one.replace(tensor=4))]
    weights = 4 * (2 * 12 * 32 * 32 + 32 * 100)  # bytes of the matrices and the head
    assert read == pytest.approx([2 * 4 * weights, 2 * 4 * weights / 4])


def test_sizes_that_are_those_of_parameters_and_activations_are_doubted(target):
    cfg = RUN.replace(batch_size=4, tensor=2, model=SMALL.replace(vocab_multiple=2))
    mesh = plan_mesh(cfg, dataclasses.replace(target, devices=target.devices * 8))

    def doubted(cfg: TrainConfig, *shapes: tuple[int, ...]) -> list[str]:
        moved = Collective("all-reduce", tuple(("f32", shape) for shape in shapes), 0.0, 2, (2,), "")
        return [said for said in doubts(Program((moved,), (), frozenset(), ()), cfg, mesh, "plain", 16) if "can be either" in said]

    [said] = doubted(cfg, (16, 32))
    assert said == "1 collectives of weights or gradients may be of activations: arrays of 512 elements can be either"
    assert not doubted(cfg, (16, 32), (98, 32)), "with another parameter's gradient it is a gradient"
    assert not doubted(cfg.replace(batch_size=12), (16, 32)), "three rows are as large as no parameter"


def test_what_was_chosen_is_looked_for_in_the_program(target):
    cfg = RUN.replace(model=ONE_LAYER.replace(loss_chunk=8))
    plan = make_plan(cfg, target)
    assert (plan.loss_chunk, plan.attention, plan.doubts) == (8, "plain (there is no kernel for cpu)", ())
    wrong = list(doubts(read_program(plan.hlo), cfg, plan_mesh(cfg, target), "cudnn", 16))
    assert len(wrong) == 2
    assert "cudnn attention was chosen, and the program has plain" in wrong


def test_a_plan_that_does_not_fit_says_the_smallest_that_does(call, target, monkeypatch):
    small = dataclasses.replace(small_plan(), grad_accum_steps=4)
    monkeypatch.setattr(targets, "find_target", lambda _: with_memory(target, 1000))
    code, out, err = call(script, *SMALL_FLAGS)
    assert code == 2
    assert "does not fit, too large by" in out
    assert "no mesh of here fits" in err.splitlines()[-1]
    monkeypatch.setattr(search, "fitting", lambda cfg, _: small if cfg.grad_accum_steps == 4 else None)
    code, out, err = call(script, *SMALL_FLAGS)
    assert code == 2
    assert "the smallest change that fits is --gather layer --grad-accum-steps 4" in err.splitlines()[-1]


@pytest.mark.parametrize("sweep", [(), ("--sweep",)])
@pytest.mark.parametrize(("path", "why"), [("", "it is a folder"), ("missing/step.hlo", "No such file")])
def test_a_program_that_could_not_be_written_is_not_compiled(call, tmp_path, monkeypatch, sweep, path, why):
    monkeypatch.setattr(search, "make_plan", lambda *_: pytest.fail("compiled"))
    refused(call(script, *SMALL_FLAGS, *sweep, "--hlo", tmp_path / path), f"can't be written: {why}")


def test_float64_is_refused_as_in_training(call, tmp_path):
    planned, trained = call(script, "--dtype", "float64"), call(train_jax, "--out-dir", tmp_path / "run", "--dtype", "float64")
    refused(planned, "dtype=float64")
    assert planned == trained


@pytest.mark.parametrize("share", ["abc", "0", "nan", "inf"])
@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_a_share_of_memory_that_is_none_is_refused_before_jax_reads_it(call, monkeypatch, name, share):
    monkeypatch.setenv(name, share)
    monkeypatch.setattr(jax, "devices", lambda: pytest.fail("JAX was asked for its devices"))
    refused(call(script), f"{name}='{share}': expected a share")


def test_a_share_of_memory_is_three_quarters_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert targets._fraction() == 0.75
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert targets._fraction() == 0.9


def test_tables_of_plans_are_read_at_80_columns_and_say_that_several_hosts_are_needed(capsys):
    large = {"mesh": {"data": 256, "fsdp": 1, "tensor": 1}, "gather": "update", "batch_size": 512, "grad_accum_steps": 512, "hosts": 64}
    traffic = (Traffic("all-reduce", "gradients", "f32", "outside", 4, 1, 999.99e9),)
    plan = dataclasses.replace(
        small_plan(), **large, peak_bytes=999 * 2**30, traffic=traffic, seconds=plans.Seconds(123.45, 123.45, 123.45)
    )
    report.show_ranking([plan], CHIPS["tpu:v5e"])
    table, _, notes = capsys.readouterr().out.partition("\n\n")
    assert "256x1x1" in table
    assert "999.00 GiB" in table
    assert max(map(len, table.splitlines())) <= 80, table
    assert "the devices of 64 hosts: start the run on all of them (docs/hosts.md)" in notes
    report.show(small_plan(), None)
    assert "hosts" not in capsys.readouterr().out
    row = Traffic("collective-permute", "weights or gradients", "bf16", "microbatch loop", 256, 123_456, 999.99e9)
    print_table = report.Console(width=80).print
    print_table(report.traffic_table(dataclasses.replace(plan, traffic=(row,))))
    said = capsys.readouterr().out
    assert all(whole in said for whole in ("collective-permute", "sent by a device", "123,456", "999.99 GB")), said


@pytest.mark.parametrize(
    ("chip", "count", "hosts"), [("tpu:v5e", 8, 1), ("tpu:v5e", 16, 4), ("tpu:v5p", 4, 1), ("tpu:v5p", 8, 2), ("tpu:v6e", 8, 1)]
)
def test_a_slice_is_of_one_host_as_long_as_one_holds_it(chip, count, hosts):
    devices = tuple(SimpleNamespace(process_index=i // 4) for i in range(count))  # as libtpu describes slices
    assert targets._hosts(devices, CHIPS[chip]) == hosts


@pytest.mark.parametrize(
    ("scaled", "said"),
    [
        (report._memory(0), "0 B"),
        (report._memory(1023), "1,023 B"),
        (report._memory(59_648), "58.25 KiB"),
        (report._memory(3 * 2**50), "3,072.00 TiB"),
        (report._sent(999), "999 B"),
        (report._sent(24_580), "24.58 kB"),
        (report._flop(11.02e6), "11.02 MFLOP"),
    ],
)
def test_a_unit_is_chosen_by_size(scaled, said):
    assert scaled == said


@pytest.mark.parametrize("name", ["there", "gpu:h100x9", "gpu:h100", "tpu:v5e", "tpu:v1:2x2", "gpu:b9x8"])
def test_an_unknown_target_is_refused_with_those_there_are(call, name):
    refused(call(script, "--target", name), r"unknown target.*here.*gpu:h100x8.*tpu:v5e:4x4")


@pytest.mark.parametrize(("name", "wheel"), [("tpu:v5e:2x4", r"jax\[tpu\]=="), ("gpu:h100x8", "jax-cuda13-plugin==")])
def test_what_is_missing_to_compile_for_a_target_is_said_with_the_line_that_installs_it(call, name, wheel, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    refused(call(script, "--target", name), f"not installed: pip install.*{wheel}{jax.__version__}")


def test_an_fsdp_that_does_not_divide_the_targets_devices_is_refused(call):
    refused(call(script, *SMALL_FLAGS, "--fsdp", 2), "fsdp=2 x tensor=1 does not divide the 1 devices")


def test_a_number_of_microbatches_is_a_number_or_auto(call):
    refused_by_tyro(call(script, "--grad-accum-steps", "few"), "few")
    with pytest.raises(InputError, match="expected int or one of auto"):
        TrainConfig(grad_accum_steps="few")
    with pytest.raises(InputError, match="at least 1, or auto"):
        TrainConfig(grad_accum_steps=0)


def test_every_chip_has_its_figures_and_their_source():
    for name, chip in CHIPS.items():
        assert chip.source.startswith("https://"), name
        assert 10e12 < min(chip.flops.values()), name
        assert chip.memory / chip.bandwidth < 1, f"{name}: reading its memory once would take over a second"
        assert chip.link < chip.bandwidth, f"{name}: faster to a neighbour than to its own memory"


def test_devices_that_are_here_share_the_hosts_memory():
    here = find_target("here")
    assert here.memory == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.device_count()
    assert here.chip is None
    assert here.hosts == 1
