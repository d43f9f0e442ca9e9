"""Several processes train what one does. Here they share one machine, and talk as hosts do (CPU collectives)."""

import errno
import fcntl
import functools
import itertools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import train_jax
from conftest import SCRIPTS, assert_equal_bits, refused
from test_train import CONFIG, TEXT, run_to_the_end, without_times

from flaxgpt import checkpoint, hosts
from flaxgpt.checkpoint import load_params, load_run
from flaxgpt.data.loader import eval_batches, train_batches
from flaxgpt.data.windows import Windows
from flaxgpt.errors import InputError
from flaxgpt.run.cli import Processes
from flaxgpt.run.folder import read_metrics
from flaxgpt.run.lock import lock_folder
from flaxgpt.run.saved import CHECKSUMS, saved_steps, seal, unfinished, verify
from flaxgpt.run.silent import SilentLog
from flaxgpt.run.source import open_source
from flaxgpt.sharding import make_mesh

MODEL = "--tokenizer char --emb-dim 16 --n-heads 2 --n-layers 1 --drop-rate 0.1 --vocab-multiple 4"
RUN = "--context-length 16 --batch-size 8 --warmup-steps 1 --eval-batches 1 --sample-tokens 2 --log-every 1 --data text.txt"
FLAGS = [*MODEL.split(), *RUN.split()]
MEET = ("--coordinator", "127.0.0.1:1", "--num-processes", "2")
COMPILED_ONCE = Path(__file__).with_name("compiled_once.py")
SECONDS = 900
"""How long a run may take here. A loaded machine may let a process wait for minutes."""


# Flags, and what is found without them.


def test_flags_of_processes_that_do_not_fit_are_refused_in_one_line_and_nothing_is_written(call, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    for flags, said in [
        (("--process-id", "1"), "--coordinator and --num-processes are missing"),
        (MEET, "go together: --process-id is missing"),
        ((*MEET, "--process-id", "2"), "--process-id 2: expected 0 to 1, as --num-processes has it"),
        ((*MEET, "--process-id", "-1"), "--process-id -1: expected 0 to 1"),
        (("--coordinator", "host0", *MEET[2:], "--process-id", "1"), "--coordinator host0: expected host:port"),
    ]:
        refused(call(train_jax, *FLAGS, *flags, "--out-dir", "run"), said)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "0"}
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:5000", "OMPI_COMM_WORLD_SIZE": "2"}


POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    ("variables", "several"), [({}, False), (SLURM, True), (SLURM | {"SLURM_NTASKS": "1"}, False), (OPEN_MPI, True), (POD, False)]
)
def test_what_a_launcher_started_is_found_without_flags(monkeypatch, variables, several):
    for name in (*SLURM, *OPEN_MPI, *POD, "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hosts._several(Processes()) is several


@pytest.mark.parametrize("process_id", [0, 1])
def test_a_process_that_waits_in_vain_says_so_in_one_line(tmp_path, process_id):
    ((code, _, err),) = finished(started([process_id], 2, "--join-timeout", "2", cwd=tmp_path, plainly=True))
    assert code == 2
    (line,) = err.strip().splitlines()
    assert re.fullmatch(rf"error: process {process_id} has waited 2 s, and not all of the 2 processes have come to 127.0.0.1:\d+", line), (
        line
    )
    assert not (tmp_path / "run").exists()


# What a process reads and writes.


def test_a_process_reads_its_rows_of_a_batch_and_no_others(monkeypatch):
    read = []
    window = Windows.__getitem__
    monkeypatch.setattr(Windows, "__getitem__", lambda self, i: read.append(i) or window(self, i))
    tokens, rows = np.arange(2000, dtype=np.uint16) % 97, [1, 3]
    for batches in (train_batches, lambda *args: eval_batches(*args[:2], "validation", *args[2:])):
        whole, part = batches(tokens, CONFIG), batches(tokens, CONFIG, lambda B: rows)
        for number in (0, 1):
            expected = [side[rows] for side in whole[number]]
            read.clear()
            np.testing.assert_array_equal(part[number], expected)
            assert len(read) == len(rows)
        assert part.B == whole.B == 4


def test_the_log_of_another_process_writes_nothing(tmp_path, capsys):
    with SilentLog(tmp_path / "run") as log:
        log.begin(CONFIG, None, 0, n_params=1, devices="none")
        log.update(0, 1.0, 1.0, 1.0)
        log.skipped(1, 1.0, 1.0)
        log.evaluation(1, 1.0, 1.0, "text")
        log.summary("a command")
        signal.raise_signal(signal.SIGTERM)
    assert log.stop.signal == signal.SIGTERM
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_a_run_folder_that_a_host_does_not_share_is_refused(tmp_path, monkeypatch):
    seconds = itertools.count(step=10)
    monkeypatch.setattr(hosts, "time", SimpleNamespace(monotonic=lambda: next(seconds), sleep=lambda _: None))
    monkeypatch.setattr(hosts, "of_first", lambda _: "process 7 on elsewhere")
    (tmp_path / ".lock").write_text("process 7 on elsewhere")
    hosts.check_shared(tmp_path)
    (tmp_path / ".lock").write_text("process 7 on this host")
    with pytest.raises(InputError, match="has to be on a file system that all hosts share"):
        hosts.check_shared(tmp_path)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock_folder(tmp_path).close()
    assert "can't be locked (No locks available): nothing keeps another run from writing it" in capsys.readouterr().err


def test_a_single_process_agrees_with_itself_at_once():
    agreed = hosts.Agreement(make_mesh(), values=2)
    assert agreed(15, 1 / 3) == (15, 1 / 3)
    assert hosts.of_first(lambda: [1]) == [1]


# Several processes, in earnest.


def started(ids, n, *flags, cwd, devices=1, seconds=SECONDS, port=None, run=FLAGS, plainly=False):
    """These of n processes, each with so many devices, training in cwd/run. What several compile, one does, unless they start plainly."""
    if not (cwd / "text.txt").exists():
        (cwd / "text.txt").write_text(TEXT)
    port = port or free_port()
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    several = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(n), "--join-timeout", str(seconds)]
    python = [sys.executable] if plainly or n == 1 else [sys.executable, str(COMPILED_ONCE)]
    command = [*python, str(SCRIPTS / "train_jax.py"), *run, "--out-dir", "run", "--heartbeat-timeout", str(seconds), *several]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": cwd, "env": env}
    return [subprocess.Popen([*command, "--process-id", str(i), *map(str, flags)], **pipes) for i in ids]


def finished(processes, seconds=SECONDS):
    """(exit code, standard output, standard error) of each; what is left of them then is killed."""
    results = [None] * len(processes)

    def wait(i):
        out, err = processes[i].communicate()
        results[i] = processes[i].returncode, out, err

    threads = [threading.Thread(target=wait, args=(i,)) for i in range(len(processes))]
    late = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0, late - time.monotonic()))
    for process in processes:
        process.kill()
    for thread in threads:
        thread.join()
    return results


def train(n, *flags, cwd, **options):
    """n processes train to the end."""
    for code, _, err in finished(started(range(n), n, *flags, cwd=cwd, **options)):
        assert code == 0, err
    return cwd / "run"


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def assert_the_same_run(run, expected, rel=1e-5):
    """The same losses and final parameters, but for rounding."""
    records, wanted = without_times(run), without_times(expected)
    assert [record.keys() for record in records] == [record.keys() for record in wanted]
    for record, other in zip(records, wanted, strict=True):
        assert record == pytest.approx(other, rel=rel)
    leaves = zip(jax.tree.leaves_with_path(load_run(run).params), jax.tree.leaves(load_run(expected).params), strict=True)
    far = {jax.tree_util.keystr(path): float(np.linalg.norm(a - b) / np.linalg.norm(b)) for (path, a), b in leaves}
    assert {name: error for name, error in far.items() if not error <= rel} == {}, "norm of the difference, relative"


