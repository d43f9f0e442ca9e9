"""The run folder: what its files are called, and reading and writing them."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flaxgpt.config import TrainConfig
from flaxgpt.errors import InputError

if TYPE_CHECKING:
    from flaxgpt.run.watchers import Start

CONFIG, TOKENIZER, DATA, SAMPLES = "config.json", "tokenizer.json", "data.json", "samples.txt"
METRICS, METRICS_CSV, LOSS_PLOT, REPORT = "metrics.jsonl", "metrics.csv", "loss.png", "report.html"
START = "init_from.txt"
"""The model that a run started from, if it did not start from random weights."""
WANDB_ID = "wandb.txt"
"""The run's id at Weights & Biases, whose files are in a folder WANDB."""
FILES = (CONFIG, TOKENIZER, DATA, SAMPLES, METRICS, METRICS_CSV, LOSS_PLOT, REPORT, START, WANDB_ID)
CHECKPOINTS, TENSORBOARD, WANDB, PROFILE, LOCK = "checkpoints", "tensorboard", "wandb", "profile", ".lock"
TORCH_WEIGHTS = "model.safetensors"
"""Name, within the checkpoints folder, of the weights that the reference saves."""

Record = dict[str, float]
"""An object of metrics.jsonl, with some of the keys in COLUMNS."""

PARTS = ("data", "compute", "evaluation", "checkpoint")
"""What the loop's time goes to: making batches, updates (also waiting for them), evaluating with sampling, saving as far as it holds up."""

COLUMNS = (
    *("step", "tokens", "train/batch_loss", "train/loss", "val/loss", "train/perplexity", "val/perplexity"),
    *("learning_rate", "grad_norm", "tokens_per_second", "mfu", "seconds", *(f"seconds/{part}" for part in PARTS), "skipped"),
)
"""Columns of metrics.csv, and the keys that an object of metrics.jsonl may have.

`step` counts updates from 0 and the values are those after it; `tokens` is all that was trained on so far.
A log line has train/batch_loss (that update's own batch, dropout on), learning_rate, grad_norm (before clipping),
tokens_per_second (since the last log line or evaluation), mfu (what share of the devices' peak that is, where it is known), seconds (since
the start of this process's training), seconds/data and seconds/compute (since the last log line) and, where updates were skipped
because they were not finite, how many until then. An evaluation has the losses, in nats per token, and perplexities of both splits,
seconds, seconds/evaluation (its own) and seconds/checkpoint (since the last evaluation).
"""


class RunFolder:
    """What a run has on disk, but for its checkpoints and pictures. A `flaxgpt.run.watchers.Watcher`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []

    def begin(self, start: Start) -> None:
        """Make the folder. A new run deletes what is in it, one that is resumed only the records from its first update on."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not start.resume:
            for name in (CHECKPOINTS, TENSORBOARD, WANDB, PROFILE):
                shutil.rmtree(self.path / name, ignore_errors=True)
            for name in FILES:
                (self.path / name).unlink(missing_ok=True)
        if start.init_from:
            self._write(START, start.init_from)
        self._write(CONFIG, json.dumps(start.cfg.to_dict(), indent=2) + "\n")
        self._write(TOKENIZER, json.dumps(start.corpus.tokenizer.to_dict()) + "\n")
        self._write(DATA, start.corpus.fingerprint())
        self.records = [record for record in read_metrics(self.path) if record["step"] < start.step]
        self._write(METRICS, "".join(json.dumps(record) + "\n" for record in self.records))
        self._write(SAMPLES, "".join(_sample(step, text) for step, text in self.samples() if step < start.step))

    def record(self, record: Record) -> None:
        """The next line of metrics.jsonl."""
        self.records.append(record)
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def sample(self, step: int, text: str) -> None:
        """The next part of samples.txt."""
        with (self.path / SAMPLES).open("a", encoding="utf-8") as file:
            file.write(_sample(step, text))

    def sync(self) -> None:
        """Have metrics.jsonl and samples.txt on disk, also if the host should die."""
        for name in (METRICS, SAMPLES):
            with (self.path / name).open("a") as file:
                os.fsync(file.fileno())

    def samples(self) -> list[tuple[int, str]]:
        """What is in samples.txt: after which update, and the text."""
        _, *parts = re.split(r"^--- step (\d+) ---\n", read_text(self.path / SAMPLES) or "", flags=re.MULTILINE)
        return [(int(step), text.removesuffix("\n\n")) for step, text in zip(parts[::2], parts[1::2], strict=True)]

    def close(self) -> None:
        """All is written."""

    def write_csv(self) -> None:
        """Write metrics.csv anew from all records; a log line and an evaluation of the same update share a row."""
        rows: dict[float, Record] = {}
        for record in self.records:
            rows[record["step"]] = rows.get(record["step"], {}) | record
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
        self._write(METRICS_CSV, text.getvalue())

    def _write(self, name: str, text: str) -> None:
        write_text(self.path / name, text)


def _sample(step: int, text: str) -> str:
    return f"--- step {step} ---\n{text}\n\n"


def flat(cfg: TrainConfig) -> dict[str, Any]:
    """The fields by name, those of the model as model.name."""
    fields = cfg.to_dict()
    return {f"model.{name}": value for name, value in fields.pop("model").items()} | fields


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


def has_run(folder: Path) -> bool:
    """Whether there is anything in it but a lock: a run, or what is none of ours."""
    return folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())


def read_metrics(folder: Path) -> list[Record]:
    """The objects of a run folder's metrics.jsonl, in order; a last line cut off by a crash is left out.

    Raises:
        InputError: another line is not an object with a step.
    """
    lines = (read_text(folder / METRICS) or "").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
            records.append(record)
        except (ValueError, LookupError, TypeError, RecursionError):
            if number < len(lines):
                raise InputError(f"line {number} of {folder / METRICS} is damaged: mend or delete it") from None
    return records


def why_not_written(error: BaseException) -> str | None:
    """Why the file system refused to write, if an error (of Python, or of Orbax, which only has it in its text) says so."""
    numbers = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG
    if isinstance(error, InputError):
        return None
    return next((reason for reason in map(os.strerror, numbers) if reason in str(error)), None)


def read_text(path: Path) -> str | None:
    """The text of a file of a run folder, None if it is not there."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        InputError: there is something else by that name, as a folder or a device (/dev/null), which would be replaced.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"can't write {path}: it is not a file")
    scratch = path.with_name(f".{path.name}.writing")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # or a host that dies may leave the new name with nothing in it
    os.replace(scratch, path)
