"""The figures of a comparison."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flaxgpt.parity.compare import Measurement
from flaxgpt.run.plots import save_figure


def save_replay_plot(rows: list[dict[str, float]], path: Path, title: str) -> None:
    """Losses of a recorded run and of its replay on top of each other, and below them their differences, on a log scale.

    Args:
        rows: those of `flaxgpt.parity.replay.COLUMNS`.
        path: where to write it, as a PNG.
        title: above the plot.
    """
    figure = Figure(figsize=(7, 6.5), layout="constrained")
    curves, gaps = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    kinds = (("batch", "batch_loss", "C7", 0.6), ("training", "train_loss", "C0", 1.0), ("validation", "val_loss", "C1", 1.0))
    for label, column, color, alpha in kinds:
        points = [(r["step"], r[f"reference/{column}"], r[f"flaxgpt/{column}"]) for r in rows if f"reference/{column}" in r]
        steps, reference, flaxgpt = zip(*points, strict=True)
        curves.plot(steps, reference, "-", color=color, alpha=alpha, label=f"{label}, reference")
        style, flaxgpt_color = (":", color) if label == "batch" else ("x", "k")
        curves.plot(steps, flaxgpt, style, color=flaxgpt_color, markersize=5, label=f"{label}, flaxgpt")
        differences = [max(abs(a - b), 1e-17) for _, a, b in points]  # a difference of 0 has no place on a log scale
        gaps.semilogy(steps, differences, ".-", color=color, alpha=alpha, label=label)
    curves.set(ylabel="loss (nats per token)", title=title)
    gaps.set(xlabel="update", ylabel="|difference|")
    gaps.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (curves, gaps):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    save_figure(figure, path)


def save_parity_plot(panels: Mapping[str, Sequence[tuple[str, Measurement]]], path: Path, reference: str, port: str = "flaxgpt") -> None:
    """Relative differences of tensors in the order in which they are computed, on a log scale.

    Args:
        panels: title -> (tensor's name, its measurement) for each of its points.
        path: where to write it, as a PNG.
        reference: what flaxgpt is compared with.
        port: what is, if not flaxgpt.
    """
    longest = max(len(rows) for rows in panels.values())
    figure = Figure(figsize=(min(max(8.0, 0.16 * longest), 24.0), 4.2 * len(panels)), layout="constrained")
    columns = (
        (f"{port} against {reference}", "difference", "o-", "C3"),
        (f"{port}'s own error", "error_flaxgpt", ".--", "C0"),
        (f"{reference}'s own error", "error_reference", ".--", "C1"),
        ("both in float64", "exact", "s-", "C2"),
    )
    for axes, (title, rows) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for label, column, style, color in columns:
            points = [(x, max(value, 1e-17)) for x, (_, row) in enumerate(rows) if (value := getattr(row, column)) is not None]
            if points:  # a difference of 0 has no place on a log scale: it is drawn at 1e-17
                axes.semilogy(*zip(*points, strict=True), style, color=color, markersize=4, linewidth=1, label=label)
        for column, color in (("bound", "C3"), ("exact_bound", "C2")):
            axes.step(range(len(rows)), [getattr(row, column) for _, row in rows], where="mid", color=color, alpha=0.35, linewidth=3)
        block = [re.match(r"\D*\.(\d+)(?=\.|$)", name) for name, _ in rows]
        starts = [x for x in range(len(rows)) if x == 0 or (block[x] and block[x][1]) != (block[x - 1] and block[x - 1][1])]
        for x in starts[1:]:
            axes.axvline(x - 0.5, color="0.8", linewidth=0.8)
        axes.set_xticks(range(len(rows)) if longest <= 60 else starts)
        names = [re.sub(r"^trf_blocks\.", "", name) for name, _ in rows]
        axes.set_xticklabels(names if longest <= 60 else [names[x] for x in starts], rotation=90, fontsize=7)
        axes.set(ylabel="relative difference", title=title)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize="small", title="thick and pale: the bounds", title_fontsize="x-small")
    save_figure(figure, path)
