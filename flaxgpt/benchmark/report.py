"""What was timed as a table, as JSON and as a picture."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import resource
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
from rich.table import Table

from flaxgpt.benchmark.floors import Rates
from flaxgpt.benchmark.timing import Row
from flaxgpt.run.plots import save_figure

SCALES = {"s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")), "GB": ((1.0, "GB"), (1e-3, "MB"))}


def describe_machine() -> dict[str, str]:
    """The processor, how many of its cores there are to use, the devices and the versions."""
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    wide = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "").split()
    vectors = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("asimd", "NEON")) if flag in wide), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "torch", "transformers")
    versions = {name: _version(name) for name in packages}
    return {
        "processor": f"{model}{vectors and f' ({vectors})'}, {cores} cores",
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        **{name: version for name, version in versions.items() if version},
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def by_work(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """Rows of the same work together, in order."""
    return [(work, list(same)) for work, same in groupby(rows, lambda row: row.work)]


def table(rows: list[Row]) -> Table:
    """Medians, their spread, our ratio to each and to the floor."""
    shown = Table("", "median", "from", "to", "ours / theirs", "ours / floor", box=None, pad_edge=False)
    for column in shown.columns[1:]:
        column.justify = "right"
    for work, same in by_work(rows):
        ours = _our_median(same)
        shown.add_row(f"[bold]{work}")
        for row in same:
            if row.median is None:
                shown.add_row(f"  {row.who}: {row.note}")
                continue
            ratio = f"{ours / row.median:.2f}" if ours and not row.is_ours else ""
            to_floor = f"{ours / row.floor:.1f}" if row.floor and row.is_ours else ""
            spread = (f"{_number(value, row.unit)}" for value in (row.median, min(row.values), max(row.values)))
            shown.add_row(f"  {row.who}", *spread, ratio, to_floor)
        shown.add_section()
    return shown


def _our_median(same: list[Row]) -> float | None:
    return next((row.median for row in same if row.is_ours), None)


def to_json(rows: list[Row], rates: dict[str, Rates], command: str) -> dict[str, Any]:
    """Everything: the machine, when, what it reached in each dtype, the rows with medians and ratios."""
    ours = {work: _our_median(same) for work, same in by_work(rows)}
    return {
        "machine": describe_machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "rates": {dtype: reached._asdict() for dtype, reached in rates.items()},
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9,
        "rows": [row.to_dict(ours[row.work]) for row in rows],
    }


def save_plot(rows: list[Row], path: Path, title: str) -> None:
    """Bars of every row as multiples of ours, the spread as a line, the floor as a mark; PNG or SVG by the name, written atomically."""
    groups = [(work, [row for row in same if row.median]) for work, same in by_work(rows) if _our_median(same)]
    bars = sum(len(same) + 1 for _, same in groups)
    figure = Figure(figsize=(8, 1.2 + 0.27 * bars), layout="constrained")
    axes, y, ticks = figure.subplots(), 0, []
    for work, same in groups:
        ours = _our_median(same)
        axes.text(0.0, y - 0.15, work, fontweight="bold", fontsize="small", va="center")
        y += 1
        for row in same:
            low, high = (value / ours for value in (min(row.values), max(row.values)))
            axes.barh(y, row.median / ours, color="C0" if row.is_ours else "0.75", height=0.8)
            axes.plot([low, high], [y, y], color="0.3", linewidth=1)
            axes.text(max(row.median / ours, high), y, f"  {_number(row.median, row.unit)}", va="center", fontsize="x-small")
            if row.floor and row.is_ours:
                axes.plot([row.floor / ours] * 2, [y - 0.4, y + 0.4], color="C3", linewidth=2, label="_" if y > 1 else "floor")
            ticks.append((y, row.who))
            y += 1
    axes.set_yticks(*zip(*ticks, strict=True), fontsize="x-small")
    axes.axvline(1, color="C0", linewidth=0.7, linestyle=":")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("times ours (less is faster; red: the floor)")
    axes.set_title(title, fontsize="medium")
    save_figure(figure, path, path.suffix[1:])


def _number(value: float, unit: str) -> str:
    scale, name = next((s for s in SCALES[unit] if value >= s[0]), SCALES[unit][-1])
    return f"{value / scale:.3g} {name}"
