"""Tokenize a lot of text once, for training: text files, JSON lines and Parquet into shards of GPT-2 tokens.

Examples:
  prepare_data.py books/ --out-dir data/books                  # folders of .txt, .jsonl and .parquet files, or files
  prepare_data.py crawl.jsonl --field content --skip-broken --out-dir data/crawl --processes 8
  prepare_data.py part-*.parquet --column text --out-dir data/web      # pip install "flaxgpt[parquet]"
  train_jax.py --preset gpt2-124m --data data/web --out-dir runs/web

A command that was stopped goes on when it is repeated. Progress goes to standard error.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from flaxgpt.data.prepare import Layout, Progress, prepare
from flaxgpt.run.cli import one_line_errors


@dataclass(frozen=True)
class PrepareArgs:
    """What to read, and how to write it."""

    inputs: tyro.conf.Positional[tuple[Path, ...]]
    """Files and folders. A text file is one document; .jsonl has one on each line, .parquet in each row."""
    out_dir: Path
    """The new folder. Until all is done, it is called OUT_DIR.part."""
    field: str = "text"
    """The field of JSON lines that holds the text."""
    column: str = "text"
    """The column of Parquet files that holds it."""
    skip_broken: bool = False
    """Leave out lines that are not JSON objects with that field, and count them."""
    processes: int | None = None
    """Processes that tokenize; None: as many as there are cores."""
    layout: tyro.conf.OmitArgPrefixes[Layout] = dataclasses.field(default_factory=Layout)


@one_line_errors
def main() -> None:
    """Parse the flags, tokenize, say what came out."""
    args = tyro.cli(PrepareArgs, description=__doc__)

    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from flaxgpt.data.documents import Documents

    processes = (os.cpu_count() or 1) if args.processes is None else args.processes
    documents = Documents(args.inputs, field=args.field, column=args.column, skip_broken=args.skip_broken)
    console = Console(stderr=True)
    bar = Bar(BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn(), console=console, disable=not console.is_terminal)
    task = bar.add_task("reading", total=documents.total)
    started, before = time.perf_counter(), None

    def report(progress: Progress) -> None:
        nonlocal before
        total = sum(progress.tokens.values())
        before = total if before is None else before  # of an earlier call, and the first chunk, while processes start
        bar.update(task, completed=documents.read, description=f"{total:,} tokens, {speed(total - before):,.0f} tokens/s")

    def speed(n_tokens: int) -> float:
        return n_tokens / (time.perf_counter() - started)

    with bar:
        progress = prepare(documents, args.out_dir, args.layout, processes=processes, report=report)
    total = sum(progress.tokens.values())
    train, val = (f"{progress.tokens[split]:,}" for split in ("train", "val"))
    print(f"{args.out_dir}: {train} tokens for training, {val} for validation, from {documents.total:,} bytes")
    if documents.skipped:
        print(f"{documents.skipped:,} broken lines were left out")
    print(f"{speed(total - (before or 0)):,.0f} tokens/s with {processes} processes", file=sys.stderr)


if __name__ == "__main__":
    main()
