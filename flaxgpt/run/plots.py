"""The figure of a training run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from flaxgpt.run.folder import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_loss_plot(records: list[Record], path: Path, title: str) -> None:
    """Training and validation loss over updates (below) and tokens seen (above), as a PNG written atomically.

    Args:
        records: objects of a run's metrics.jsonl.
        path: where to write it.
        title: above the plot.
    """
    from matplotlib.figure import Figure  # a quarter of what a run imports, and the first update can be made without
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    batches = [r for r in records if "train/batch_loss" in r]
    evaluations = [r for r in records if "val/loss" in r]
    steps = [r["step"] for r in evaluations]
    axes.plot([r["step"] for r in batches], [r["train/batch_loss"] for r in batches], color="C0", alpha=0.25, label="each batch")
    axes.plot(steps, [r["train/loss"] for r in evaluations], "o-", color="C0", markersize=3, label="training")
    axes.plot(steps, [r["val/loss"] for r in evaluations], "s--", color="C1", markersize=3, label="validation")
    axes.set(xlabel="update", ylabel="loss (nats per token)", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    per_step = records[-1]["tokens"] / (records[-1]["step"] + 1)
    tokens = axes.secondary_xaxis("top", functions=(lambda s: (s + 1) * per_step, lambda t: t / per_step - 1))
    tokens.set_xlabel("tokens seen")
    tokens.xaxis.set_major_formatter(EngFormatter(sep=""))
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path, kind: str = "png") -> None:
    """Write a figure atomically, in a format of Matplotlib's ("png", "svg")."""
    scratch = path.with_name(f".{path.name}.writing")
    figure.savefig(scratch, format=kind, dpi=130)
    os.replace(scratch, path)
