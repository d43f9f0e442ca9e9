"""What the person at the terminal sees of a run: a progress bar, or plain lines where the output is a file."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flaxgpt.run.folder import CHECKPOINTS, LOSS_PLOT, METRICS, METRICS_CSV, REPORT, SAMPLES, Record
from flaxgpt.run.watchers import Start


class Terminal:
    """Prints what a run's log hands it, and computes nothing. A `flaxgpt.run.watchers.Watcher`, and more that it alone is told."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None

    def begin(self, start: Start) -> None:
        """The first line: what is trained, on what, from which update on, and where it goes."""
        cfg, self._max_steps = start.cfg, start.cfg.max_steps
        if start.resume and start.step == 0:
            self._console.print("there is no checkpoint yet, so the run begins again from its start")
        self._console.print(
            f"{start.n_params:,} parameters on {start.devices}; {cfg.data}, {cfg.tokenizer} tokens, {cfg.tokens_per_step:,} an update; "
            f"updates {start.step} to {cfg.max_steps - 1} -> {start.folder}",
            markup=False,
        )
        if (prompt_length := len(start.corpus.tokenizer.encode(cfg.prompt))) > cfg.model.context_length:
            self._console.print(f"the prompt of the samples has {prompt_length} tokens; the model sees the last {cfg.model.context_length}")
        if self._console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("", total=cfg.max_steps, completed=start.step)
            self._bar.start()

    def compiling(self) -> None:
        """Why nothing moves yet."""
        if self._bar:
            self._bar.update(self._task, description="compiling the update")
        else:
            self._console.print("compiling the update (a later start finds it in the cache folder)")

    def update(self, step: int, loss: float, tokens_per_second: float, mfu: float | None, seconds_left: float, *, logged: bool) -> None:
        """Move the bar; where there is none, print a line for an update that is logged."""
        numbers = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s" + (f"  {mfu:.1%} MFU" if mfu else "")
        if self._bar:
            self._bar.update(self._task, completed=step + 1, description=numbers)
        elif logged:
            self._console.print(f"step {step:>6}/{self._max_steps}  {numbers}  {seconds_left:,.0f} s left")

    def skipped(self, step: int, loss: float, grad_norm: float) -> None:
        """An update that was not made."""
        self._console.print(f"step {step} skipped: the loss is {loss}, the gradient's norm {grad_norm}")

    def stopping(self) -> None:
        """Answer to a request to stop."""
        self._console.print("stopping after this update; press Ctrl-C again to stop at once")

    def record(self, record: Record) -> None:
        """The losses of an evaluation."""
        if "val/loss" in record:
            self._console.print(
                f"evaluation at step {record['step']}: train loss {record['train/loss']:.3f}, val loss {record['val/loss']:.3f}, "
                f"val perplexity {record['val/perplexity']:,.1f}",
                style="bold",
            )

    def sample(self, step: int, text: str) -> None:
        """In one line."""
        self._console.print("    " + " ".join(text.split()), markup=False)

    def profiled(self, trace: Path) -> None:
        """Where a trace is, and what opens it."""
        self._console.print(f"profile: {trace} (for https://ui.perfetto.dev; or xprof {trace.parents[3]})", markup=False)

    def summary(self, last: Record | None, seconds: dict[str, float], folder: Path, command: str) -> None:
        """What the last evaluation found (if there was one), what the time went to, where everything is, the command that samples."""
        self.close()
        whole = sum(seconds.values()) or 1.0
        evaluated = last and {
            "step": f"{last['step']} ({last['tokens']:,} tokens, {last['seconds']:,.0f} s)",
            "train": f"loss {last['train/loss']:.3f}, perplexity {last['train/perplexity']:,.1f}",
            "validation": f"loss {last['val/loss']:.3f}, perplexity {last['val/perplexity']:,.1f}",
        }
        table = (evaluated or {}) | {
            "time": ", ".join(f"{part} {spent:,.1f} s ({spent / whole:.0%})" for part, spent in seconds.items()),
            "files": f"{folder}/: {REPORT}, {LOSS_PLOT}, {METRICS_CSV}, {METRICS}, {SAMPLES}, {CHECKPOINTS}/",
            "sample": command,
        }
        self._console.print("\n".join(f"{name + ':':<12}{value}" for name, value in table.items()), markup=False)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.stop()
            self._bar = None
