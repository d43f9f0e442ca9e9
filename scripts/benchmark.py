"""Time flaxgpt beside other implementations, in one process, in alternating rounds; and say what the machine would allow.

Examples:
  benchmark.py train                                 # an update of GPT-2 124M and its parts, 2 rows of 256 tokens, against torch
  benchmark.py train --preset shakespeare-char --drop-rate 0.1 --plot update.png
  benchmark.py generate --batch 1 8                  # greedy decoding of GPT-2 124M against Hugging Face's generate with its cache
  benchmark.py run --preset shakespeare-char         # train_jax.py against train_torch.py, whole processes, start-up included
  benchmark.py run --preset shakespeare-char --against "python train.py ..."    # or against any other command
  benchmark.py compile                               # seconds to compile an update, for 12, 24 and 48 layers
  benchmark.py memory                                # what a process that trains holds at most
  benchmark.py patch --prompt-tokens 16 --rounds 3   # activation patching at every layer and position, against hooks one at a time
  benchmark.py all --quick                           # all of it, small, in about three minutes

Each round times every implementation, in the other order than the round before. The table has medians, from the least to the most,
how many times theirs ours is (below 1: we are faster), and how many times the floor: the arithmetic at the rate, the bytes at the
bandwidth that this machine reached just before. Compilation and first calls are not timed, but by `run` and `compile`. Weights are
random. `pip install -e ".[parity,test]"` brings the others; who is not there is left out, and the table says so.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import tyro

from flaxgpt.config import GPTConfig, TrainConfig
from flaxgpt.errors import InputError
from flaxgpt.run.cli import one_line_errors
from flaxgpt.run.folder import write_text
from flaxgpt.run.process import keep_memory_and_programs

if TYPE_CHECKING:
    import jax
    import numpy as np
    import torch

    from flaxgpt.benchmark.floors import Rates
    from flaxgpt.benchmark.timing import Call, Row

Made = TypeVar("Made")
What = Literal["train", "generate", "run", "compile", "memory", "patch"]
Part = Literal["forward", "gradients", "optimizer", "update"]


@dataclass(frozen=True)
class BenchmarkArgs:
    """What to time, and how often."""

    what: tyro.conf.Positional[Literal[What, "all"]]
    """train: an update and its parts. generate: reading prompts and greedy decoding. run: whole training processes. compile: the update's
    compilation, by depth. memory: the peak of a process that trains. patch: activation patching. all: each of these."""
    preset: str = "gpt2-124m"
    """The model (and of run, the run): a preset of train_jax.py."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of generate, weights and activations on both sides. Others are in float32."""
    rows: int = 2
    """Of train, compile and memory: rows in the batch."""
    tokens: int = 256
    """And tokens in each, at most the model's context."""
    drop_rate: float = 0.0
    """And dropout."""
    parts: tuple[Part, ...] = ("forward", "gradients", "optimizer", "update")
    """Of train: what is timed. forward: the loss alone, without dropout. gradients: loss and gradients. optimizer: clipping and AdamW."""
    only: tuple[str, ...] = ()
    """Time only those whose name contains one of these, such as flaxgpt, "fused AdamW" or compile."""
    batch: tuple[int, ...] = (1, 8)
    """Of generate: rows decoded at once."""
    prompt_tokens: int = 32
    """Of generate and patch: tokens in each row's prompt."""
    new_tokens: int = 128
    """Of generate: tokens added to each row."""
    depths: tuple[int, ...] = (12, 24, 48)
    """Of compile: numbers of layers."""
    max_steps: int | None = None
    """Of run: updates, where not the preset's."""
    against: str | None = None
    """Of run: another command to time beside, in the place of train_torch.py; {folder} in it becomes a new folder."""
    rounds: int = 5
    """How often each is timed."""
    quick: bool = False
    """Small models and few rounds: whether it works, not how fast it is."""
    json: Path | None = None
    """Write everything there, machine and versions included."""
    plot: Path | None = None
    """Draw it there, as PNG or SVG by the name."""

    def __post_init__(self) -> None:
        """Raises InputError where a number can't be."""
        for name in ("rows", "tokens", "prompt_tokens", "new_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: expected at least 1")
        for name in ("batch", "depths"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise InputError(f"{name}={getattr(self, name)}: expected numbers from 1 on")
        if self.plot and self.plot.suffix not in (".png", ".svg"):
            raise InputError(f"--plot {self.plot}: expected a name that ends in .png or .svg")
        for path in filter(None, (self.json, self.plot)):
            if not path.parent.is_dir():
                raise InputError(f"{path}: there is no folder {path.parent}")
            if path.exists() and not path.is_file():
                raise InputError(f"can't write {path}: it is not a file")
        if self.plot and not (wanted(self, "flaxgpt") or wanted(self, "train_jax.py")):
            raise InputError("--plot draws what others take as multiples of ours: name flaxgpt too in --only")
        if self.against is not None and not (self.against.split() and shutil.which(shlex.split(self.against)[0])):
            raise InputError(f"--against {self.against!r}: expected a command that can be run")
        context = GPTConfig.preset(self.preset).context_length
        new_tokens = self.new_tokens if self.what != "patch" else 0
        if self.what in ("generate", "patch", "all") and not self.quick and self.prompt_tokens + new_tokens > context:
            raise InputError(f"prompt_tokens and new_tokens together exceed context_length={context}")


QUICK = {"rows": 4, "tokens": 32, "batch": (1, 2), "prompt_tokens": 8, "new_tokens": 8, "depths": (2, 4), "max_steps": 20, "rounds": 2}
"""What --quick sets, beside the preset tiny; torch.compile is left out, since it compiles for a minute."""


@one_line_errors
def main() -> None:
    """Parse the flags, time, show, write."""
    keep_memory_and_programs()
    args = tyro.cli(BenchmarkArgs, description=__doc__)
    if args.quick:
        only = args.only or ("flaxgpt", "torch_ref", "Hugging Face", "train_", "hooks")
        args = dataclasses.replace(args, **QUICK, preset="tiny", only=only)
    timed: dict[str, Callable[[BenchmarkArgs, dict[str, Rates]], Iterator[Row]]] = {
        "train": train, "generate": generate, "run": run, "compile": compile_, "memory": memory, "patch": patch,
    }  # fmt: skip

    from rich.console import Console

    from flaxgpt.benchmark.floors import measure_rates
    from flaxgpt.benchmark.report import describe_machine, save_plot, table, to_json

    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(", ".join(f"{name} {value}" for name, value in describe_machine().items()), highlight=False)
    dtypes = {"generate": (args.dtype,), "all": dict.fromkeys(("float32", args.dtype))}.get(args.what, ("float32",))
    rates = {dtype: measure_rates(dtype) for dtype in dtypes}
    for dtype, reached in rates.items():
        bandwidths = f"{reached.bandwidth / 1e9:.1f} GB/s read, {reached.update_bandwidth / 1e9:.1f} GB/s changed in place"
        console.print(f"reached in {dtype}: {reached.flops / 1e9:.0f} GFLOP/s of products, {bandwidths}", highlight=False)
    found = []
    for name in timed if args.what == "all" else [args.what]:
        with console.status(f"{name} ..."):
            found += timed[name](args, rates)
    if not found:
        raise InputError(f"--only {' '.join(args.only)} names nobody who is timed here")
    console.print(table(found))
    if args.json:
        write_text(args.json, json.dumps(to_json(found, rates, shlex.join(sys.argv)), indent=1))
    if args.plot:
        save_plot(found, args.plot, ", ".join(list(describe_machine().values())[:1]))


def train(args: BenchmarkArgs, reached: dict[str, Rates]) -> Iterator[Row]:
    """An update and its parts, ours and those of the variants of torch."""
    from flaxgpt.benchmark import calls, floors
    from flaxgpt.benchmark.timing import rows
    from flaxgpt.state import count_params

    rates = reached["float32"]
    cfg, batch = training(args)
    ours = calls.update_parts(cfg, batch, args.parts) if wanted(args, "flaxgpt") else {}
    theirs, missing = peers(args, lambda torch_side, variant: torch_side.update_parts(cfg, batch, variant, args.parts))
    forward, gradients = floors.of_forward(cfg, rates), floors.of_gradients(cfg, rates)
    optimizer = floors.of_optimizer(count_params(calls.shapes(cfg)), rates)
    least = {"forward": forward, "gradients": gradients, "optimizer": optimizer, "update": gradients + optimizer}
    for part in args.parts:
        sides = {"flaxgpt": ours} | theirs
        timed = {who: made[part] for who, made in sides.items() if made}
        yield from rows(f"{part}, {sizes(args)}", timed, args.rounds, floor=least[part])
        yield from (dataclasses.replace(row, work=f"{part}, {sizes(args)}") for row in missing)


def generate(args: BenchmarkArgs, reached: dict[str, Rates]) -> Iterator[Row]:
    """Reading prompts (one new token), and greedy decoding."""
    import numpy as np

    from flaxgpt.benchmark import calls, floors
    from flaxgpt.benchmark.timing import rows
    from flaxgpt.state import count_params

    cfg = model_of(args).replace(dtype=args.dtype)
    n_params = count_params(calls.shapes(TrainConfig(model=cfg)))
    for batch in args.batch:
        for new_tokens in (1, args.new_tokens):
            prompt_BT = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, args.prompt_tokens))
            timed: dict[str, Call] = {"flaxgpt": calls.generation(cfg, prompt_BT, new_tokens)} if wanted(args, "flaxgpt") else {}
            theirs, missing = peers(args, lambda torch_side, _: torch_side.generation(cfg, prompt_BT, new_tokens), ("Hugging Face",))  # noqa: B023
            work = f"{new_tokens} tokens after {args.prompt_tokens}, {args.preset}, {args.dtype}, batch {batch}"
            floor = floors.of_decoding(cfg, n_params, batch, new_tokens, args.prompt_tokens, reached[args.dtype])
            yield from rows(work, timed | theirs, args.rounds, floor=floor)
            yield from (dataclasses.replace(row, work=work) for row in missing)


