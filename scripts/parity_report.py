"""Compare flaxgpt with its PyTorch reference, from the first activation to generated text, and name where they first diverge.

Rungs: 1 activations, 2 loss, 3 gradients, 4 clipping, 5 adamw, 6 accumulation, 7 training, 8 dropout, 9 generation.
The exit code is 1 if a rung fails.

Examples:
  parity_report.py                                     a small model with random weights, all rungs
  parity_report.py --preset verdict-124m --rungs 1 2 3
  parity_report.py --checkpoint runs/tiny --html report.html
  parity_report.py --init-from gpt2
  parity_report.py --state-dict model.pth --n-heads 12 --plot layers.png --json report.json
  parity_report.py --dtype bfloat16 --device gpu
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from flaxgpt.config import TrainConfig
from flaxgpt.errors import InputError
from flaxgpt.run.cli import one_line_errors

if TYPE_CHECKING:
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
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """The precision under test. Both sides are run in float64 as well."""
    device: str | None = None
    """Where flaxgpt runs: cpu, gpu or tpu; None: JAX's default. The reference runs on the CPU."""
    seed: int = 0
    """Of random weights, tokens, moments and draws."""
    batch: int = 2
    """Rows of a batch."""
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

    from flaxgpt.parity import report
    from flaxgpt.parity.ladder import RUNGS, climb, select_rungs
    from flaxgpt.parity.problem import make_problem
    from flaxgpt.run.folder import write_text

    rungs = select_rungs(args.rungs or RUNGS)
    _check(args)
    ours, theirs, environment = _sides(args.device)
    cfg, weights, moments, source = _model(args)
    length = min(cfg.model.context_length, 64) if args.length is None else args.length
    sizes = {"seed": args.seed, "batch": args.batch, "length": length, "steps": args.steps}
    problem = make_problem(cfg, weights, moments=moments, **sizes)
    about = {"model": source, "config": cfg.model.to_dict(), "rungs": " ".join(rungs), "dtype": args.dtype, **sizes, **environment}
    shape = f"{cfg.model.n_layers} layers, width {cfg.model.emb_dim}, {sum(w.size for w in problem.weights.values()):,} parameters"
    print(f"{source}: {shape}; {args.dtype}, {args.batch} x {length} tokens, seed {args.seed}; flaxgpt on {environment['device']}")
    print(report.header())
    results, started = [], time.perf_counter()
    for result in climb(ours, theirs, problem, rungs, args.dtype):
        results.append(result)
        print("\n".join(report.lines(result)), flush=True)
    print("\n".join(report.verdict(results)), f"({time.perf_counter() - started:.0f} s)")

    if args.json:
        write_text(args.json, report.to_json(results, about))
    if args.plot and not report.save_plot(results, args.plot):
        print("no plot: it shows rungs 1 and 3, and neither was climbed", file=sys.stderr)
    if args.html:
        with tempfile.TemporaryDirectory() as folder:
            plot = Path(folder) / "plot.png"
            write_text(args.html, report.to_html(results, about, plot if report.save_plot(results, plot) else None))
    if not all(result.passed for result in results):
        sys.exit(1)


def _check(args: ReportArgs) -> None:
    if args.checkpoint and (args.preset or args.state_dict or args.init_from):
        raise InputError("--checkpoint brings its own config and weights: leave out --preset, --state-dict and --init-from")
    if args.init_from and (args.preset or args.state_dict):
        raise InputError("--init-from brings its own config and weights: leave out --preset and --state-dict")
    if args.n_heads is not None and (args.state_dict is None or args.preset):
        raise InputError("--n-heads goes with --state-dict alone: a preset or a checkpoint brings its own")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"seed={args.seed}: expected a value in [0, 2**32)")
    for path in (args.json, args.plot, args.html):
        if path and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise InputError(f"can't write {path}: it is a folder, or is in one that is not there")


def _sides(device: str | None) -> tuple[SeededSide, NoiseDrivenSide, dict[str, str]]:
    """Both sides, and what they run on."""
    import jax

    try:
        if device:
            jax.config.update("jax_default_device", jax.devices(device)[0])
        where = (jax.devices(device) if device else jax.devices())[0]
    except RuntimeError:
        raise InputError(f"device={device}: JAX has only {', '.join(sorted({d.platform for d in jax.devices()}))} here") from None
    try:
        import torch

        from torch_ref.parity import torch_side as theirs
    except ModuleNotFoundError as error:
        raise InputError(f'the reference needs {error.name}: pip install -e ".[parity]" (or "flaxgpt[parity]")') from None
    import flax
    import optax

    from flaxgpt.parity import flax_side as ours

    versions = {module.__name__: module.__version__ for module in (jax, flax, optax, torch)}
    return ours, theirs, {"device": f"{where.platform} ({where.device_kind})", **versions}


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
