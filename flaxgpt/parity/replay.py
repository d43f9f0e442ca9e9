"""A training run of one implementation, recorded, and repeated by another: what is handed over, and how the two compare.

`torch_ref.parity.replay.recorded_run` records, `flaxgpt.parity.flax_side.replay` repeats.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flaxgpt.config import TrainConfig
from flaxgpt.data.tokenizer import Tokenizer
from flaxgpt.parity.plots import save_replay_plot
from flaxgpt.parity.side import Batch, Tensors
from flaxgpt.run.folder import CONFIG, write_text

COLUMNS = (
    *("step", "reference/batch_loss", "flaxgpt/batch_loss", "reference/grad_norm", "flaxgpt/grad_norm"),
    *("reference/train_loss", "flaxgpt/train_loss", "reference/val_loss", "flaxgpt/val_loss"),
)
"""Of replay.csv; the losses of the splits are there where there was an evaluation."""


class Update(NamedTuple):
    """One update of a recorded run, with all that another implementation needs to repeat it."""

    step: int
    batch: Batch
    masks: Tensors
    """What dropout kept, by the names of the reference's dropout modules."""
    loss: float
    grad_norm: float
    evaluation: Evaluation | None
    sample: list[int] | None
    """Token ids, prompt included, decoded greedily after this update."""


class Evaluation(NamedTuple):
    """Losses after an update, dropout off, and the batches they are means over."""

    train_batches: list[Batch]
    val_batches: list[Batch]
    train_loss: float
    val_loss: float


class Repeated(NamedTuple):
    """An update of a recorded run, and what it came to when it was repeated."""

    update: Update
    loss: float
    grad_norm: float
    train_loss: float | None
    val_loss: float | None
    sample: list[int] | None


class Comparison:
    """Puts the two runs next to each other: on the terminal, and in a folder with replay.csv, replay.png and samples.txt."""

    def __init__(self, folder: Path, cfg: TrainConfig, tokenizer: Tokenizer) -> None:
        self._folder, self._cfg, self._tokenizer = folder, cfg, tokenizer
        self._rows: list[dict[str, float]] = []
        self._samples: list[tuple[int, bool]] = []
        self._text = ""

    def add(self, repeated: Repeated) -> None:
        """The next update; the files are written anew at each evaluation."""
        update = repeated.update
        pairs = {"batch_loss": (update.loss, repeated.loss), "grad_norm": (update.grad_norm, repeated.grad_norm)}
        if update.evaluation:
            pairs["train_loss"] = update.evaluation.train_loss, repeated.train_loss
            pairs["val_loss"] = update.evaluation.val_loss, repeated.val_loss
        values = {f"{side}/{name}": pair[i] for name, pair in pairs.items() for i, side in enumerate(("reference", "flaxgpt"))}
        self._rows.append({"step": update.step, **values})
        if update.sample is not None:
            equal = update.sample == repeated.sample
            self._samples.append((update.step, equal))
            for side, ids in (("reference", update.sample), ("flaxgpt", repeated.sample)):
                self._text += f"--- after update {update.step}, {side} ---\n{self._tokenizer.decode(ids)}\n\n"
            print(f"after update {update.step}: the samples are {'equal' if equal else 'not equal'}", flush=True)
        if update.evaluation:
            self._print(self._rows[-1])
            self._write()

    def summary(self, limit: float) -> float:
        """Prints how the runs compare; returns the largest difference of a loss at an evaluation."""
        evaluated = [(row["step"], _differences(row)) for row in self._rows if "reference/val_loss" in row]
        worst = float(np.max([pair for _, pair in evaluated]))  # nan, if there is one
        visible = next((f"from step {step} on" for step, pair in evaluated if round(max(pair), 3) > 0), "nowhere")
        batches = [(row["step"], abs(row["flaxgpt/batch_loss"] - row["reference/batch_loss"])) for row in self._rows]
        differ = next((f"from update {step} on" for step, difference in batches if difference > 1e-5), "nowhere")
        equal = sum(same for _, same in self._samples)
        print(
            f"evaluations:  {len(evaluated)}, the largest difference {worst:.1e} (allowed: {limit:g}), seen in the third decimal {visible}"
        )
        print(f"batch losses: differ by more than 1e-5 {differ}")
        print(f"samples:      {equal} of {len(self._samples)} equal")
        print(f"files:        {self._folder}/: replay.csv, replay.png, samples.txt")
        return worst

    def _print(self, row: dict[str, float]) -> None:
        if len(self._rows) == 1:
            print(f"{'step':>5}  {'reference train / val':>22}  {'flaxgpt train / val':>22}  {'difference train / val':>23}")
        train, val = _differences(row)
        sides = (f"{row[f'{side}/train_loss']:.4f} / {row[f'{side}/val_loss']:.4f}" for side in ("reference", "flaxgpt"))
        print(f"{row['step']:>5}  {next(sides):>22}  {next(sides):>22}  {f'{train:.1e} / {val:.1e}':>23}", flush=True)

    def _write(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(self._folder / CONFIG, json.dumps(self._cfg.to_dict(), indent=2) + "\n")
        write_text(self._folder / "replay.csv", text.getvalue())
        write_text(self._folder / "samples.txt", self._text)
        save_replay_plot(self._rows, self._folder / "replay.png", self._folder.name)


def _differences(row: dict[str, float]) -> tuple[float, float]:
    train, val = (abs(row[f"flaxgpt/{split}_loss"] - row[f"reference/{split}_loss"]) for split in ("train", "val"))
    return train, val
