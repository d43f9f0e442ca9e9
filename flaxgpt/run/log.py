"""The log of a run, which both loops report to: from here it goes to the folder, the terminal, the pictures and other watchers."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from flaxgpt.config import TrainConfig
from flaxgpt.data.corpora import Corpus
from flaxgpt.errors import InputError
from flaxgpt.run.environment import environment
from flaxgpt.run.folder import LOSS_PLOT, REPORT, Record, RunFolder, read_metrics, why_not_written
from flaxgpt.run.lock import lock_folder
from flaxgpt.run.plots import save_loss_plot
from flaxgpt.run.progress import Terminal
from flaxgpt.run.report import save_report
from flaxgpt.run.signals import StopRequest
from flaxgpt.run.throughput import Stopwatch, flops_per_token, spent
from flaxgpt.run.watchers import Start, Watcher, make_watchers

DRAW_SECONDS = 15
"""Pictures are drawn anew no sooner than this after the last time, but at the end: it takes as long as twenty small updates."""
ANEW = "start anew with a lower learning_rate or with clip_norm"
"""What helps where numbers are not finite."""


class RunLog:
    """`begin` once, `update` after every update, `evaluation` where there is one; `summary` when all is done.

    A context manager: within it, the first Ctrl-C only sets `stop.requested`, which the loop looks at after each update; a second
    is obeyed at once. No other run can have the folder meanwhile. What the loop could not write is an InputError when it is left.

    Attributes:
        out_dir: the run folder.
        stop: whether, and by which signal, the run was asked to stop.
        timed: `with log.timed("data"): ...` counts seconds of the loop for a part of PARTS; the records have them.
    """

    def __init__(self, out_dir: Path, *, init_from: str | None = None) -> None:
        """`init_from` names the model that the run starts from; it is kept, for a run that is killed before its first checkpoint."""
        self._init_from = init_from
        self.out_dir, self.stop, self.timed = out_dir, StopRequest(), Stopwatch()
        self._folder, self._terminal, self._lock = RunFolder(out_dir), Terminal(), None
        self._watchers: list[Watcher] = [self._folder, self._terminal]
        self._drawn, self._drawn_at = True, -math.inf

    def __enter__(self) -> Self:
        if self.out_dir.is_dir():
            try:
                self._lock = lock_folder(self.out_dir)
            except OSError as error:
                raise self._unwritable(error) or error from None
        self.stop.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            with ExitStack() as last:
                last.callback(self.stop.__exit__)
                if self._lock:
                    last.callback(self._lock.close)
                for watcher in self._watchers:
                    last.callback(watcher.close)
                if not self._drawn and not (error and why_not_written(error)):
                    self._draw()  # a run that was stopped has no evaluation at its end
        except OSError as another:
            error = error or another
        if error and (unwritable := self._unwritable(error)):
            raise unwritable from None

    def begin(
        self,
        cfg: TrainConfig,
        corpus: Corpus,
        step: int,
        *,
        n_params: int,
        devices: str,
        resume: bool = False,
        peak_flops: float | None = None,
    ) -> None:
        """Training begins at this update: 0, or where the checkpoint was made, and then later records are forgotten.

        Args:
            cfg: the run.
            corpus: its data.
            step: the first update to come.
            n_params: how many parameters the model has.
            devices: what it is trained on, in words.
            resume: whether the run folder's contents are this run's; otherwise they are deleted.
            peak_flops: operations a second that all devices together can do, if that is known.
        """
        self._cfg, self._peak_flops = cfg, peak_flops
        self._watchers[1:1] = make_watchers(cfg)  # before anything is written, since one may refuse
        if not self._lock:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.out_dir)
        self._environment = environment() | {"devices": devices, "parameters": f"{n_params:,}"}
        self._started = self._logged_at = time.perf_counter()
        self._first, self._logged_step = step, step - 1
        self._acknowledged = False
        start = Start(cfg, corpus, self.out_dir, step, resume, n_params, devices, self._init_from)
        for watcher in self._watchers:
            watcher.begin(start)

    def compiling(self) -> None:
        """Report that the first update is being compiled."""
        self._terminal.compiling()

    def update(self, step: int, loss: float, grad_norm: float, learning_rate: float, *, skipped: int = 0) -> None:
        """Report an update; every `log_every`-th and the last one are recorded.

        Args:
            step: its number, from 0.
            loss: of its batch, in nats per token.
            grad_norm: before clipping.
            learning_rate: the rate it was made with.
            skipped: how many updates until now were not made, since they were not finite.
        """
        if self.stop.requested and not self._acknowledged:
            self._acknowledged = True
            self._terminal.stopping()
        now = time.perf_counter()
        rate = (step - self._logged_step) * self._cfg.tokens_per_step / (now - self._logged_at)
        mfu = rate * flops_per_token(self._cfg.model) / self._peak_flops if self._peak_flops else None
        left = (now - self._started) / (step - self._first + 1) * (self._cfg.max_steps - 1 - step)
        logged = step % self._cfg.log_every == 0 or step == self._cfg.max_steps - 1
        if logged:
            self._logged_step, self._logged_at = step, now
            values = {"train/batch_loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm, "tokens_per_second": rate}
            if mfu:
                values["mfu"] = mfu
            if skipped:
                values["skipped"] = skipped
            self._record(step, values | self.timed.take("data", "compute"))
        self._terminal.update(step, loss, rate, mfu, left, logged=logged)

    def skipped(self, step: int, loss: float, grad_norm: float) -> None:
        """Report an update that was not made, since its loss or gradient is not finite; nothing is recorded for it."""
        self._terminal.skipped(step, loss, grad_norm)

    def evaluation(self, step: int, train_loss: float, val_loss: float, sample: str) -> None:
        """Report an evaluation, draw the pictures anew now and then, and show and keep the sample.

        Args:
            step: the update it came after.
            train_loss: of the training split, in nats per token.
            val_loss: of the validation split, likewise.
            sample: text of the model, or "" for none.

        Raises:
            InputError: a loss is not finite, and none is to be skipped.
        """
        if not (math.isfinite(train_loss) and math.isfinite(val_loss)) and not self._cfg.skip_nonfinite:
            raise InputError(f"after step {step} the training loss is {train_loss}, the validation loss {val_loss}: {ANEW}")
        losses = {"train/loss": train_loss, "val/loss": val_loss}
        perplexities = {"train/perplexity": _perplexity(train_loss), "val/perplexity": _perplexity(val_loss)}
        self._record(step, losses | perplexities | self.timed.take("evaluation", "checkpoint"))
        if sample:
            for watcher in self._watchers:
                watcher.sample(step, sample)
        if step == self._cfg.max_steps - 1 or time.perf_counter() - self._drawn_at >= DRAW_SECONDS:
            self._draw()
        self._logged_step, self._logged_at = step, time.perf_counter()  # tokens_per_second is of training alone

    def evaluated(self, step: int) -> bool:
        """Whether the run folder has the evaluation after this update."""
        return any(record["step"] == step and "val/loss" in record for record in read_metrics(self.out_dir))

    def sync(self) -> None:
        """Have all that was reported on disk, before a checkpoint is: a host that dies must not leave one that is ahead of the records."""
        self._folder.sync()

    def profiled(self, trace: Path | None) -> None:
        """Report where the profiler's trace is, if it wrote one."""
        if trace:
            self._terminal.profiled(trace)

    def summary(self, command: str) -> None:
        """Show what was reached, what the time went to, where everything is, and the command that samples from the run."""
        last = next((record for record in reversed(self._folder.records) if "val/loss" in record), None)
        self._terminal.summary(last, spent(self._folder.records), self.out_dir, command)

    def _unwritable(self, error: BaseException) -> InputError | None:
        """What a person is told, if the file system refused to write."""
        reason = why_not_written(error)
        said = f"can't write to {self.out_dir} ({reason}): what was saved before is whole, and --resume goes on from there"
        return InputError(said) if reason else None

    def _record(self, step: int, values: Record) -> None:
        seconds = round(time.perf_counter() - self._started, 3)
        record = {"step": step, "tokens": (step + 1) * self._cfg.tokens_per_step, **values, "seconds": seconds}
        for watcher in self._watchers:
            watcher.record(record)
        self._drawn = False

    def _draw(self) -> None:
        """What is written anew each time, from all that is recorded."""
        self._folder.write_csv()
        save_loss_plot(self._folder.records, self.out_dir / LOSS_PLOT, title=self.out_dir.name)
        save_report(self._folder, self._cfg, self._environment, self.out_dir / REPORT)
        self._drawn, self._drawn_at = True, time.perf_counter()


def check_loss(step: int, loss: float, grad_norm: float, where: str = "") -> None:
    """For a loop to call after each update, before anything of it is saved.

    Args:
        step: the update.
        loss: of its batch.
        grad_norm: of its gradient.
        where: what else is known of it, for the message.

    Raises:
        InputError: the loss or its gradient is not finite, so that going on would be pointless.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        said = f"at step {step} the loss is {loss}, the gradient's norm {grad_norm}{where}"
        raise InputError(f"{said}: {ANEW}, or allow --skip-nonfinite")


def not_finite(step: int, where: str = "") -> InputError:
    """For a loop to raise before it saves or evaluates parameters: a finite gradient can be followed by a step that is not."""
    return InputError(f"after step {step} there are parameters that are not finite{where}: {ANEW}")


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
