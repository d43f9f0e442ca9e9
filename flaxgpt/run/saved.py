"""The checkpoints of a run as files: which there are, which of them are whole, and which is the best."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flaxgpt.run.folder import CHECKPOINTS, START, read_metrics, read_text

CHECKSUMS = "checksums.json"
"""Name, within a checkpoint, of the file with the size and SHA-256 of each of the others."""

MARK = {"checksums": CHECKSUMS}
"""What a checkpoint that has this file says of itself, in Orbax's metadata, so that it is missed if it goes missing."""

_METADATA = "_CHECKPOINT_METADATA"
WRITING, DELETING = ".unfinished", ".deleting"
"""What follows the number in the name of a checkpoint that is being written or deleted."""

_PARTIAL = re.compile(r"\d+\.(unfinished|deleting|orbax-checkpoint-tmp).*")  # the last: of versions before 0.4


class DamagedError(ValueError):
    """A checkpoint is not as it was saved; the message says what of it."""


def saved_steps(folder: Path) -> list[int]:
    """The checkpoints in a folder of checkpoints, whole or not, by their counts of updates, from the oldest on."""
    return sorted(int(path.name) for path in _folders(folder) if re.fullmatch("0|[1-9][0-9]*", path.name))


def start_of(run: Path) -> str | None:
    """What a run without a checkpoint is to start from again; None: random weights, or its newest checkpoint."""
    return None if saved_steps(run / CHECKPOINTS) else read_text(run / START)


def unfinished(folder: Path) -> list[Path]:
    """What is being saved or deleted, or was when a run was killed."""
    return sorted(path for path in _folders(folder) if _PARTIAL.fullmatch(path.name))


def seal(path: Path) -> None:
    """Write a checkpoint's checksums, once all else of it is written, and wait until both are on disk."""
    files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    with ThreadPoolExecutor() as pool:
        sums = dict(zip(files, pool.map(lambda name: _size_and_sum(path / name, sync=True), files), strict=True))
    (path / CHECKSUMS).write_bytes(_encode(sums))
    for made in (path / CHECKSUMS, *(folder for folder in path.rglob("*") if folder.is_dir()), path):
        _sync(made)


def commit(scratch: Path, path: Path) -> None:
    """Give a checkpoint that was sealed its name, in place of a damaged one of that name."""
    if path.exists():
        remove(path)
    scratch.rename(path)
    _sync(path.parent)


def remove(path: Path) -> None:
    """Delete a checkpoint. It loses its number first, so that what a kill leaves of it is not taken for one."""
    doomed = path.with_name(path.name + DELETING)
    shutil.rmtree(doomed, ignore_errors=True)
    shutil.rmtree(path.rename(doomed))


def verify(path: Path) -> bool:
    """Compare every file of a checkpoint with its checksums.

    Returns:
        True; or False if it has none, because a version before 0.4 saved it, so that nothing can be said.

    Raises:
        DamagedError: a file is missing or is not what was saved.
    """
    try:
        text = (path / CHECKSUMS).read_bytes()
    except FileNotFoundError:
        if _was_sealed(path):
            raise DamagedError(f"{CHECKSUMS} is missing") from None
        return False
    except OSError as error:
        raise DamagedError(f"{CHECKSUMS} can't be read ({error.strerror})") from None
    try:
        sums = {str(name): (int(size), str(digest)) for name, (size, digest) in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        sums = {}
    if not sums or _encode(sums) != text:
        raise DamagedError(f"{CHECKSUMS} is not what was saved")
    with ThreadPoolExecutor() as pool:
        faults = [fault for fault in pool.map(lambda name: _fault(path, name, *sums[name]), sums) if fault]
    if faults:
        raise DamagedError(", ".join(faults[:2]) + (f", and {len(faults) - 2} more" if len(faults) > 2 else ""))
    return True


def val_losses(run: Path) -> dict[int, float]:
    """The validation losses that are known of a run's checkpoints, in nats per token, by the count of updates.

    That of checkpoint n is of the evaluation after the same update, n - 1, or else after update n: with equal intervals
    evaluations come one update after checkpoints.
    """
    evaluated = {int(record["step"]): record["val/loss"] for record in read_metrics(run) if math.isfinite(record.get("val/loss", math.nan))}
    return evaluated | {step + 1: loss for step, loss in evaluated.items()}


def best_step(run: Path, steps: Iterable[int]) -> int | None:
    """Which of these checkpoints has the lowest validation loss; None if none is known."""
    losses = val_losses(run)
    return min((step for step in steps if step in losses), key=losses.__getitem__, default=None)


def report_choice(used: Path, faults: list[str], *, verified: bool) -> None:
    """Say on standard error, in a line, why a newer checkpoint is not the one that is used, or that this one can't be verified."""
    newer = [path for path in unfinished(used.parent) if path.suffixes[0] != DELETING and int(path.name.split(".")[0]) > int(used.name)]
    said = [f"{path} is unfinished" for path in newer] + faults
    if not verified:
        said.append(f"the checkpoint {used} can't be verified: a version before 0.4 saved it, without checksums")
    if said:
        print(f"{'; '.join(said)}; using {used.name}", file=sys.stderr)


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _size_and_sum(file: Path, *, sync: bool = False) -> tuple[int, str]:
    with file.open("rb") as opened:
        if sync:
            os.fsync(opened.fileno())
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        return opened.tell(), digest


def _fault(path: Path, name: str, size: int, digest: str) -> str | None:
    file = path / name
    try:
        if (found := file.stat().st_size) != size:
            return f"{name} has {found} of {size} bytes"
        return None if _size_and_sum(file) == (size, digest) else f"{name} is not what was saved"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} can't be read ({error.strerror})"


def _encode(sums: dict[str, tuple[int, str]]) -> bytes:
    return (json.dumps(sums, indent=1) + "\n").encode()


def _was_sealed(path: Path) -> bool:
    try:
        return json.loads((path / _METADATA).read_bytes()).get("custom_metadata") == MARK
    except (OSError, ValueError, AttributeError):
        raise DamagedError(f"neither {CHECKSUMS} nor {_METADATA} can be read" if any(path.iterdir()) else "it is empty") from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
