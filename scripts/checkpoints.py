"""The checkpoints of a run of train_jax.py: list them, verify them, delete one.

Examples:
  checkpoints.py list runs/mine              # updates, size, when, validation loss; which is the newest and the best; what is damaged
  checkpoints.py verify runs/mine            # the exit code is 1 if one is damaged
  checkpoints.py delete runs/mine 2000       # not the only one that is whole, unless --force is given

Each checkpoint holds the size and SHA-256 of all its files, and every file is read to compare them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from flaxgpt.errors import InputError
from flaxgpt.run.cli import one_line_errors
from flaxgpt.run.folder import CHECKPOINTS, TORCH_WEIGHTS, load_config
from flaxgpt.run.saved import DamagedError, best_step, remove, saved_steps, unfinished, val_losses, verify


@dataclass(frozen=True)
class List:
    """List a run's checkpoints, the oldest first."""

    run: tyro.conf.Positional[Path]
    """The run folder."""


@dataclass(frozen=True)
class Verify:
    """Say of each checkpoint whether it is what was saved; the exit code is 1 if one is not."""

    run: tyro.conf.Positional[Path]
    """The run folder."""


@dataclass(frozen=True)
class Delete:
    """Delete a checkpoint, without asking."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    step: tyro.conf.Positional[int]
    """Which one: its count of updates, as `list` shows it."""
    force: bool = False
    """Delete it even if no other is whole."""


Command = (
    Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Delete, tyro.conf.subcommand("delete")]
)


class Condition(NamedTuple):
    """What is known of a checkpoint: whether something of it is damaged, and in words."""

    damaged: bool
    words: str


@one_line_errors
def main() -> None:
    """Parse the command, do it."""
    args = tyro.cli(Command, description=__doc__)
    load_config(args.run)
    folder = args.run / CHECKPOINTS
    if not (steps := saved_steps(folder)) and not unfinished(folder):
        weights = f", only the weights {TORCH_WEIGHTS}" if (folder / TORCH_WEIGHTS).is_file() else ""
        raise InputError(f"no checkpoint in {folder}{weights}")
    if isinstance(args, Delete):
        delete(folder, steps, args.step, force=args.force)
        return
    conditions = {step: condition(folder / str(step)) for step in steps}
    conditions = {step: found for step, found in conditions.items() if (folder / str(step)).exists()}  # a run may go on meanwhile
    if isinstance(args, List):
        show(args.run, conditions)
        return
    for step, found in conditions.items():
        print(f"{folder / str(step)}: {found.words}")
    if any(found.damaged for found in conditions.values()):
        sys.exit(1)


def condition(path: Path) -> Condition:
    """Read all of a checkpoint and say what it is like."""
    try:
        return Condition(False, "whole" if verify(path) else "can't be verified: a version before 0.4 saved it, without checksums")
    except DamagedError as error:
        return Condition(True, f"damaged ({error})")


def show(run: Path, conditions: dict[int, Condition]) -> None:
    """Print the table."""
    folder, losses = run / CHECKPOINTS, val_losses(run)
    usable = [step for step, found in conditions.items() if not found.damaged]
    names = {"newest": max(usable, default=None), "best": best_step(run, usable)}
    print(f"{'updates':>9}{'size':>12}  {'saved':<19}{'val loss':>10}  condition")
    for step, found in conditions.items():
        words = ", ".join([found.words, *(name for name, named in names.items() if named == step)])
        print(f"{step:>9}{columns(folder / str(step))}{f'{losses[step]:.4f}' if step in losses else '-':>10}  {words}")
    for path in unfinished(folder):
        print(f"{path.name.split('.')[0]:>9}{columns(path)}{'-':>10}  unfinished: {path.name}")


def columns(path: Path) -> str:
    """The size of a checkpoint, in MB of a million bytes, and when it was saved."""
    try:
        size, saved = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()), path.stat().st_mtime
    except FileNotFoundError:  # the run has just finished or deleted it
        return f"{'-':>12}  {'-':<19}"
    return f"{size / 1e6:>9,.1f} MB  {datetime.fromtimestamp(saved):%Y-%m-%d %H:%M:%S}"


def delete(folder: Path, steps: list[int], step: int, *, force: bool) -> None:
    """Delete a checkpoint, or refuse to.

    Raises:
        InputError: there is no such checkpoint; or it is whole, no other is, and it is not to be forced.
    """
    if step not in steps:
        raise InputError(f"no checkpoint {step} in {folder}; there are {', '.join(map(str, steps)) or 'none'}")
    others = (folder / str(other) for other in reversed(steps) if other != step)
    if not force and not condition(folder / str(step)).damaged and all(condition(other).damaged for other in others):
        raise InputError(f"{folder / str(step)} is the only checkpoint that is whole: pass --force to delete it")
    remove(folder / str(step))
    print(f"deleted {folder / str(step)}")


if __name__ == "__main__":
    main()
