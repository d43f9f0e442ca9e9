"""Compare flaxgpt with its PyTorch reference, or with Hugging Face's GPT-2, from the first activation to generated text.

Rungs: 1 activations, 2 loss, 3 gradients, 4 clipping, 5 adamw, 6 accumulation, 7 training, 8 dropout, 9 generation.
Named are the tensors at which the two first diverge, forward and backward. The exit code is 1 if a rung fails.

Examples:
  parity_report.py                                     a small model with random weights, all rungs
  parity_report.py --preset verdict-124m --rungs 1 2 3
  parity_report.py --checkpoint runs/tiny --html report.html
  parity_report.py --init-from gpt2
  parity_report.py --init-from gpt2 --reference transformers
                                                       the released weights, against Hugging Face's own GPT-2
  parity_report.py --state-dict model.pth --n-heads 12 --plot layers.png --json report.json
  parity_report.py --dtype bfloat16 --device gpu
  parity_report.py --data 2 --fsdp 2 --tensor 2 --vocab-multiple 2 --loss-chunk 16
                                                       the program of eight devices, which a CPU simulates
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import tyro

from flaxgpt.config import TrainConfig
from flaxgpt.errors import InputError
from flaxgpt.run.cli import one_line_errors

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from flaxgpt.parity.side import Moments, NoiseDrivenSide, SeededSide, Tensors


@dataclass(frozen=True)
class ReportArgs:
    """Which model, how it is compared, and where the findings go."""

    preset: str | None = None
    """A preset's model, with random weights or those of --state-dict. Without any of the first four: tiny."""
    checkpoint: Path | None = None
    """A run folder, of either trainer."""
    init_from: str | None = None
    """A Hugging Face folder, an id on its hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2 or any other), nanoGPT's ckpt.pt, a
    state_dict of the reference (.pth, .safetensors) that says what it is, or a run folder."""
    state_dict: Path | None = None
    """Weights of the reference: safetensors, or torch.save of a state_dict (or of one with its optimizer's, as model_state_dict
    and optimizer_state_dict: then rung 5 also starts from those moments)."""
    n_heads: int | None = None
    """Attention heads of --state-dict without --preset (shapes do not imply them); None: heads of 64, as GPT-2's."""
    rungs: tuple[str, ...] = ()
    """Numbers or names of rungs; none: all."""
    reference: Literal["torch_ref", "transformers"] = "torch_ref"
    """What flaxgpt is compared with. torch_ref: this project's own model in PyTorch. transformers: Hugging Face's GPT2LMHeadModel,
    with eager attention and its own text generation; the biases that the model lacks are zero there, and frozen."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """The precision under test. Both sides are run in float64 as well."""
    device: str | None = None
    """Where flaxgpt runs: cpu, gpu or tpu; None: JAX's default. The other side runs on the CPU."""
    data: int = 1
    """Devices that share the rows of a batch. Of CPUs there are as many as are asked for, made of one."""
    fsdp: int = 1
    """Devices that share the parameters and the rows of a batch, as train_jax.py has it."""
    tensor: int = 1
    """Devices that share heads, feed-forward units and the vocabulary."""
    gather: Literal["layer", "update"] = "layer"
    """When weights that fsdp has split are gathered, on the rungs that train."""
    attention: Literal["auto", "plain", "fused"] | None = None
    """Which attention flaxgpt computes on the rungs that train and generate (where its weights are looked at, it is the plain one);
    None: as in the config."""
    loss_chunk: int | None = None
    """Positions of each row whose logits the loss holds at a time, on the rungs that train; None: as in the config."""
    remat: Literal["none", "dots", "block"] | None = None
    """What of a block the backward pass computes again; None: as in the config."""
    vocab_multiple: int | None = None
    """Pad flaxgpt's vocabulary to a multiple of this; None: as in the config."""
    seed: int = 0
    """Of random weights, tokens, moments and draws."""
    batch: int | None = None
    """Rows of a batch; None: 2, or as many as devices share them."""
    length: int | None = None
    """Tokens of a row, and the context of the generated text; None: the context length, 64 at most."""
    steps: int = 5
    """Updates on rungs 7 and 8."""
    json: Path | None = None
    """Write every figure of every tensor to this file."""
    plot: Path | None = None
    """Draw the differences by layer, as a PNG."""
    html: Path | None = None
    """Write a page with all of it that needs no other file."""


