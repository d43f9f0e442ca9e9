"""A run where files can't be written: names that are too long, permissions, and disks that are full."""

import contextlib
import gc
import os
import shutil
import subprocess
import sys
import threading
import time

import prepare_data
import pytest
import train_jax
import train_torch
from conftest import FLAGS, SCRIPTS, TEXT, refused

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


@contextlib.contextmanager
def forbidden(path):
    """Nothing in this folder can be made or deleted, or nothing written to this file. Root is forbidden it by another attribute."""
    before = path.stat().st_mode
    path.chmod(before & 0o555)
    immutable = os.access(path, os.W_OK)
    if immutable and not (shutil.which("chattr") and subprocess.run(["chattr", "+i", path], capture_output=True).returncode == 0):
        path.chmod(before)
        pytest.skip("nothing is forbidden to this user (root): there is no chattr, or the file system knows no attributes")
    try:
        yield
    finally:
        if immutable:
            subprocess.run(["chattr", "-i", path], check=True)
        path.chmod(before)


@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        (".", "run is not writable: choose another --out-dir"),
        (".lock", r"can't write to run \((Permission denied|Operation not permitted)\): what was saved before is whole"),
        ("checkpoints", r"can't write to run \((Permission denied|Operation not permitted)\): what was saved before is whole"),
    ],
)
def test_a_permission_that_was_lost_is_one_line_and_the_checkpoints_stay_as_they_are(call, saved, tmp_path, recwarn, what, pattern):
    shutil.copytree(saved, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file()}
    recwarn.clear()
    threads = {*threading.enumerate()}
    with forbidden(tmp_path / "run" / what):
        refused(call(train_jax, "--resume", "--max-steps", "8", "--out-dir", "run"), pattern)
    assert {path: path.read_bytes() for path in before} == before
    left = [thread for thread in threading.enumerate() if thread not in threads and not thread.daemon]
    assert left == [], "the process would not end before they do"
    gc.collect()
    assert [str(warning.message) for warning in recwarn if warning.category is RuntimeWarning] == [], "printed when a script ends"


def training(cwd, folder, *flags):
    """A process that trains in a folder."""
    command = [sys.executable, str(SCRIPTS / "train_jax.py"), *FLAGS, "--out-dir", str(folder), *map(str, flags)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_goes_on(cwd, folder):
    """All checkpoints of a run are whole, and it goes on from the newest."""
    steps = saved_steps(folder / "checkpoints")
    assert steps
    assert all(verify(folder / "checkpoints" / str(step)) for step in steps)
    process = training(cwd, folder, "--resume", "--max-steps", steps[-1] + 2, "--decay-steps", 100000)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert read_metrics(folder)[-1]["step"] == steps[-1] + 1


WITHOUT_END = ("--max-steps", "100000", "--decay-steps", "100000", "--eval-every", "50000")


@contextlib.contextmanager
def mounted(folder, *options):
    """A file system at a folder, for as long as the context lasts."""
    folder.mkdir(exist_ok=True)
    if not shutil.which("mount"):
        pytest.skip("there is no mount")
    made = subprocess.run(["mount", *options, folder], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"only root can mount a file system ({made.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["400k", "500k"])
def test_a_disk_that_is_really_full_ends_the_run_with_one_line_and_whole_checkpoints(tmp_path, size):
    (tmp_path / "text.txt").write_text(TEXT)
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", f"size={size}", "tmpfs") as disk:
        process = training(tmp_path, disk / "run", *WITHOUT_END, "--tensorboard")
        _, err = process.communicate()
        refused((process.returncode, "", err), rf"^error: can't write to {disk / 'run'} \(No space left on device\)")
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        assert_goes_on(tmp_path, disk / "run")


@pytest.mark.slow
def test_a_file_system_that_becomes_read_only_ends_the_run_with_one_line_and_whole_checkpoints(tmp_path):
    """As ext4 does when it finds its disk at fault."""
    (tmp_path / "text.txt").write_text(TEXT)
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(16 * 2**20)
    if not shutil.which("mkfs.ext4") or subprocess.run(["mkfs.ext4", "-q", "-F", image], check=False).returncode:
        pytest.skip("there is no mkfs.ext4")
    disk = tmp_path / "disk"
    with mounted(disk, "-o", "loop,errors=remount-ro", image):
        process = training(tmp_path, disk / "run", *WITHOUT_END)
        while process.poll() is None and len(saved_steps(disk / "run" / "checkpoints")) < 2:
            time.sleep(0.01)
        subprocess.run(["mount", "-o", "remount,abort", disk], check=True)
        _, err = process.communicate()
        refused((process.returncode, "", err), rf"^error: can't write to {disk / 'run'} \((Read-only file system|Input/output error)\)")
    with mounted(disk, "-o", "loop", image):
        assert_goes_on(tmp_path, disk / "run")
