"""Command lines: a training run as flags, and one clear line and exit code 2 for what a person can mend.

What is wrong with a flag, or with the config that the flags make, is reported by tyro, in its own frame and with the same exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import tyro

from flaxgpt.config import TrainConfig
from flaxgpt.convert.nanogpt import MODEL_ARGS
from flaxgpt.errors import InputError
from flaxgpt.run.folder import has_run, load_config
from flaxgpt.run.saved import start_of


@dataclass(frozen=True)
class Processes:
    """Several processes that train one model, with the same command in each (docs/hosts.md). What SLURM, Open MPI, Kubernetes or Cloud TPU
    has started is found without these flags.
    """

    coordinator: str | None = None
    """host:port at which all processes meet: a free port of the host of process 0."""
    num_processes: int | None = None
    """How many there are."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    join_timeout: int = 60
    """Seconds to wait at the start until all have come."""
    heartbeat_timeout: int = 45
    """Seconds after which a process that has not been heard of is taken for dead, and the others end."""

    def __post_init__(self) -> None:
        """Raises InputError where a number can't be."""
        for name in ("num_processes", "join_timeout", "heartbeat_timeout"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name}={value}: expected at least 1")


@dataclass(frozen=True)
class TrainArgs:
    """Which run, and where it goes."""

    preset: str = "tiny"
    """Where the other defaults come from: tiny, verdict-124m, shakespeare-char, gpt2-124m, -355m, -774m or -1558m."""
    out_dir: Path = Path("runs/tiny")
    """The run folder (by default runs/ and the preset's name)."""
    resume: bool = False
    """Go on with the run in out_dir, with its own config, from its newest checkpoint, or if there is none yet, from its start; flags may
    change how long and how often, not what."""
    overwrite: bool = False
    """Delete the run in out_dir first."""
    init_from: str | None = None
    """Fine-tune this model: a run folder, a Hugging Face folder, an id on its hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl,
    distilgpt2 or any other), nanoGPT's ckpt.pt, or a state_dict of the reference (.pth, .safetensors). It brings its
    architecture; the context can be shorter. A run that is resumed does not need it."""
    profile: str | None = None
    """START:STOP, the updates from START up to and without STOP: let JAX's profiler write a trace of them into the run folder."""
    config: tyro.conf.OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)
    source: tyro.conf.Suppress[Any] = None
    """That model, opened."""


@dataclass(frozen=True)
class JaxTrainArgs(TrainArgs):
    """Which run, where it goes, and who else trains it."""

    processes: tyro.conf.OmitArgPrefixes[Processes] = field(default_factory=Processes)


Args = TypeVar("Args", bound=TrainArgs)


def parse_train(
    description: str, args: list[str] | None = None, *, preset: str = "tiny", folder: str = "", kind: type[Args] = TrainArgs
) -> Args:
    """The arguments of a training script: the preset's config (with --resume, the run folder's) and the flags on top.

    With --init-from, the preset's model gives way to that one, which flags may shorten but not change. A run that is resumed has
    its own weights, and the source is not looked at.

    Without these flags, the preset is `preset`, and the run folder `folder` and the preset's name, in runs/. `kind` says which flags
    there are.

    Raises:
        InputError: an unknown preset, a run folder that can't be resumed, a model that the run can't start from, or flags of nanoGPT.
        SystemExit: with code 2, an unknown flag or a value that does not fit, which tyro has explained; with 0, after --help.
    """
    args = sys.argv[1:] if args is None else args
    _refuse_flags_of_nanogpt(args)
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--preset", default=preset)
    peek.add_argument("--out-dir", "--out_dir", type=Path)
    peek.add_argument("--init-from", "--init_from")
    peek.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False)
    first = argparse.Namespace(preset=preset, out_dir=None, resume=False, init_from=None)
    with contextlib.suppress(argparse.ArgumentError):  # a flag without its value: tyro will say so
        first = peek.parse_known_args(args)[0]
    out_dir = first.out_dir or Path("runs") / f"{folder}{first.preset}"
    try:
        out_dir.exists()
    except OSError as error:  # its name is too long
        raise InputError(f"choose another --out-dir ({error.strerror}): {out_dir}") from None
    resume = first.resume and has_run(out_dir)
    config = load_config(out_dir) if resume else TrainConfig.preset(first.preset)
    init_from = start_of(out_dir) if resume else first.init_from
    source = None
    if init_from:
        from flaxgpt.run.source import check_start, open_source, start_from

        source = open_source(init_from)
        config = config if resume else start_from(source, config)
    default = kind(preset=first.preset, out_dir=out_dir, config=config)
    parsed = tyro.cli(kind, args=args, default=default, description=description)
    if source:
        check_start(source, parsed.config)
    return dataclasses.replace(parsed, source=source)