@one_line_errors
def main() -> None:
    """Parse the flags, make the problem, climb the ladder, report."""
    args = tyro.cli(ReportArgs, description=__doc__)

    import tempfile
    import time

    import jax

    from flaxgpt.parity import report
    from flaxgpt.parity.ladder import RUNGS, climb, select_rungs
    from flaxgpt.parity.problem import make_problem
    from flaxgpt.run.folder import write_text

    rungs = select_rungs(args.rungs or RUNGS)
    _check(args)
    ours, theirs, environment = _sides(args)
    mesh = _mesh(args)
    cfg, weights, moments, source = _model(args)
    computed = {name: value for name in _COMPUTED if (value := getattr(args, name)) is not None}
    cfg = cfg.replace(fsdp=args.fsdp, tensor=args.tensor, gather=args.gather, model=cfg.model.replace(**computed))
    cfg.check_vocabulary()
    shards = args.data * args.fsdp
    batch = max(2, shards) if args.batch is None else args.batch
    if batch % shards:
        raise InputError(f"batch={batch} can't be split evenly over data x fsdp = {shards} devices: expected a multiple of {shards}")
    length = min(cfg.model.context_length, 64) if args.length is None else args.length
    sizes = {"seed": args.seed, "batch": batch, "length": length, "steps": args.steps}
    problem = make_problem(cfg, weights, moments=moments, **sizes)
    about = {"model": source, "reference": args.reference, "config": cfg.model.to_dict(), "rungs": " ".join(rungs), "dtype": args.dtype}
    about |= sizes | environment
    shape = f"{cfg.model.n_layers} layers, width {cfg.model.emb_dim}, {sum(w.size for w in problem.weights.values()):,} parameters"
    print(f"{source}: {shape}; {args.dtype}, {batch} x {length} tokens, seed {args.seed}")
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    print(f"flaxgpt on {environment['device']}{axes and f', {axes}'}, against {args.reference} on cpu")
    print(report.header(args.reference))
    results, started = [], time.perf_counter()
    with jax.set_mesh(mesh):
        for result in climb(ours, theirs, problem, rungs, args.dtype):
            results.append(result)
            print("\n".join(report.lines(result)), flush=True)
    print("\n".join(report.verdict(results)), f"({time.perf_counter() - started:.0f} s)")

    if args.json:
        write_text(args.json, report.to_json(results, about))
    if args.plot and not report.save_plot(results, args.plot, args.reference):
        print("no plot: it shows rungs 1 and 3, and neither was climbed", file=sys.stderr)
    if args.html:
        with tempfile.TemporaryDirectory() as folder:
            plot = Path(folder) / "plot.png"
            drawn = report.save_plot(results, plot, args.reference)
            write_text(args.html, report.to_html(results, about, plot if drawn else None, args.reference))
    if not all(result.passed for result in results):
        sys.exit(1)


def _check(args: ReportArgs) -> None:
    if args.checkpoint and (args.preset or args.state_dict or args.init_from):
        raise InputError("--checkpoint brings its own config and weights: leave out --preset, --state-dict and --init-from")
    if args.init_from and (args.preset or args.state_dict):
        raise InputError("--init-from brings its own config and weights: leave out --preset and --state-dict")
    if args.n_heads is not None and (args.state_dict is None or args.preset):
        raise InputError("--n-heads goes with --state-dict alone: a preset or a checkpoint brings its own")
    for axis in ("data", "fsdp", "tensor"):
        if getattr(args, axis) < 1:
            raise InputError(f"{axis}={getattr(args, axis)}: expected at least 1")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"seed={args.seed}: expected a value in [0, 2**32)")
    for path in (args.json, args.plot, args.html):
        if path and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise InputError(f"can't write {path}: it is a folder, or is in one that is not there")


