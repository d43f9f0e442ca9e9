"""A run in progress: its folder, and what the person at the terminal sees. Shared by both trainers; knows no framework."""

from __future__ import annotations

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
from flaxgpt.data.corpora import Corpus
from flaxgpt.errors import InputError
from flaxgpt.run.plots import save_loss_plot

CONFIG, TOKENIZER, DATA, SAMPLES = "config.json", "tokenizer.json", "data.json", "samples.txt"
METRICS, METRICS_CSV, LOSS_PLOT = "metrics.jsonl", "metrics.csv", "loss.png"
FILES = (CONFIG, TOKENIZER, DATA, SAMPLES, METRICS, METRICS_CSV, LOSS_PLOT)
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


def load_config(folder: Path) -> TrainConfig:
    """The config that a run folder was made with.

    Raises:
        InputError: the folder is not a run folder, or its config.json is damaged.
    """
    path = folder / CONFIG
    try:
        return TrainConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:  # ValueError: not UTF-8, not JSON, or not such a config
        raise InputError(f"{folder} is not a run folder: can't read {path} ({getattr(error, 'strerror', None) or error})") from None


def read_text(path: Path) -> str | None:
    """The text of a file of a run folder, None if it is not there."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_name(f".{path.name}.writing")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


class Run:
    """A run in progress: a context manager that writes the folder, prints progress and notices Ctrl-C.

    `begin`, then `step` for every update and `evaluation` where there is one. `stopped_by` turns from None to a signal's
    number when the process is asked to stop: the loop finishes its update, saves, evaluates and returns; a second Ctrl-C
    is obeyed at once.
    """

    def __init__(self, out_dir: Path, cfg: TrainConfig, corpus: Corpus, *, resume: bool = False, command: str = "") -> None:
        self.folder, self.cfg = out_dir, cfg
        self.stopped_by: int | None = None
        self._told_stop = False
        self._corpus, self._resume, self._command = corpus, resume, command
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
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._resume:  # nothing is there, or --overwrite is given: check_out_dir has seen to it
            shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
            for name in FILES:
                (self.folder / name).unlink(missing_ok=True)
        self._write(CONFIG, json.dumps(self.cfg.to_dict(), indent=2) + "\n")
        self._write(TOKENIZER, json.dumps(self._corpus.tokenizer.to_dict()) + "\n")
        self._write(DATA, self._corpus.fingerprint())
        self._records = [r for r in read_metrics(self.folder) if r["step"] < step]
        self._write(METRICS, "".join(json.dumps(r) + "\n" for r in self._records))
        samples = re.split(r"^(?=--- step \d+ ---$)", read_text(self.folder / SAMPLES) or "", flags=re.MULTILINE)
        self._write(SAMPLES, "".join(text for text in samples if text and int(text.split()[2]) < step))
        self._started = self._logged_at = time.perf_counter()
        self._first, self._logged_step = step, step - 1
        cfg = self.cfg
        self._console.print(
            f"{n_params:,} parameters on {devices}; {cfg.data}, {cfg.tokenizer} tokens, {cfg.tokens_per_step:,} an update; "
            f"updates {step} to {cfg.max_steps - 1} -> {self.folder}",
            markup=False,
        )
        if (length := len(self._corpus.tokenizer.encode(cfg.prompt))) > cfg.model.context_length:
            self._console.print(f"the prompt of the samples has {length} tokens; the model sees the last {cfg.model.context_length}")
        if self._console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task("compiling", total=cfg.max_steps, completed=step)
            self._progress.start()

    def step(self, step: int, loss: float, grad_norm: float, learning_rate: float) -> None:
        """Tell the result of an update; every `log_every`-th is recorded.

        Raises:
            InputError: the loss or its gradient is not finite, so that going on would be pointless.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise InputError(f"at step {step} the loss is {loss}, the gradient's norm {grad_norm}: lower learning_rate, or set clip_norm")
        if self.stopped_by is not None and not self._told_stop:
            self._told_stop = True
            self._console.print("stopping after this update; press Ctrl-C again to stop at once")
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
        save_loss_plot(self._records, self.folder / LOSS_PLOT, title=self.folder.name)
        self._console.print(
            f"evaluation at step {step}: train loss {train_loss:.3f}, val loss {val_loss:.3f}, val perplexity {_exp(val_loss):,.1f}",
            style="bold",
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
        self._write(METRICS_CSV, text.getvalue())

    def _write(self, name: str, text: str) -> None:
        write_text(self.folder / name, text)

    def _interrupt(self, number: int, frame: object) -> None:
        self.stopped_by = number
        signal.signal(signal.SIGINT, signal.default_int_handler)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The objects of a run folder's metrics.jsonl, in order; a last line cut off by a crash is left out.

    Raises:
        InputError: another line is not JSON.
    """
    lines = (read_text(folder / METRICS) or "").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise InputError(f"line {number} of {folder / METRICS} is damaged: mend or delete it") from None
    return records


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))