_FLAGS_OF_NANOGPT = {
    **{theirs: f"--{ours.replace('_', '-')}" for theirs, ours in MODEL_ARGS.items() if theirs != ours},
    "bias=": "--bias or --no-bias, and --qkv-bias or --no-qkv-bias",
    "dataset": "--data",
    "max_iters": "--max-steps",
    "lr_decay_iters": "--decay-steps",
    "warmup_iters": "--warmup-steps",
    "min_lr": "--min-learning-rate",
    "decay_lr": "--min-learning-rate None for a constant rate",
    "grad_clip": "--clip-norm",
    "gradient_accumulation_steps": "--grad-accum-steps; --batch-size is that of a whole update",
    "eval_interval": "--eval-every",
    "eval_iters": "--eval-batches",
    "log_interval": "--log-every",
    "always_save_checkpoint": "--checkpoint-every",
    "compile": "leave it out: all is compiled",
    "device": "leave it out: JAX takes what there is, or what JAX_PLATFORMS says",
    "backend": "leave it out: JAX needs none",
    "eval_only": "leave it out: the first update is always evaluated",
    "wandb_log": "--wandb PROJECT",
    "wandb_project": "--wandb PROJECT",
    "wandb_run_name": "leave it out: it is the run folder's name",
}
"""nanoGPT's name of a flag -> ours. Those that both have by the same name are not here."""


def _refuse_flags_of_nanogpt(args: Sequence[str]) -> None:
    """InputError for nanoGPT's flags, with ours."""
    names = [arg.split("=")[0].removeprefix("--").replace("-", "_") + "=" * ("bias=" in arg) for arg in args if arg.startswith("--")]
    if theirs := [name for name in dict.fromkeys(names) if name in _FLAGS_OF_NANOGPT]:
        ours = "; ".join(f"--{name.rstrip('=')} -> {_FLAGS_OF_NANOGPT[name]}" for name in theirs)
        raise InputError(f"these are nanoGPT's flags; here they are: {ours}")
    if args and args[0].endswith(".py"):
        raise InputError(f"{args[0]}: a config is not a file here, as nanoGPT's are, but flags on top of a --preset")


def parse_updates(said: str) -> range:
    """The updates that START:STOP names.

    Raises:
        InputError: it names none.
    """
    found = re.fullmatch(r"(\d+):(\d+)", said)
    if not found or int(found[1]) >= int(found[2]):
        raise InputError(f"--profile {said}: expected START:STOP, two numbers of updates, the second larger; 10:13 for instance")
    return range(int(found[1]), int(found[2]))


@dataclass(frozen=True)
class PlanArgs:
    """Which run, and on what."""

    preset: str = "tiny"
    """Where the other defaults come from: tiny, verdict-124m, shakespeare-char, gpt2-124m, -355m, -774m or -1558m."""
    target: str = "here"
    """What to compile for: here (the devices of this machine), gpu:h100x8, tpu:v5e:4x4, tpu:v5p:2x2x2 and so on."""
    json: bool = False
    """Print the plan as JSON."""
    hlo: Path | None = None
    """Write the compiled program's text to this file, to be checked."""
    sweep: bool = False
    """Try the meshes of the target and when to gather on each, with the fewest microbatches that fit, and rank those that do."""
    config: tyro.conf.OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)


def parse_plan(description: str, args: list[str] | None = None) -> PlanArgs:
    """The arguments of `plan.py`: the preset's config and the flags on top.

    Raises:
        InputError: an unknown preset.
        SystemExit: as for `parse_train`.
    """
    args = sys.argv[1:] if args is None else args
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--preset", default="tiny")
    first = argparse.Namespace(preset="tiny")
    with contextlib.suppress(argparse.ArgumentError):  # a flag without its value: tyro will say so
        first = peek.parse_known_args(args)[0]
    default = PlanArgs(preset=first.preset, config=TrainConfig.preset(first.preset))
    return tyro.cli(PlanArgs, args=args, default=default, description=description)


def typed_text(value: str, flag: str) -> str:
    """The text that a flag gives: itself, that of a file (FILE:path), or standard input (-).

    Raises:
        InputError: it is empty, or can't be read.
    """
    if value.startswith("FILE:"):
        text = read_file(Path(value.removeprefix("FILE:")), flag)
    else:
        try:
            text = sys.stdin.read() if value == "-" else value
            text.encode()  # the shell passes on any bytes
        except UnicodeError:
            raise InputError(f"{flag}: {'standard input' if value == '-' else 'it'} is not UTF-8 text") from None
    if not text:
        raise InputError(f"the {flag} is empty: give at least one character with --{flag}")
    return text


def read_file(path: Path, flag: str) -> str:
    """The text of a file that a flag names.

    Raises:
        InputError: it can't be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{flag}: {path} is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"{flag}: can't read {path} ({error.strerror})") from None


def sample_command(out_dir: Path) -> str:
    """The command that samples from a run, for the terminal that the current script was started in."""
    script = Path(sys.argv[0])
    if script.suffix != ".py":
        return f"flaxgpt-sample --checkpoint {shlex.quote(str(out_dir))}"
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    return shlex.join([str(python), str(script.with_name("sample.py")), "--checkpoint", str(out_dir)])


def one_line_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Let `main` print an InputError as one line on standard error and exit with 2; anything else keeps its traceback."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except InputError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        except BrokenPipeError:  # the reader of our output has gone, `| head` for instance
            sys.stderr.close()
            sys.exit(1)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            sys.exit(130)

    return wrapped
