"""What a run lives through: no checkpoint yet, another process, a full disk, losses that are not finite."""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_jax
from conftest import CONFIG, FLAGS, ONE_LAYER, SCRIPTS, SMALLEST, TEXT, assert_equal_bits, refused, run_to_the_end, trained
from test_train import without_times

import flaxgpt.step
import flaxgpt.train
from flaxgpt.data.loader import batch_windows, train_batches
from flaxgpt.data.windows import split_windows
from flaxgpt.errors import InputError
from flaxgpt.optim import adam_state
from flaxgpt.run.folder import read_metrics
from flaxgpt.run.lock import lock_folder
from flaxgpt.run.log import RunLog
from flaxgpt.run.setup import prepare


def test_a_run_without_a_checkpoint_is_resumed_from_its_start(config, whole, run, capsys):
    before = without_times(run)
    shutil.rmtree(run / "checkpoints")
    assert_equal_bits(run_to_the_end(config, run, resume=True), whole.state)
    assert without_times(run) == before
    assert "no checkpoint yet, so the run begins again" in capsys.readouterr().out


@pytest.fixture(scope="module")
def often(tmp_path_factory):
    """A run that is evaluated after each fourth update."""
    return trained(tmp_path_factory.mktemp("often"), CONFIG.replace(model=ONE_LAYER, data="text.txt", eval_every=4))


@pytest.mark.parametrize(
    ("ends", "number", "step", "every"),
    [("a kill", 2, 4, 1), ("a kill", 4, 11, 1), ("a signal", 2, 4, 1), ("a signal", 2, 4, 9)],
    ids=["killed in between", "killed at the end", "stopped after a save", "stopped without one"],
)
def test_an_evaluation_that_was_prevented_is_made_up_for(often, config, tmp_path, monkeypatch, ends, number, step, every):
    config = config.replace(model=ONE_LAYER, eval_every=4, checkpoint_every=every)
    evaluate, calls = flaxgpt.train.evaluate, itertools.count(1)

    def ended(*args):
        if next(calls) == number:
            if ends == "a kill":
                raise KilledError
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*args)

    with monkeypatch.context() as patch, contextlib.suppress(KilledError):
        patch.setattr(flaxgpt.train, "evaluate", ended)
        run_to_the_end(config, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / str(step + 1)).is_dir(), "what is tested is a checkpoint without its evaluation"
    assert not RunLog(tmp_path / "run").evaluated(step)
    assert_equal_bits(run_to_the_end(config, tmp_path / "run", resume=True), often.state)
    assert without_times(tmp_path / "run") == without_times(often.folder)
    assert (tmp_path / "run" / "samples.txt").read_text() == (often.folder / "samples.txt").read_text()
    with pytest.raises(InputError, match="has made its 12 updates"):
        run_to_the_end(config, tmp_path / "run", resume=True)


class KilledError(Exception):
    """Stands for a kill."""


def test_resuming_what_has_not_begun_begins_it(call, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    code, out, _ = call(train_jax, *FLAGS, "--resume", "--out-dir", "runs/new")
    assert code == 0
    assert "runs/new: there is no run yet to go on with, so it begins" in out
    assert (tmp_path / "runs/new/checkpoints/4").is_dir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    refused(call(train_jax, *FLAGS, "--resume", "--out-dir", "other"), "other is not a run folder")


def test_a_fine_tuned_run_without_a_checkpoint_starts_from_the_same_model_again(call, folders, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    flags = [*FLAGS[FLAGS.index("--context-length") :], "--out-dir", "tuned"]
    assert call(train_jax, *flags, "--init-from", folders / "plain")[0] == 0
    before = without_times(tmp_path / "tuned")
    checkpoints = tmp_path / "tuned" / "checkpoints"
    (checkpoints / "4").rename(checkpoints / "4.unfinished")  # as one looks that was being written
    shutil.rmtree(checkpoints / "2")
    assert call(train_jax, "--resume", "--out-dir", "tuned")[0] == 0
    assert without_times(tmp_path / "tuned") == before


def test_a_run_folder_is_written_by_one_process_at_a_time(config, run):
    program = f"import time, pathlib; from flaxgpt.run.lock import lock_folder; f = lock_folder(pathlib.Path({str(run)!r})); "
    holder = subprocess.Popen([sys.executable, "-c", program + "print('locked', flush=True); time.sleep(60)"], stdout=subprocess.PIPE)
    holder.stdout.readline()
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=rf"run is being written by process {holder.pid} on \S+ since 20\S+ \S+ [+-]\d+: wait"):
        run_to_the_end(config, run, overwrite=True)
    assert files == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}, "it touched the run"
    holder.kill()
    holder.wait()
    lock_folder(run).close()  # a lock does not outlive its process, however that ended


def test_a_new_folder_is_locked_as_soon_as_it_is_there(config, tmp_path):
    cfg, corpus = prepare(config, tmp_path / "run")
    with RunLog(tmp_path / "run") as log:
        log.begin(cfg, corpus, 0, n_params=1, devices="none")
        with pytest.raises(InputError, match="is being written by process"), RunLog(tmp_path / "run"):
            pass