# The end of the schedule is part of the programs: where it is the same, runs on the same mesh share them through JAX's cache.
DECAY = ("--decay-steps", "20")
UPDATES = (*DECAY, "--max-steps", "20", "--eval-every", "7", "--checkpoint-every", "5", "--keep-checkpoints", "4")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one device."""
    return train(1, *UPDATES, cwd=tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """That of two processes, each of which has half of every matrix."""
    return train(2, *UPDATES, "--tensor", "2", cwd=tmp_path_factory.mktemp("two"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "devices", "flags"),
    [
        (2, 1, ""),
        (2, 2, "--fsdp 2 --tensor 2"),
        (2, 2, "--fsdp 4 --gather update --grad-accum-steps 2"),
        (2, 1, "--tensor 2"),
        (4, 1, "--fsdp 2 --gather layer"),
        (4, 2, "--fsdp 4"),
    ],
)
def test_processes_train_as_one_device_does_with_the_same_dropout(one, request, tmp_path, n, devices, flags):
    shared = (n, devices, flags) == (2, 1, "--tensor 2")
    new = functools.partial(train, n, *UPDATES, *flags.split(), cwd=tmp_path, devices=devices, plainly=not flags)
    run = request.getfixturevalue("two") if shared else new()
    assert_the_same_run(run, one)
    assert (run / "samples.txt").read_text() == (one / "samples.txt").read_text()
    assert {path.name for path in run.iterdir()} == {path.name for path in one.iterdir()}


@pytest.mark.slow
def test_a_checkpoint_restores_on_any_mesh_and_any_number_of_processes(one, tmp_path):
    shutil.copytree(one, tmp_path / "run", ignore=shutil.ignore_patterns("1[05]", "20"))  # as it was after 5 updates
    flags = (*UPDATES, "--resume")
    train(2, *flags, "--max-steps", 10, "--fsdp", 2, "--tensor", 2, cwd=tmp_path, devices=2)
    train(4, *flags, "--max-steps", 15, "--fsdp", 2, "--gather", "layer", "--tensor", 1, cwd=tmp_path)
    run = train(1, *flags, "--fsdp", 8, "--tensor", 1, cwd=tmp_path, devices=8)
    assert saved_steps(run / "checkpoints") == [5, 10, 15, 20]
    at = {record["step"]: record for record in without_times(one) if "train/batch_loss" in record}
    for record in without_times(run):
        if "train/batch_loss" in record:
            assert record == pytest.approx(at[record["step"]], rel=1e-5)
    far = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b)), load_run(run).params, load_run(one).params)
    assert max(jax.tree.leaves(far)) <= 1e-5, far


@pytest.mark.slow
def test_a_damaged_checkpoint_is_left_out_by_all_processes_alike(two, tmp_path):
    """Also one that fits its checksums, and that only the second process can't read."""
    run = shutil.copytree(two, tmp_path / "run")
    whole = load_run(run).params
    flip(max((run / "checkpoints" / "20").rglob("d/*"), key=lambda path: path.stat().st_size))
    max((run / "checkpoints" / "15").glob("params/ocdbt.process_1/d/*"), key=lambda path: path.stat().st_size).write_bytes(b"short")
    (run / "checkpoints" / "15" / CHECKSUMS).unlink()
    seal(run / "checkpoints" / "15")
    results = finished(started(range(2), 2, *UPDATES, "--tensor", 2, "--resume", cwd=tmp_path))
    assert [code for code, *_ in results] == [0, 0], "\n".join(err for *_, err in results)
    assert re.search(r"checkpoints/20 is damaged \(.* is not what was saved\); .*checkpoints/15 is damaged \(.*; using 10", results[0][2])
    assert "damaged" not in results[1][2], "one line is enough"
    assert_equal_bits(load_run(run).params, whole)


