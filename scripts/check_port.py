"""Compare your own port of a model with what it is a port of: two models in PyTorch, Flax (Linen or NNX) or plain JAX.

The file says what is compared, in about ten lines:

  # my_port.py
  import numpy as np, transformers
  from flaxgpt.port.linen_recorder import LinenRecorder       # or nnx_recorder, function_recorder
  from flaxgpt.port.pair import Pair
  from torch_ref.port.torch_recorder import TorchRecorder
  from my_model import Llama

  def make_pair():
      model = transformers.LlamaForCausalLM.from_pretrained("folder")
      batch = {"input_ids": np.arange(32).reshape(2, 16)}
      names = {"model.embed_tokens": "embed", "model.layers.{}.self_attn.q_proj": "layers.{}.attn.query"}
      return Pair(TorchRecorder(model, call=lambda m, b: m(**b).logits), LinenRecorder(Llama()), batch, names)

Examples:
  check_port.py my_port.py:make_pair --propose           # a first table of names, to be copied into the file
  check_port.py my_port.py:make_pair                     # all rungs: activations, loss, gradients, clipping, adamw, training
  check_port.py my_port.py:make_pair --rungs activations --html report.html
  check_port.py my_port.py:make_pair --dtype bfloat16 --bound "model.layers.*=0.02"

Both sides are run in float64 too, so each side's own rounding is known, of each tensor; the bounds follow from it. Named are the first
tensors at which the two part, forward and backward, and why, if it is one of the usual mistakes (docs/port.md). The exit code is 1 if
they part.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from flaxgpt.errors import InputError
from flaxgpt.run.cli import one_line_errors
from flaxgpt.run.process import give_freed_memory_back

if TYPE_CHECKING:
    from flaxgpt.port.pair import Pair


@dataclass(frozen=True)
class CheckArgs:
    """What is compared, how, and where the findings go."""

    target: tyro.conf.Positional[str]
    """A Python file and the function in it that returns a flaxgpt.port.pair.Pair: my_port.py:make_pair."""
    propose: bool = False
    """Compare nothing: print a table of names, made of names, shapes and order, and what it could not match."""
    rungs: tuple[str, ...] = ()
    """Some of activations, loss, gradients, clipping, adamw, training (and parameters, of a port that has its own); none: all."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """The precision under test. Both sides are run in float64 as well."""
    updates: int = 3
    """Updates on the rungs adamw and training."""
    learning_rate: float = 1e-3
    """Of those updates, where a recorder has no optimizer of its own."""
    weight_decay: float = 0.1
    """The same."""
    clip_norm: float = 1.0
    """The same: gradients are clipped to this global norm."""
    bound: tuple[str, ...] = ()
    """NAME=VALUE: what tensors of that name (or pattern, with *) may differ by, relative, in place of what follows from rounding."""
    exact_bound: tuple[str, ...] = ()
    """The same in float64."""
    json: Path | None = None
    """Write every figure of every tensor to this file."""
    plot: Path | None = None
    """Draw the differences by layer, as a PNG."""
    html: Path | None = None
    """Write a page with all of it that needs no other file."""


@one_line_errors
def main() -> None:
    """Parse the flags, make the pair, compare, report."""
    give_freed_memory_back()
    args = tyro.cli(CheckArgs, description=__doc__)

    from flaxgpt.parity import report
    from flaxgpt.port.check import NUMBERED, RUNGS, check
    from flaxgpt.port.propose import propose
    from flaxgpt.port.recorder import AdamW

    for path in (args.json, args.plot, args.html):
        if path and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise InputError(f"can't write {path}: it is a folder, or is in one that is not there")
    bounds, exact_bounds = _bounds(args.bound, "--bound"), _bounds(args.exact_bound, "--exact-bound")
    if args.updates < 1:
        raise InputError(f"updates={args.updates}: expected at least 1")
    pair = _pair(args.target)
    if args.propose:
        print("\n".join(propose(pair).lines))
        return
    reference, port = pair.reference.side, pair.port.side
    port = port if port != reference else f"{port} (port)"
    print(report.header(reference, port))
    verdict = check(
        pair,
        args.rungs or RUNGS,
        dtype=args.dtype,
        updates=args.updates,
        adamw=AdamW(learning_rate=args.learning_rate, weight_decay=args.weight_decay, clip_norm=args.clip_norm),
        bounds=bounds,
        exact_bounds=exact_bounds,
        progress=lambda result: print("\n".join(report.lines(result, NUMBERED)), flush=True),
    )
    print("\n".join([*report.verdict(verdict.results), *verdict.diagnosis]))
    about = {"target": args.target, "reference": reference, "port": port, "dtype": args.dtype, "diagnosis": list(verdict.diagnosis)}
    _write(args, verdict.results, about, (reference, port))
    if not verdict.passed:
        sys.exit(1)


def _write(args: CheckArgs, results: tuple, about: dict[str, object], sides: tuple[str, str]) -> None:
    import tempfile

    from flaxgpt.parity import report
    from flaxgpt.port.check import NUMBERED
    from flaxgpt.run.folder import write_text

    if args.json:
        write_text(args.json, report.to_json(results, about))
    if args.plot and not report.save_plot(results, args.plot, *sides):
        print("no plot: it shows activations and gradients, and neither was compared", file=sys.stderr)
    if args.html:
        with tempfile.TemporaryDirectory() as folder:
            plot = Path(folder) / "plot.png"
            drawn = report.save_plot(results, plot, *sides)
            write_text(args.html, report.to_html(results, about, plot if drawn else None, *sides, about["diagnosis"], NUMBERED))


def _bounds(given: tuple[str, ...], flag: str) -> dict[str, float]:
    bounds = {}
    for text in given:
        name, _, value = text.rpartition("=")
        try:
            bounds[name] = float(value)
        except ValueError:
            raise InputError(f"{flag} {text}: expected NAME=VALUE, as in model.layers.*=1e-5") from None
        if not name or not bounds[name] >= 0:
            raise InputError(f"{flag} {text}: expected NAME=VALUE, as in model.layers.*=1e-5")
    return bounds


def _pair(target: str) -> Pair:
    """What the function in the file returns."""
    from flaxgpt.port.pair import Pair

    file, _, name = target.rpartition(":")
    path = Path(file)
    if not file or not name.isidentifier():
        raise InputError(f"{target}: expected a file and a function in it, as in my_port.py:make_pair")
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    sys.path.insert(0, str(path.absolute().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None:
        raise InputError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    pair = _run(path, lambda: (spec.loader.exec_module(module), getattr(module, name, None))[1])
    if not callable(pair):
        raise InputError(f"{path} has no function {name}")
    pair = _run(path, pair)
    if not isinstance(pair, Pair):
        raise InputError(f"{target} returns a {type(pair).__name__}: expected a flaxgpt.port.pair.Pair")
    return pair


def _run(path: Path, function: object) -> object:
    """What the user's code makes; an error in it as one line that says where."""
    try:
        return function()
    except InputError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path.absolute()]
        at = f", line {lines[-1]}" if lines else ""
        raise InputError(f"{path}{at}: {type(error).__name__}: {error}") from error


if __name__ == "__main__":
    main()