def test_checkpoints_are_saved_by_the_minute_too(config, tmp_path):
    run_to_the_end(config.replace(checkpoint_every=1000, checkpoint_minutes=1e-9), tmp_path / "often")
    assert {path.name for path in (tmp_path / "often" / "checkpoints").iterdir()} == {"11", "12"}
    run_to_the_end(config.replace(checkpoint_every=1000, checkpoint_minutes=None), tmp_path / "seldom")
    assert {path.name for path in (tmp_path / "seldom" / "checkpoints").iterdir()} == {"12"}


def nan_where(monkeypatch, condition):
    """The loss of batches whose targets meet it is not a number."""
    head_loss = flaxgpt.step.head_loss

    def spoiled(x_BTD, kernel_DV, targets_BT, cfg):
        return head_loss(x_BTD, kernel_DV, targets_BT, cfg) * jnp.where(condition(targets_BT), jnp.nan, 1)

    monkeypatch.setattr(flaxgpt.step, "head_loss", spoiled)


def test_updates_that_are_not_finite_are_skipped_and_counted(config, tmp_path, monkeypatch, capsys):
    cfg = config.replace(**SMALLEST, skip_nonfinite=2, log_every=1, eval_every=100)
    _, corpus = prepare(cfg, tmp_path / "run")
    batches = train_batches(corpus.train, cfg)
    token = int(batches[3][1][0, 0])
    nan_where(monkeypatch, lambda targets_BT: targets_BT[0, 0] == token)
    bad = [step for step in range(12) if batches[step][1][0, 0] == token]
    assert 0 < len(bad) < 8, f"nothing is skipped, or too much: {bad}"
    cfg = cfg.replace(skip_nonfinite=max(map(len, runs_of(bad))))
    state = run_to_the_end(cfg, tmp_path / "run")
    assert int(state.step) == 12
    assert int(adam_state(state.opt_state).count) == 12 - len(bad)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    logged = [record for record in read_metrics(tmp_path / "run") if "train/batch_loss" in record]
    assert [record["step"] for record in logged] == [step for step in range(12) if step not in bad]
    assert [record.get("skipped", 0) for record in logged] == [sum(b < record["step"] for b in bad) for record in logged]
    assert capsys.readouterr().out.count("skipped: the loss is nan") == len(bad)


def runs_of(steps):
    """Numbers that follow each other, together."""
    runs = [[]]
    for step in steps:
        if runs[-1] and step != runs[-1][-1] + 1:
            runs.append([])
        runs[-1].append(step)
    return runs


def test_more_than_is_allowed_stops_the_run_and_says_where(config, tmp_path, monkeypatch):
    nan_where(monkeypatch, lambda targets_BT: targets_BT.sum() > -1)
    for allowed, step in ((0, 0), (3, 3)):
        with pytest.raises(
            InputError, match=rf"at step {step} the loss is nan, .* the batch is of windows \[\d+, .*\], no checkpoint was saved"
        ):
            run_to_the_end(config.replace(**SMALLEST, skip_nonfinite=allowed), tmp_path / f"run{allowed}")


def test_the_windows_of_a_batch_are_those_that_it_was_made_of(config, tmp_path):
    cfg, corpus = prepare(config.replace(drop_last=False), tmp_path / "run")
    windows, batches = split_windows(corpus.train, cfg, "training"), train_batches(corpus.train, cfg)
    for step in (0, 7, 40):
        inputs_BT, _ = batches[step]
        np.testing.assert_array_equal(inputs_BT, [windows[i][0] for i in batch_windows(corpus.train, cfg, step)])


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays_whole(config, tmp_path):
    """A limit on the size of files stands for the disk: the write that crosses it fails as on a full one."""
    (tmp_path / "text.txt").write_text(TEXT)

    def train_for(steps, limit, *flags):
        command = [sys.executable, SCRIPTS / "train_jax.py", "--out-dir", "run", *flags, "--max-steps", str(steps)]
        limited = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", *map(str, command)]
        kept = {} if limit == "unlimited" else {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}  # or JAX warns that it can't write
        env = os.environ | kept
        return subprocess.run(limited, cwd=tmp_path, capture_output=True, text=True, env=env)

    assert train_for(4, "unlimited", *FLAGS[: FLAGS.index("--max-steps")], *FLAGS[FLAGS.index("--max-steps") + 2 :]).returncode == 0
    full = train_for(8, 3, "--resume")
    assert full.returncode == 2, full.stderr
    assert "Traceback" not in full.stderr
    (line,) = full.stderr.strip().splitlines()
    assert line.startswith("error: can't write to run (File too large)"), line
    again = train_for(8, "unlimited", "--resume")
    assert again.returncode == 0, again.stderr
    assert "updates 4 to 7" in again.stdout


def test_sigterm_saves_within_the_grace_period_and_exits_with_143(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    flags = [*FLAGS, "--out-dir", "run", "--max-steps", "1000000", "--eval-every", "1000000"]
    process = subprocess.Popen([sys.executable, str(SCRIPTS / "train_jax.py"), *flags], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step     1"):
            break
    process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    out = process.communicate()[0]
    assert process.returncode == 143
    assert time.monotonic() - told < 30
    assert "--resume goes on from here" in out
    assert any((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
