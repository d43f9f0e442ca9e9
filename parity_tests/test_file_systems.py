"""A run where files can't be written: names that are too long, permissions, and disks that are full."""

import os
import subprocess
import sys

import prepare_data
import pytest
import train_jax
import train_torch
from conftest import SCRIPTS, refused
from test_survival import FLAGS
from test_train import TEXT

from flaxgpt.run.folder import read_metrics
from flaxgpt.run.saved import saved_steps, verify


@pytest.mark.parametrize("script", [train_jax, train_torch])
@pytest.mark.parametrize("flags", [(), ("--resume",), ("--overwrite",)], ids=str)
def test_a_name_that_is_too_long_is_one_line(call, tmp_path, script, flags):
    (tmp_path / "text.txt").write_text(TEXT)
    refused(call(script, *FLAGS, *flags, "--out-dir", "x" * 300), r"choose another --out-dir \(File name too long\): xxx")


def test_a_name_that_is_too_long_for_prepared_data_is_one_line(call, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    for length in (300, 253):  # 255 bytes are allowed, and .part is added
        refused(call(prepare_data, "text.txt", "--processes", "1", "--out-dir", "x" * length), r"\(File name too long\)")


@pytest.mark.parametrize(
    ("what", "mode", "pattern"),
    [
        (".", 0o555, "run is not writable: choose another --out-dir"),
        (".lock", 0o444, r"can't write to run \(Permission denied\): what was saved before is whole"),
        ("checkpoints", 0o555, r"can't write to run \(Permission denied\): what was saved before is whole"),
    ],
)
def test_a_permission_that_was_lost_is_one_line_and_the_checkpoints_stay_as_they_are(call, tmp_path, what, mode, pattern):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "text.txt").chmod(0o444)
    if os.access(tmp_path / "text.txt", os.W_OK):
        pytest.skip("nothing is forbidden to this user (root)")
    assert call(train_jax, *FLAGS, "--out-dir", "run")[0] == 0
    saved = {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file()}
    lost = tmp_path / "run" / what
    before = lost.stat().st_mode
    lost.chmod(mode)
    result = call(train_jax, "--resume", "--max-steps", "8", "--out-dir", "run")
    lost.chmod(before)
    refused(result, pattern)
    assert {path: path.read_bytes() for path in saved} == saved


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"only root can mount a small disk ({made.stderr.strip()})")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_a_disk_that_is_really_full_ends_the_run_with_one_line_and_whole_checkpoints(small_disk, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)

    def train(*flags):
        command = [sys.executable, str(SCRIPTS / "train_jax.py"), *FLAGS, "--out-dir", str(small_disk / "run"), *flags]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    full = train("--max-steps", "100000", "--decay-steps", "100000", "--eval-every", "50000", "--tensorboard")
    assert full.returncode == 2, full.stderr
    # TensorStore may print tracebacks of its own beside our line, straight from C++: its other writes answer a loop that Orbax has closed.
    assert "/flaxgpt/" not in full.stderr, "a traceback through our own code"
    assert f"error: can't write to {small_disk / 'run'} (No space left on device)" in full.stderr
    steps = saved_steps(small_disk / "run" / "checkpoints")
    assert steps
    assert all(verify(small_disk / "run" / "checkpoints" / str(step)) for step in steps)
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    again = train("--resume", "--max-steps", str(steps[-1] + 2), "--decay-steps", "100000")
    assert again.returncode == 0, again.stderr
    assert read_metrics(small_disk / "run")[-1]["step"] == steps[-1] + 1