_COMPUTED = ("attention", "loss_chunk", "remat", "vocab_multiple")
"""Flags that change how flaxgpt's model is computed, and not what it computes."""


def _mesh(args: ReportArgs) -> Mesh:
    """As many devices as the axes take."""
    import jax

    from flaxgpt.sharding import make_mesh

    size = args.data * args.fsdp * args.tensor
    devices = jax.devices(args.device) if args.device else jax.devices()
    if len(devices) < size:
        raise InputError(f"data x fsdp x tensor = {size} devices: there are {len(devices)} of {devices[0].platform}")
    return make_mesh(args.fsdp, args.tensor, devices[:size])


def _sides(args: ReportArgs) -> tuple[SeededSide, NoiseDrivenSide, dict[str, str]]:
    """Both sides, and what they run on."""
    import jax

    device, size = args.device, args.data * args.fsdp * args.tensor
    if size > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", size)
    try:
        if device:
            jax.config.update("jax_default_device", jax.devices(device)[0])
        where = (jax.devices(device) if device else jax.devices())[0]
    except RuntimeError:
        raise InputError(f"device={device}: JAX has only {', '.join(sorted({d.platform for d in jax.devices()}))} here") from None
    try:
        theirs, libraries = _reference(args.reference)
    except ModuleNotFoundError as error:
        extra = "parity" if args.reference == "torch_ref" else "parity,transformers"
        raise InputError(f'--reference {args.reference} needs {error.name}: pip install -e ".[{extra}]" (or "flaxgpt[{extra}]")') from None
    import flax
    import optax

    from flaxgpt.parity import flax_side as ours

    versions = {module.__name__: module.__version__ for module in (jax, flax, optax, *libraries)}
    return ours, theirs, {"device": f"{where.platform} ({where.device_kind})", **versions}


def _reference(name: str) -> tuple[NoiseDrivenSide, list[ModuleType]]:
    """The side that flaxgpt is compared with, and the libraries that it is made of."""
    import torch

    if name == "torch_ref":
        from torch_ref.parity.torch_side import TorchSide

        return TorchSide(), [torch]
    import transformers

    from torch_ref.parity.huggingface_side import HuggingFaceSide

    return HuggingFaceSide(), [torch, transformers]


def _model(args: ReportArgs) -> tuple[TrainConfig, Tensors | None, tuple[int, Moments] | None, str]:
    """The config, the weights (None: random ones), the optimizer's moments if there are any, and what to call all that."""
    from flaxgpt.convert.optimizer import moments_from_torch, options_from_torch
    from flaxgpt.convert.params import from_torch, infer_config, named_parameters

    if args.checkpoint:
        from flaxgpt.checkpoint import load_run

        run = load_run(args.checkpoint)
        return run.cfg, named_parameters(run.params, run.cfg.model), None, str(args.checkpoint)
    if args.init_from:
        from flaxgpt.checkpoint import load

        source = load(args.init_from)
        return TrainConfig(model=source.cfg), named_parameters(source.params, source.cfg), None, args.init_from
    cfg = TrainConfig.preset(args.preset or "tiny")
    if args.state_dict is None:
        return cfg, None, None, f"preset {args.preset or 'tiny'}, random weights"
    from torch_ref.checkpoint import load_state_dicts

    state_dict, optimizer_state = load_state_dicts(args.state_dict)
    model = cfg.model if args.preset else infer_config(state_dict, args.n_heads)
    options = options_from_torch(optimizer_state) if optimizer_state else {}
    cfg = TrainConfig(model=model).replace(**options)
    weights = named_parameters(from_torch(state_dict, model), model)
    return cfg, weights, moments_from_torch(optimizer_state, cfg) if optimizer_state else None, str(args.state_dict)


if __name__ == "__main__":
    main()
