"""Where a run's numbers go: the interface of each such place, and two that others read, TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import html
import importlib.util
import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flaxgpt.config import TrainConfig
from flaxgpt.errors import InputError
from flaxgpt.run.folder import TENSORBOARD, WANDB_ID, Record, flat, read_text, write_text

if TYPE_CHECKING:
    from flaxgpt.data.corpora import Corpus


@dataclass(frozen=True)
class Start:
    """What there is to know of a run when its training begins.

    Attributes:
        cfg: the run.
        corpus: its data.
        folder: where it is written.
        step: the first update to come; records from there on, of a process that was killed, are void.
        resume: whether the folder's contents are this run's; otherwise they are deleted.
        n_params: how many parameters the model has.
        devices: what it is trained on.
        init_from: the model that it starts from, if not from random weights.
    """

    cfg: TrainConfig
    corpus: Corpus
    folder: Path
    step: int
    resume: bool
    n_params: int
    devices: str
    init_from: str | None = None


class Watcher(Protocol):
    """A place where a run's numbers go. One process of a run has watchers; each is closed whatever ended the run."""

    def begin(self, start: Start) -> None:
        """Training begins."""

    def record(self, record: Record) -> None:
        """The next log line or evaluation (see `flaxgpt.run.folder.COLUMNS`)."""

    def sample(self, step: int, text: str) -> None:
        """What the model writes after this update."""

    def close(self) -> None:
        """Nothing more will come; `begin` may not have been called."""


def check_installed(cfg: TrainConfig) -> None:
    """InputError if a run asks for a watcher that is not installed."""
    for name, asked in (("tensorboard", cfg.tensorboard), ("wandb", cfg.wandb is not None)):
        if asked and not importlib.util.find_spec(name):
            raise InputError(f'--{name} needs the package {name}: pip install "flaxgpt[{name}]"')


def make_watchers(cfg: TrainConfig) -> list[Watcher]:
    """The watchers that a run asks for, of which nothing is written yet.

    Raises:
        InputError: nobody is logged in to Weights & Biases.
    """
    return [kind() for kind, asked in ((TensorBoard, cfg.tensorboard), (WeightsAndBiases, cfg.wandb is not None)) if asked]


class TensorBoard:
    """Event files for TensorBoard: a scalar for each column, samples and the config as text, and the config as hyperparameters.

    Each event is written at once and in the loop's own thread, where TensorBoard's own writer of files has a buffer and another: a run
    that is killed has all of them, and a full disk is noticed.
    """

    def __init__(self) -> None:
        self._file = None

    def begin(self, start: Start) -> None:
        """Begin another file of events. It says from which update on those of earlier files are void."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._text = Event, Summary, text_pb
        (start.folder / TENSORBOARD).mkdir(exist_ok=True)
        # TensorBoard reads files in the order of their names
        self._file = (start.folder / TENSORBOARD / f"events.out.tfevents.{time.time_ns()}").open("wb", buffering=0)
        self._writer = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        self._add(step=start.step, session_log=SessionLog(status=SessionLog.START))
        settings = {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in flat(start.cfg).items()}
        self._add(step=start.step, summary=hparams_pb(settings, trial_id=start.folder.name))
        self._add(step=start.step, summary=text_pb("config", _code(json.dumps(start.cfg.to_dict(), indent=2))))

    def record(self, record: Record) -> None:
        """A scalar for each value."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in record.items() if name != "step"]
        self._add(step=int(record["step"]), summary=self._summary(value=values))

    def sample(self, step: int, text: str) -> None:
        """The text, as it is."""
        self._add(step=step, summary=self._text("sample", _code(text)))

    def close(self) -> None:
        """All is written."""
        if self._file:
            self._file.close()

    def _add(self, **event: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **event).SerializeToString())


class WeightsAndBiases:
    """A run of Weights & Biases with the columns, the samples and the config; `--resume` goes on with the same one.

    Its own settings hold (WANDB_MODE=offline, WANDB_ENTITY and so on). Values are shown over the column `step`, since its own
    count of calls can't go back to where a resumed run begins again; what is then recorded twice is equal.
    """

    def __init__(self) -> None:
        import wandb

        self._wandb, self._run = wandb, None
        with self._refusals():
            wandb.login()  # asks for the key at a terminal; WANDB_MODE=offline needs none

    def begin(self, start: Start) -> None:
        """Begin the run, or go on with the one whose id the run folder has."""
        run_id = read_text(start.folder / WANDB_ID) or secrets.token_hex(4)
        with self._refusals():
            self._run = self._wandb.init(
                project=start.cfg.wandb,
                id=run_id,
                name=start.folder.name,
                dir=start.folder,
                resume="allow",
                config=start.cfg.to_dict() | {"n_params": start.n_params, "devices": start.devices},
            )
        write_text(start.folder / WANDB_ID, run_id)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def record(self, record: Record) -> None:
        """All values of a record."""
        self._run.log(record)

    def sample(self, step: int, text: str) -> None:
        """The text, as it is."""
        self._run.log({"step": step, "sample": self._wandb.Html(f"<pre>{html.escape(text)}</pre>")})

    def close(self) -> None:
        """Send what is left."""
        if self._run:
            self._run.finish()

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """What Weights & Biases refuses, as an InputError."""
        try:
            yield
        except (self._wandb.Error, ValueError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(f"Weights & Biases: {reason}: run `wandb login`, or set WANDB_MODE=offline") from None


def _code(text: str) -> str:
    """Markdown that shows a text as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())