def flip(file):
    """Change one bit, in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_checkpoint_that_another_process_cannot_read_is_left_out_here_too(private_cache, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    run_to_the_end(CONFIG.replace(data=str(tmp_path / "text.txt")), tmp_path / "run")
    theirs = iter(["it can't be read\nthere", None])
    monkeypatch.setattr(checkpoint, "of_all", lambda mine: [mine, next(theirs)])
    load_run(tmp_path / "run")
    assert "checkpoints/12 is damaged (it can't be read there); using 10" in " ".join(capsys.readouterr().err.split())


TUNE = [*RUN.split(), "--context-length", "8", "--drop-rate", "0.1"]


@pytest.mark.slow
def test_processes_fine_tune_a_model_of_hugging_face_or_of_a_run_as_one_does(folders, tmp_path):
    flags = (*DECAY, "--max-steps", 2, "--init-from")
    for name in ("one", "two", "again"):
        (tmp_path / name).mkdir()
    one = train(1, *flags, folders / "plain", cwd=tmp_path / "one", run=TUNE)
    two = train(2, *flags, folders / "plain", "--fsdp", 2, cwd=tmp_path / "two", run=TUNE)
    # Not the parameters: a bias of keys changes no attention, so its gradient is rounding, and AdamW makes an update of that.
    for record, other in zip(without_times(two), without_times(one), strict=True):
        assert record == pytest.approx(other, rel=1e-5)
    constant = ("--learning-rate", 0, "--min-learning-rate", 0)
    again = train(2, *flags, one, "--fsdp", 2, *constant, cwd=tmp_path / "again", run=TUNE)
    assert_equal_bits(load_run(again).params, load_run(one).params)


def test_models_that_differ_between_processes_are_told_apart(folders):
    plain = open_source(folders / "plain")
    other = load_params(plain) | {"final_norm": {"scale": np.ones(16), "shift": np.zeros(16)}}
    assert hosts.first_numbers(plain.params) == hosts.first_numbers(load_params(plain))
    assert hosts.first_numbers(plain.params) != hosts.first_numbers(other)


@pytest.mark.slow
def test_what_ends_one_process_ends_the_others_with_the_same_line(tmp_path):
    (tmp_path / "other.txt").write_text(TEXT.replace("sat", "tas"))
    port = free_port()
    processes = started([0], 2, *UPDATES, cwd=tmp_path, port=port, plainly=True)
    processes += started([1], 2, *UPDATES, "--data", "other.txt", cwd=tmp_path, port=port, plainly=True)
    for code, _, err in finished(processes):
        assert code == 2
        assert [line for line in err.splitlines() if line.startswith("error: process 1: ")], err
        assert "differ from those of process 0: start the same command" in err
        assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


LONG = (*DECAY, "--max-steps", "100000", "--eval-every", "100000", "--checkpoint-every", "100000")


def wait_for_step(process, step):
    for line in process.stdout:
        if (found := re.match(r"step +(\d+)/", line)) and int(found[1]) >= step:
            return
    raise AssertionError(f"it ended before update {step}: {process.communicate()[1]}")


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_after_the_same_update_with_a_checkpoint(tmp_path):
    processes = started(range(2), 2, *LONG, cwd=tmp_path)
    wait_for_step(processes[0], 3)
    processes[1].send_signal(signal.SIGTERM)
    (code, out, err), other = finished(processes)
    assert (code, other[0]) == (143, 143), err + other[2]
    assert "--resume goes on from here" in out
    (step,) = saved_steps(tmp_path / "run" / "checkpoints")
    assert verify(tmp_path / "run" / "checkpoints" / str(step))
    assert step == read_metrics(tmp_path / "run")[-1]["step"] + 1


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_the_death_of_a_process_ends_the_others_within_a_minute_with_a_message(tmp_path, killed):
    processes = started(range(2), 2, *LONG, "--heartbeat-timeout", 45, cwd=tmp_path)
    wait_for_step(processes[0], 3)
    processes[killed].kill()
    died = time.monotonic()
    code, _, err = finished(processes)[1 - killed]
    assert time.monotonic() - died < 60
    assert code != 0
    assert re.search("lost another process|another task died", err), err


@pytest.mark.slow
@pytest.mark.parametrize(("n", "kills"), [(1, 20), (2, 10)])
def test_killed_at_random_moments_processes_resume_bit_for_bit(tmp_path, n, kills):
    """A third of the kills come when a save is seen to be under way."""
    updates = 4 * kills + 8
    often = ("--eval-every", 7, "--checkpoint-every", 3, "--sample-tokens", 0)
    flags = (*DECAY, "--max-steps", updates, *often, "--fsdp", n, "--gather", "layer", "--resume")
    (tmp_path / "whole").mkdir()
    whole = train(n, *flags, cwd=tmp_path / "whole")
    generator, folder = random.Random(n), tmp_path / "run" / "checkpoints"
    saves, in_saves = -(-kills // 3) if n == 2 else 7, 0
    for kill in range(kills):
        processes = started(range(n), n, *flags, "--heartbeat-timeout", 60, cwd=tmp_path)
        wait_for_step(processes[0], generator.randrange(4 * kill, 4 * kill + 4))
        if kill % 3 == 0 or kills - kill <= saves - in_saves:
            while processes[0].poll() is None and not unfinished(folder):
                time.sleep(0.0005)
        else:
            time.sleep(generator.random() * 0.05)
        assert [process.poll() for process in processes] == [None] * n, "it ended by itself"
        processes[generator.randrange(n)].kill()
        finished(processes)
        in_saves += bool(folder.is_dir() and unfinished(folder))
        for step in saved_steps(folder):
            assert verify(folder / str(step)), f"checkpoint {step} has a number and is not whole"
    assert in_saves >= saves, "too few saves were interrupted: kill at other moments"
    run = train(n, *flags, cwd=tmp_path)
    assert_equal_bits(load_run(run).params, load_run(whole).params)
    assert without_times(run) == without_times(whole)
