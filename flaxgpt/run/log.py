"""The log of a run, which both loops report to: from here it goes to the folder, the terminal and the plot.

Another place for it to go (TensorBoard, say) is another call in `begin`, `update` and `evaluation`.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from flaxgpt.config import TrainConfig
from flaxgpt.data.corpora import Corpus
from flaxgpt.errors import InputError
from flaxgpt.run.folder import LOSS_PLOT, Record, RunFolder, why_not_written
from flaxgpt.run.lock import lock_folder
from flaxgpt.run.plots import save_loss_plot
from flaxgpt.run.progress import Terminal
from flaxgpt.run.signals import StopRequest


class RunLog:
    """`begin` once, `update` after every update, `evaluation` where there is one; `summary` when all is done.

    A context manager: within it, the first Ctrl-C only sets `stop.requested`, which the loop looks at after each update; a second
    is obeyed at once. No other run can have the folder meanwhile. What the loop could not write is an InputError when it is left.

    Attributes:
        out_dir: the run folder.
        stop: whether, and by which signal, the run was asked to stop.
    """

    def __init__(self, out_dir: Path, *, init_from: str | None = None) -> None:
        """`init_from` names the model that the run starts from; it is kept, for a run that is killed before its first checkpoint."""
        self._init_from = init_from
        self.out_dir, self.stop = out_dir, StopRequest()
        self._folder, self._terminal, self._lock = RunFolder(out_dir), Terminal(), None

    def __enter__(self) -> Self:
        if self.out_dir.is_dir():
            self._lock = lock_folder(self.out_dir)
        self.stop.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._terminal.close()
        self.stop.__exit__()
        if self._lock:
            self._lock.close()
        if error and (reason := why_not_written(error)):
            raise InputError(
                f"can't write to {self.out_dir} ({reason}): what was saved before is whole, and --resume goes on from there"
            ) from None

    def begin(self, cfg: TrainConfig, corpus: Corpus, step: int, *, n_params: int, devices: str, resume: bool = False) -> None:
        """Training begins at this update: 0, or where the checkpoint was made, and then later records are forgotten.

        Args:
            cfg: the run.
            corpus: its data.
            step: the first update to come.
            n_params: how many parameters the model has.
            devices: what it is trained on, for the terminal.
            resume: whether the run folder's contents are this run's; otherwise they are deleted.
        """
        self._cfg = cfg
        if not self._lock:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.out_dir)
        self._folder.begin(cfg, corpus, step, resume=resume, init_from=self._init_from)
        self._started = self._logged_at = time.perf_counter()
        self._first, self._logged_step = step, step - 1
        self._acknowledged = False
        prompt_length = len(corpus.tokenizer.encode(cfg.prompt))
        if resume and step == 0:
            self._terminal.begins_again()
        self._terminal.begin(cfg, self.out_dir, step, n_params=n_params, devices=devices, prompt_length=prompt_length)

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
        left = (now - self._started) / (step - self._first + 1) * (self._cfg.max_steps - 1 - step)
        logged = step % self._cfg.log_every == 0 or step == self._cfg.max_steps - 1
        if logged:
            self._logged_step, self._logged_at = step, now
            values = {"train/batch_loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm, "tokens_per_second": rate}
            if skipped:
                values["skipped"] = skipped
            self._record(step, values)
        self._terminal.update(step, loss, rate, left, logged=logged)

    def skipped(self, step: int, loss: float, grad_norm: float) -> None:
        """Report an update that was not made, since its loss or gradient is not finite; nothing is recorded for it."""
        self._terminal.skipped(step, loss, grad_norm)

    def evaluation(self, step: int, train_loss: float, val_loss: float, sample: str) -> None:
        """Report an evaluation, draw the plot anew, and show and keep the sample.

        Args:
            step: the update it came after.
            train_loss: of the training split, in nats per token.
            val_loss: of the validation split, likewise.
            sample: text of the model, or "" for none.
        """
        losses = {"train/loss": train_loss, "val/loss": val_loss}
        perplexities = {"train/perplexity": _perplexity(train_loss), "val/perplexity": _perplexity(val_loss)}
        record = self._record(step, losses | perplexities)
        self._folder.write_csv()
        save_loss_plot(self._folder.records, self.out_dir / LOSS_PLOT, title=self.out_dir.name)
        if sample:
            self._folder.add_sample(step, sample)
        self._terminal.evaluation(record, sample)
        self._logged_step, self._logged_at = step, time.perf_counter()  # tokens_per_second is of training alone

    def summary(self, command: str) -> None:
        """Show what was reached, where it is, and the command that samples from it."""
        last = [record for record in self._folder.records if "val/loss" in record][-1]
        self._terminal.summary(last, self.out_dir, command)

    def _record(self, step: int, values: Record) -> Record:
        seconds = round(time.perf_counter() - self._started, 3)
        record = {"step": step, "tokens": (step + 1) * self._cfg.tokens_per_step, **values, "seconds": seconds}
        self._folder.add_record(record)
        return record


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
        remedy = "lower learning_rate, set clip_norm or allow --skip-nonfinite"
        raise InputError(f"at step {step} the loss is {loss}, the gradient's norm {grad_norm}{where}: {remedy}")


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