def run(args: BenchmarkArgs, _: dict[str, Rates]) -> Iterator[Row]:
    """Whole processes that train, from their start to their end; what they have compiled is not kept from one to the next."""
    from flaxgpt.benchmark.timing import rows

    scripts = Path(__file__).parent
    steps = () if args.max_steps is None else ("--max-steps", str(args.max_steps))
    commands = {
        name: [sys.executable, str(scripts / name), "--preset", args.preset, *steps, "--overwrite", "--out-dir", "{folder}/run"]
        for name in ("train_jax.py", "train_torch.py")
    }
    if args.against:  # first, so that a command that fails does so at once
        commands = {args.against: shlex.split(args.against), "train_jax.py": commands["train_jax.py"]}

    def process(command: list[str]) -> Call:
        def call() -> None:
            with tempfile.TemporaryDirectory() as folder:
                environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/programs"}
                filled = [part.replace("{folder}", folder) for part in command]
                done = subprocess.run(filled, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                if done.returncode:
                    last = (done.stdout.strip().splitlines() or ["nothing was printed"])[-1]
                    raise InputError(f"{shlex.join(command)} ended with {done.returncode}: {last}")

        return call

    timed = {who: process(command) for who, command in commands.items() if who == args.against or wanted(args, who)}
    timed_rows = rows(f"a run of {args.preset}, {args.max_steps or 'all'} updates", timed, args.rounds, warm=False)
    yield from sorted(timed_rows, key=lambda row: not row.is_ours)


def compile_(args: BenchmarkArgs, _: dict[str, Rates]) -> Iterator[Row]:
    """Tracing and compiling the update, by depth."""
    from flaxgpt.benchmark import calls
    from flaxgpt.benchmark.timing import Row

    cfg, batch = training(args)
    for depth in args.depths:
        deep = cfg.replace(model=cfg.model.replace(n_layers=depth))
        seconds = tuple(calls.compile_seconds(deep, batch) for _ in range(min(args.rounds, 2)))
        yield Row(f"compiling an update, {sizes(args)}, {depth} layers", "flaxgpt", "s", seconds)


def memory(args: BenchmarkArgs, _: dict[str, Rates]) -> Iterator[Row]:
    """The most memory that a process holds which makes updates, imports and compilation included: this script with one side alone."""
    from flaxgpt.benchmark.timing import Row

    for who in ("flaxgpt", "torch_ref, fused AdamW"):
        if not wanted(args, who):
            continue
        flags = ["--preset", args.preset, "--rows", args.rows, "--tokens", args.tokens, "--drop-rate", args.drop_rate]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "peak.json"
            alone = ["train", *flags, "--parts", "update", "--rounds", "3", "--only", who, "--json", path]
            done = subprocess.run(
                [sys.executable, __file__, *map(str, alone)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            peak = (json.loads(path.read_text())["peak_memory_gb"],) if done.returncode == 0 else ()
            last = (done.stderr.strip().splitlines() or [""])[-1]
            yield Row(f"peak memory, {sizes(args)}", who, "GB", peak, note="" if peak else last)


def patch(args: BenchmarkArgs, _: dict[str, Rates]) -> Iterator[Row]:
    """Activation patching: another run's residual stream put into that of a prompt, at every layer and position."""
    import jax
    import numpy as np
    import torch

    from flaxgpt.benchmark.timing import rows
    from flaxgpt.convert.params import from_torch
    from flaxgpt.interpret.activations import activations
    from flaxgpt.interpret.patching import patch_each
    from torch_ref.interpret import patching as hooks
    from torch_ref.model import GPTModel

    cfg = model_of(args).replace(dtype="float32")
    model = GPTModel(cfg).eval()
    params = jax.device_put(from_torch({name: value.numpy() for name, value in model.state_dict().items()}, cfg))
    tokens_T, other_T = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, args.prompt_tokens))
    _, taken = jax.jit(lambda params: activations(params, cfg, other_T[None], ["trf_blocks.{}.shortcut2"]))(params)
    other_LTD = taken["trf_blocks.{}.shortcut2"][:, 0]
    given = torch.from_numpy(tokens_T), torch.from_numpy(np.array(other_LTD))

    def metric(logits_V: jax.Array | torch.Tensor) -> jax.Array | torch.Tensor:
        return logits_V[0] - logits_V[1]

    calls = {
        "flaxgpt": lambda: patch_each(params, cfg, tokens_T, other_LTD, metric).block_until_ready(),
        "hooks one at a time": lambda: hooks.patch_each(model, *given, metric),
    }
    places = cfg.n_layers * args.prompt_tokens
    yield from rows(f"patching {places} places, {args.preset}, {args.prompt_tokens} tokens", calls, args.rounds)


def model_of(args: BenchmarkArgs) -> GPTConfig:
    """The preset's model, without dropout."""
    return GPTConfig.preset(args.preset).replace(drop_rate=0.0)


def training(args: BenchmarkArgs) -> tuple[TrainConfig, tuple[np.ndarray, np.ndarray]]:
    """The run whose update is timed, and its batch."""
    import numpy as np

    cfg = TrainConfig.preset(args.preset)
    tokens = min(args.tokens, cfg.model.context_length)
    model = cfg.model.replace(dtype="float32", remat="none", drop_rate=args.drop_rate, context_length=tokens)
    cfg = cfg.replace(model=model, batch_size=args.rows, grad_accum_steps=1)
    tokens_BT = np.random.default_rng(0).integers(0, model.vocab_size, (args.rows, tokens + 1), dtype=np.int32)
    return cfg, (tokens_BT[:, :-1], tokens_BT[:, 1:])


def sizes(args: BenchmarkArgs) -> str:
    """What is trained, in words."""
    tokens = min(args.tokens, GPTConfig.preset(args.preset).context_length)
    return f"{args.preset}, {args.rows} x {tokens}" + (f", dropout {args.drop_rate}" if args.drop_rate else "")


def wanted(args: BenchmarkArgs, who: str) -> bool:
    """Whether `--only` leaves it in."""
    return not args.only or any(part in who for part in args.only)


def peers(args: BenchmarkArgs, make: Callable[..., Made], variants: tuple[str, ...] | None = None) -> tuple[dict[str, Made], list[Row]]:
    """What `make(torch_ref.benchmark.calls, variant)` makes for each variant that is wanted, and rows that say why some are not there."""
    from flaxgpt.benchmark.timing import Row

    try:
        from torch_ref.benchmark import calls as torch_side
    except ImportError as error:
        return {}, [Row("", "torch", "s", (), note=f"{error.name} is not installed")]
    made, missing = {}, []
    for variant in variants or torch_side.VARIANTS:
        if wanted(args, variant):
            try:
                made[variant] = make(torch_side, variant)
            except ImportError as error:
                missing.append(Row("", variant, "s", (), note=f"{error.name} is not installed"))
    return made, missing


if __name__ == "__main__":
    main()
