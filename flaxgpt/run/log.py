"""The log of a run, which both loops report to: from here it goes to the folder, the terminal and the plot.

Another place for it to go (TensorBoard, say) is another call in `begin`, `update` and `evaluation`.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Self

from flaxgpt.config import TrainConfig
from flaxgpt.data.corpora import Corpus
from flaxgpt.errors import InputError
from flaxgpt.run.folder import LOSS_PLOT, Record, RunFolder
from flaxgpt.run.plots import save_loss_plot
from flaxgpt.run.progress import Terminal
from flaxgpt.run.signals import StopRequest


class RunLog:
    """`begin` once, `update` after every update, `evaluation` where there is one; `summary` when all is done.

    A context manager: within it, the first Ctrl-C only sets `stop.requested`, which the loop looks at after each update; a second
    is obeyed at once.

    Attributes:
        out_dir: the run folder.
        stop: whether, and by which signal, the run was asked to stop.
    """

    def __init__(self, out_dir: Path) -> None:
        self.out_dir, self.stop = out_dir, StopRequest()
        self._folder, self._terminal = RunFolder(out_dir), Terminal()

    def __enter__(self) -> Self:
        self.stop.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._terminal.close()
        self.stop.__exit__()

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
        self._folder.begin(cfg, corpus, step, resume=resume)
        self._started = self._logged_at = time.perf_counter()
        self._first, self._logged_step = step, step - 1
        self._acknowledged = False
        prompt_length = len(corpus.tokenizer.encode(cfg.prompt))
        self._terminal.begin(cfg, self.out_dir, step, n_params=n_params, devices=devices, prompt_length=prompt_length)

    def update(self, step: int, loss: float, grad_norm: float, learning_rate: float) -> None:
        """Report an update; every `log_every`-th and the last one are recorded.

        Args:
            step: its number, from 0.
            loss: of its batch, in nats per token.
            grad_norm: before clipping.
            learning_rate: the rate it was made with.
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
            self._record(step, values)
        self._terminal.update(step, loss, rate, left, logged=logged)

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


def check_loss(step: int, loss: float, grad_norm: float) -> None:
    """For a loop to call after each update, before anything of it is saved.

    Raises:
        InputError: the loss or its gradient is not finite, so that going on would be pointless.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise InputError(f"at step {step} the loss is {loss}, the gradient's norm {grad_norm}: lower learning_rate, or set clip_norm")


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
