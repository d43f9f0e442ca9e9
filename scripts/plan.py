"""Plan a run before a machine is paid for: compile the step that training would, for devices that need not be there.

Nothing is run, and no data is read. The flags of the model and of the run are those of train_jax.py.

Examples:
  plan.py                                                        # the first run, on this machine
  plan.py --preset gpt2-1558m --target tpu:v5e:4x4 --fsdp 16
  plan.py --preset gpt2-124m --target gpu:h100x8 --json
  plan.py --preset gpt2-1558m --target gpu:h100x8 --sweep
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flaxgpt.errors import InputError
from flaxgpt.run.cli import PlanArgs, one_line_errors, parse_plan

if TYPE_CHECKING:
    from flaxgpt.plan.targets import Target


@one_line_errors
def main() -> None:
    """Parse the flags, compile, print what was found."""
    args = parse_plan(__doc__)
    if args.config.model.dtype == "float64":
        raise InputError("dtype=float64 is for comparisons (parity_report.py, replay.py): train in float32 or bfloat16")
    if args.hlo:
        check_writable(args.hlo)

    from flaxgpt.plan.plan import TooLargeError
    from flaxgpt.plan.report import show, show_options
    from flaxgpt.plan.search import options
    from flaxgpt.plan.targets import find_target

    target = find_target(args.target)
    if args.sweep:
        sweep(args, target)
        return
    try:
        plan, *others = options(args.config, target)
    except TooLargeError as error:
        raise InputError(f"{error}; {advice(args, target)}") from None
    if args.hlo:
        write(args.hlo, plan.hlo)
    if args.json:
        print(json.dumps(plan.to_dict() | {"others": [other.to_dict() for other in others]}, indent=2))
    else:
        show(plan, target.chip)
        if others:
            show_options([plan, *others])
    if not plan.fits:
        sizes = f"{plan.peak_bytes / 2**30:.2f} GiB of the {plan.memory_bytes / 2**30:.2f} GiB of a {plan.device}"
        raise InputError(f"it needs {sizes}; {advice(args, target)}")


def sweep(args: PlanArgs, target: "Target") -> None:
    """Try the target's meshes, each with the fewest microbatches that fit, and rank what fits."""
    from flaxgpt.plan.plan import Plan
    from flaxgpt.plan.report import show_ranking
    from flaxgpt.plan.search import left_out, rank, try_meshes

    if missing := left_out(args.config, target):
        print(missing, file=sys.stderr)
    found = []
    for run, tried in try_meshes(args.config, target):
        found.append(tried)
        said = f"grad_accum_steps {tried.grad_accum_steps}" if isinstance(tried, Plan) else tried
        print(f"fsdp {run.fsdp}, tensor {run.tensor}, gather {run.gather}: {said}", file=sys.stderr)
    plans = rank([tried for tried in found if isinstance(tried, Plan)])
    if not plans:
        raise InputError(f"no mesh of {target.name} can be used: {'; '.join(dict.fromkeys(found))}")
    if args.hlo:
        write(args.hlo, plans[0].hlo)
    if args.json:
        print(json.dumps([plan.to_dict() for plan in plans], indent=2))
    else:
        show_ranking(plans, target.chip)


def advice(args: PlanArgs, target: "Target") -> str:
    """What to do about a plan that does not fit."""
    from flaxgpt.plan.search import smallest_that_fits

    print("does not fit: looking for what does", file=sys.stderr)
    if plan := smallest_that_fits(args.config, target):
        values = {
            "fsdp": plan.mesh["fsdp"],
            "tensor": plan.mesh["tensor"],
            "gather": plan.gather,
            "grad_accum_steps": plan.grad_accum_steps,
        }
        changed = {name: value for name, value in values.items() if value != getattr(args.config, name)}
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changed.items())
        return f"the smallest change that fits is {flags} ({plan.peak_bytes / 2**30:.2f} GiB)"
    return f"no mesh of {target.name} fits, with any number of microbatches: take more devices, or larger ones"


def check_writable(path: Path) -> None:
    """InputError if `write` would fail: said before minutes of compiling."""
    if path.is_dir():
        raise InputError(f"{path} can't be written: it is a folder")
    try:
        part = part_of(path)
        part.touch()
        part.unlink()
    except OSError as error:
        raise InputError(f"{path} can't be written: {error.strerror}") from None


def write(path: Path, text: str) -> None:
    """Write the compiled program, whole or not at all."""
    try:
        part_of(path).write_text(text, encoding="utf-8")
        part_of(path).replace(path)
    except OSError as error:
        raise InputError(f"{path} can't be written: {error.strerror}") from None


def part_of(path: Path) -> Path:
    """What it is called until it is whole."""
    return path.with_name(f"{path.name}.part")


if __name__ == "__main__":
    main()
