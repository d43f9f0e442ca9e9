"""Documents into shards of tokens: in parallel, in order, and where it was stopped it goes on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flaxgpt.data.documents import Documents, chunks
from flaxgpt.data.token_files import INDEX
from flaxgpt.data.tokenizer import get_tokenizer
from flaxgpt.errors import InputError

SPLITS = ("train", "val")
_STATE = "state.json"
_SCRATCH = f"{_STATE}.new"


@dataclass(frozen=True)
class Layout:
    """What decides where a token comes to lie."""

    val_every: int = 100
    """Of so many chunks of text, the first is for validation."""
    shard_tokens: int = 100_000_000
    """Tokens of a shard; the last one of a split has less."""
    chunk_chars: int = 2**20
    """Characters of a chunk, the most that a process is given at a time."""

    def __post_init__(self) -> None:
        for name, least in (("val_every", 2), ("shard_tokens", 1), ("chunk_chars", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)}: expected at least {least}")


@dataclass
class Progress:
    """How far it is: also what is on disk, so that it can go on from there."""

    source: dict[str, object]
    """What is prepared, and how: it goes on only with the same."""
    n_chunks: int = 0
    """Chunks whose tokens are written."""
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    """Of each split."""
    largest: dict[str, int] = field(default_factory=dict)
    """Of each shard."""


def prepare(
    documents: Documents, out: Path, layout: Layout, *, processes: int = 1, report: Callable[[Progress], None] = lambda _: None
) -> Progress:
    """Write the tokens of documents into a folder: train.bin and val.bin, or train-00000.bin and so on, where there are several shards.

    Until all is done the folder is called OUT.part; a call that is repeated goes on there after the last chunk, and the result is the same
    byte for byte. It does not depend on the number of processes either. Memory holds a few chunks for each process.

    Args:
        documents: what to read.
        out: the folder, which must not be there.
        layout: how to cut.
        processes: that tokenize.
        report: called after each chunk.

    Raises:
        InputError: the folder is there or can't be written, OUT.part is of something else, a document can't be read, there is no text, or
            all of it is one chunk, so that a split would be empty.
    """
    try:
        there = out.exists()
    except OSError as error:  # its name is too long
        raise InputError(f"choose another --out-dir ({error.strerror}): {out}") from None
    if there:
        raise InputError(f"{out} is there already: choose another folder, or delete it")
    if processes < 1:
        raise InputError(f"processes={processes}: expected at least 1")
    part = out.with_name(f"{out.name}.part")
    files = [[str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns] for file in documents.files]
    source = {"files": files, "documents": documents.options, "layout": dataclasses.asdict(layout)}
    try:
        progress = _begun(part, source, layout)
    except OSError as error:
        raise InputError(f"can't write {error.filename or part} ({error.strerror})") from None
    try:
        rest = itertools.islice(chunks(documents, layout.chunk_chars), progress.n_chunks, None)
        for ids in _encoded(rest, processes):
            _append(part, ids, progress, layout)
            _save(part, progress)
            report(progress)
        if not progress.n_chunks:
            raise InputError("there is no text in what was given")
        if not all(progress.tokens.values()):
            shutil.rmtree(part)
            raise InputError(
                "the text is a single chunk, of which no split can be made: lower --chunk-chars, or give it to train_jax.py as it is"
            )
        _finish(part, out, progress)
    except InputError:
        if not progress.n_chunks:  # there is nothing to go on from
            shutil.rmtree(part)
        raise
    except OSError as error:
        raise InputError(
            f"can't write {error.filename or part} ({error.strerror}); what is in {part} is kept, and the same command goes on"
        ) from None
    return progress


def _encoded(texts: Iterable[str], processes: int) -> Iterator[np.ndarray]:
    """Their ids, in order."""
    if processes == 1:
        yield from map(_encode, texts)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_parent) as pool:
        pending: deque[Future[np.ndarray]] = deque()
        for text in texts:
            pending.append(pool.submit(_encode, text))
            if len(pending) > 2 * processes:  # no more texts are read than this
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _encode(text: str) -> np.ndarray:
    return np.asarray(get_tokenizer("gpt2").encode(text), "<u2")


def _end_with_parent() -> None:
    """A parent that is killed can't stop its pool."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _append(part: Path, ids: np.ndarray, progress: Progress, layout: Layout) -> None:
    split = "val" if progress.n_chunks % layout.val_every == 0 else "train"
    while len(ids):
        shard, used = divmod(progress.tokens[split], layout.shard_tokens)
        now, ids = np.split(ids, [layout.shard_tokens - used])
        name = _shard(split, shard)
        with (part / name).open("ab") as file:
            file.write(now.tobytes())
        progress.largest[name] = max(progress.largest.get(name, 0), int(now.max()))
        progress.tokens[split] += len(now)
    progress.n_chunks += 1


def _shard(split: str, number: int) -> str:
    return f"{split}-{number:05}.bin"


def _save(part: Path, progress: Progress) -> None:
    scratch = part / _SCRATCH
    scratch.write_text(json.dumps(dataclasses.asdict(progress)), encoding="utf-8")
    scratch.replace(part / _STATE)


def _begun(part: Path, source: dict[str, object], layout: Layout) -> Progress:
    """The progress to go on from, which is on disk before the first shard is: what is half-written when it is stopped is cut off."""
    part.mkdir(parents=True, exist_ok=True)
    if not (part / _STATE).is_file():
        if set(os.listdir(part)) - {_SCRATCH}:
            raise InputError(f"{part} is there already, and was not begun here: choose another folder, or delete it")
        _save(part, Progress(source))
    return _resumed(part, source, layout)


def _resumed(part: Path, source: dict[str, object], layout: Layout) -> Progress:
    """The progress that was saved last; what was written after it is cut off."""
    remedy = f"delete {part} to begin anew"
    try:
        progress = Progress(**json.loads((part / _STATE).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise InputError(f"{part / _STATE} is damaged: {remedy}") from None
    if progress.source != source:
        raise InputError(f"{part} was begun with other files or settings, or they have changed: {remedy}")
    for split, n_tokens in progress.tokens.items():
        if (part / f"{split}.bin").is_file():  # it was stopped while it finished
            (part / f"{split}.bin").rename(part / _shard(split, 0))
        for number, path in enumerate(sorted(part.glob(f"{split}-*.bin"))):
            size = 2 * min(max(n_tokens - number * layout.shard_tokens, 0), layout.shard_tokens)
            if path.stat().st_size < size:
                raise InputError(f"{path} is shorter than it was: {remedy}")
            os.truncate(path, size)
            if not size:
                path.unlink()
        if len(list(part.glob(f"{split}-*.bin"))) != -(-n_tokens // layout.shard_tokens):
            raise InputError(f"{part} has lost shards: {remedy}")
    return progress


def _finish(part: Path, out: Path, progress: Progress) -> None:
    renamed = {_shard(split, 0): f"{split}.bin" for split in SPLITS if _shard(split, 1) not in progress.largest}
    index = {
        renamed.get(name, name): {"bytes": (part / name).stat().st_size, "largest": largest} for name, largest in progress.largest.items()
    }
    (part / INDEX).write_text(json.dumps({"shards": index}, indent=2) + "\n", encoding="utf-8")
    (part / "tokenizer.json").write_text(json.dumps(get_tokenizer("gpt2").to_dict()) + "\n", encoding="utf-8")
    for name, final in renamed.items():
        (part / name).rename(part / final)
    part.rename(out)
    (out / _STATE).unlink()  # not before: without it, what is there could not be told from what is half-written
