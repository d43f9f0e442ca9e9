"""The page of a run: one HTML file with its config, curves, samples, speed and environment, which needs nothing else (see report.html)."""

from __future__ import annotations

import importlib.resources
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxgpt.config import TrainConfig
from flaxgpt.run.folder import RunFolder, flat, write_text
from flaxgpt.run.throughput import spent

_POINTS, _SAMPLES = 2000, 50
"""The most that a curve has, and that the page shows; of more, evenly spread ones."""


def save_report(folder: RunFolder, cfg: TrainConfig, environment: Mapping[str, str], path: Path) -> None:
    """Write the page, whole or not at all.

    Args:
        folder: the run's records and samples.
        cfg: the run.
        environment: what it is made with, in words.
        path: where to write it.
    """
    logged = _spread([record for record in folder.records if "train/batch_loss" in record], _POINTS)
    evaluated = _spread([record for record in folder.records if "val/loss" in record], _POINTS)
    data = {
        "title": folder.path.name,
        "steps": cfg.max_steps,
        "logged": _columns(logged, "step", "train/batch_loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu"),
        "evaluated": _columns(evaluated, "step", "tokens", "train/loss", "val/loss", "val/perplexity"),
        "seconds": spent(folder.records),
        "samples": _spread(folder.samples(), _SAMPLES),
        "config": {name: json.dumps(value) for name, value in flat(cfg).items()},
        "environment": dict(environment),
    }
    # ASCII, and without <, so nothing in it ends the script element or begins a comment.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", r"\u003c")
    template = importlib.resources.files("flaxgpt.run").joinpath("report.html").read_text(encoding="utf-8")
    write_text(path, template.replace("{{data}}", text, 1))


def _columns(records: Sequence[Mapping[str, float]], *names: str) -> dict[str, list[float | None]]:
    """Lists over records, with null for what is missing or not finite; columns that none has are left out."""
    columns = {name: [record.get(name) for record in records] for name in names}
    finite = {name: [value if value is not None and math.isfinite(value) else None for value in column] for name, column in columns.items()}
    return {name: column for name, column in finite.items() if any(value is not None for value in column)}


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many items, evenly spread, the last among them."""
    return [*items[:: -max(1, -(-len(items) // most))]][::-1]
