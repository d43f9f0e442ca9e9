"""The run folder, and what the person at the terminal sees. Shared by both trainers; knows no framework."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flaxgpt.config import TrainConfig
from flaxgpt.corpus import Corpus, count_windows, load_corpus
from flaxgpt.errors import InputError
from flaxgpt.plots import save_loss_plot
from flaxgpt.tokenizer import Tokenizer, load_tokenizer

CONFIG, METRICS, SAMPLES, TOKENIZER = "config.json", "metrics.jsonl", "samples.txt", "tokenizer.json"
CHECKPOINTS = "checkpoints"
TORCH_WEIGHTS = "model.safetensors"
"""Name, within the checkpoints folder, of the weights that the reference saves."""

COLUMNS = (
    *("step", "tokens", "train/batch_loss", "train/loss", "val/loss", "train/perplexity", "val/perplexity"),
    *("learning_rate", "grad_norm", "tokens_per_second", "seconds"),
)
"""Columns of metrics.csv, and the keys that an object of metrics.jsonl may have.

`step` counts updates from 0 and the values are those after it; `tokens` is all that was trained on so far.
A log line has train/batch_loss (that update's own batch, dropout on), learning_rate, grad_norm (before clipping),
tokens_per_second (since the last log line) and seconds (since the start of this process's training). An evaluation has
the losses, in nats per token, and perplexities of both splits.
"""

CHANGEABLE = (
    "max_steps",
    "log_every",
    "eval_every",
    "eval_batches",
    "checkpoint_every",
    "keep_checkpoints",
    "prompt",
    "sample_tokens",
    "fsdp",
)
"""What `--resume` may change: how long to train and how to look, not what is trained on what."""


def load_config(folder: Path) -> TrainConfig:
    """The config that a run folder was made with.

    Raises:
        InputError: the folder is not a run folder, or its config.json is damaged.
    """
    path = folder / CONFIG
    try:
        return TrainConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"{folder} is not a run folder: can't read {path} ({getattr(error, 'strerror', None) or error})") from None


def check_out_dir(out_dir: Path, cfg: TrainConfig, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder that this run must not touch; changes nothing.

    Raises:
        InputError: the folder has contents and neither flag is given, `--resume` finds no run or one of another
            config, or `--overwrite` would delete something that is not a run folder.
    """
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    if resume:
        saved, new = load_config(out_dir).to_dict(), cfg.to_dict()
        if changed := [name for name in saved if saved[name] != new[name] and name not in CHANGEABLE]:
            raise InputError(f"--resume can't change {', '.join(changed)}; start another run with another --out-dir")
    elif out_dir.exists() and not out_dir.is_dir():
        raise InputError(f"{out_dir} is a file: choose another --out-dir")
    elif out_dir.is_dir() and any(out_dir.iterdir()):
        if not overwrite:
            raise InputError(f"{out_dir} exists: pass --resume to go on with it, --overwrite to delete it, or another --out-dir")
        if not (out_dir / CONFIG).is_file():
            raise InputError(f"{out_dir} is not a run folder (it has no {CONFIG}): --overwrite will not delete it")


def prepare(cfg: TrainConfig, out_dir: Path, *, resume: bool = False, overwrite: bool = False, command: str = "") -> tuple[Run, Corpus]:
    """Load the data, fit the vocabulary to it, and check all that can be checked before anything is written.

    Args:
        cfg: the run; its vocabulary size is made to fit the tokenizer.
        out_dir: the run folder.
        resume: go on with the run in it.
        overwrite: delete the run in it, once this one begins.
        command: what the summary names as the way to sample from the run.

    Raises:
        InputError: see `load_corpus` and `check_out_dir`; or the data does not fit the model or the resumed run.
    """
    corpus = load_corpus(cfg.data, cfg.tokenizer, cfg.train_ratio)
    tokenizer = corpus.tokenizer
    # A character model has the text's alphabet; a larger vocabulary than GPT-2's is padding, which some accelerators like.
    vocab_size = tokenizer.vocab_size if cfg.tokenizer == "char" else max(tokenizer.vocab_size, cfg.model.vocab_size)
    cfg = cfg.replace(model=cfg.model.replace(vocab_size=vocab_size))
    prompt_ids(cfg, corpus)
    count_windows(len(corpus.train), cfg, "training")
    count_windows(len(corpus.val), cfg, "validation")
    check_out_dir(out_dir, cfg, resume=resume, overwrite=overwrite)
    if resume and load_tokenizer(out_dir / TOKENIZER).to_dict() != tokenizer.to_dict():
        raise InputError(f"--resume: the alphabet of {cfg.data} is not the one that {out_dir} was trained on")
    return Run(out_dir, cfg, tokenizer, resume=resume, command=command), corpus


def prompt_ids(cfg: TrainConfig, corpus: Corpus) -> list[int]:
    """What the samples of a run start from: its prompt, or two whole words from the start of the validation text."""
    if cfg.prompt:
        return corpus.tokenizer.encode(cfg.prompt)
    text = corpus.tokenizer.decode(corpus.val[:200].tolist())
    words = re.search(r"\s(\S+\s+\S+)\s", text)
    return corpus.tokenizer.encode(words[1] if words else text[:8])


class Run:
    """A run in progress: a context manager that writes the folder, prints progress and notices Ctrl-C.

    `begin`, then `step` for every update and `evaluation` where there is one. `interrupted` turns true when the
    process is asked to stop: the loop finishes its update, evaluates, saves and returns; a second Ctrl-C is obeyed at once.
    """

    def __init__(self, out_dir: Path, cfg: TrainConfig, tokenizer: Tokenizer, *, resume: bool = False, command: str = "") -> None:
        self.folder, self.cfg, self.interrupted = out_dir, cfg, False
        self._tokenizer, self._resume, self._command = tokenizer, resume, command
        self._records: list[dict[str, Any]] = []
        self._console = Console(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def begin(self, step: int, *, n_params: int, devices: str) -> None:
        """Make the folder. Training starts at this update (0, or where the checkpoint was made): later records are forgotten."""
        if not self._resume and self.folder.exists():
            shutil.rmtree(self.folder)  # empty, or --overwrite: check_out_dir has seen to it
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(CONFIG, json.dumps(self.cfg.to_dict(), indent=2) + "\n")
        self._write(TOKENIZER, json.dumps(self._tokenizer.to_dict()) + "\n")
        self._records = [r for r in read_metrics(self.folder) if r["step"] < step] if step else []
        self._write(METRICS, "".join(json.dumps(r) + "\n" for r in self._records))
        if not step:
            self._write(SAMPLES, "")
        self._started = self._logged_at = time.perf_counter()
        self._first, self._logged_step = step, step - 1
        cfg = self.cfg
        self._console.print(
            f"{n_params:,} parameters on {devices}; {cfg.data}, {cfg.tokenizer} tokens, {cfg.tokens_per_step:,} an update; "
            f"updates {step} to {cfg.max_steps - 1} -> {self.folder}"
        )
        if self._console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task("compiling", total=cfg.max_steps, completed=step)
            self._progress.start()

    def step(self, step: int, loss: float, grad_norm: float, learning_rate: float) -> None:
        """Tell the result of an update; every `log_every`-th is recorded.

        Raises:
            InputError: the loss is not finite, so that going on would be pointless.
        """
        if not math.isfinite(loss):
            raise InputError(f"the loss at step {step} is {loss}: lower learning_rate, or set clip_norm")
        now = time.perf_counter()
        logs = step % self.cfg.log_every == 0 or step == self.cfg.max_steps - 1
        rate = (step - self._logged_step) * self.cfg.tokens_per_step / (now - self._logged_at)
        if self._progress:
            self._progress.update(self._task, completed=step + 1, description=f"loss {loss:.3f}  {rate:,.0f} tokens/s")
        if not logs:
            return
        self._logged_step, self._logged_at = step, now
        self._record(
            step,
            {"train/batch_loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm, "tokens_per_second": rate},
        )
        if not self._progress:
            left = (now - self._started) / (step - self._first + 1) * (self.cfg.max_steps - 1 - step)
            self._console.print(f"step {step:>6}/{self.cfg.max_steps}  loss {loss:.3f}  {rate:,.0f} tokens/s  {left:,.0f} s left")

    def evaluation(self, step: int, train_loss: float, val_loss: float, sample: str) -> None:
        """Record an evaluation, draw the plot anew, and show and keep the sample."""
        losses = {"train/loss": train_loss, "val/loss": val_loss}
        perplexities = {"train/perplexity": _exp(train_loss), "val/perplexity": _exp(val_loss)}
        self._record(step, losses | perplexities)
        self._write_csv()
        save_loss_plot(self._records, self.folder / "loss.png", title=self.folder.name)
        self._console.print(
            f"[bold]evaluation at step {step}[/]: train loss {train_loss:.3f}, val loss {val_loss:.3f}, "
            f"val perplexity {_exp(val_loss):,.1f}"
        )
        if sample:
            with (self.folder / SAMPLES).open("a", encoding="utf-8") as file:
                file.write(f"--- step {step} ---\n{sample}\n\n")
            self._console.print("    " + " ".join(sample.split()), markup=False)
        self._logged_step, self._logged_at = step, time.perf_counter()  # tokens_per_second is of training alone

    def summary(self) -> None:
        """What was reached, where it is, and how to go on."""
        last = [r for r in self._records if "val/loss" in r][-1]
        table = {
            "step": f"{last['step']} ({last['tokens']:,} tokens, {last['seconds']:,.0f} s)",
            "train": f"loss {last['train/loss']:.3f}, perplexity {last['train/perplexity']:,.1f}",
            "validation": f"loss {last['val/loss']:.3f}, perplexity {last['val/perplexity']:,.1f}",
            "files": f"{self.folder}/: loss.png, metrics.csv, metrics.jsonl, samples.txt, {CHECKPOINTS}/",
            "sample": self._command,
        }
        if self.interrupted:
            table["go on"] = f"the same command with --resume (stopped after {last['step'] + 1} of {self.cfg.max_steps} updates)"
        if self._progress:
            self._progress.stop()
            self._progress = None
        self._console.print("\n".join(f"{name + ':':<12}{value}" for name, value in table.items()), markup=False)

    def _record(self, step: int, values: dict[str, float]) -> None:
        seconds = time.perf_counter() - self._started
        record = {"step": step, "tokens": (step + 1) * self.cfg.tokens_per_step, **values, "seconds": round(seconds, 3)}
        self._records.append(record)
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _write_csv(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        rows: dict[int, dict[str, Any]] = {}
        for record in self._records:  # a log line and an evaluation of the same update share a row
            rows[record["step"]] = rows.get(record["step"], {}) | record
        writer.writerows(rows.values())
        self._write("metrics.csv", text.getvalue())

    def _write(self, name: str, text: str) -> None:
        scratch = self.folder / f".{name}.writing"
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, self.folder / name)

    def _interrupt(self, number: int, frame: object) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._console.print("stopping after this update; press Ctrl-C again to stop at once")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The objects of a run folder's metrics.jsonl, in order; a last line cut off by a crash is left out."""
    records = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
            records.append(json.loads(line))
    return records


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))
