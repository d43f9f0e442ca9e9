"""Checkpoints know when they are damaged, and the newest whole one is used."""

import dataclasses
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import checkpoints
import jax
import pytest
import sample
import train_jax
from conftest import assert_equal_bits, refused

from flaxgpt.checkpoint import Checkpoints, load, load_run
from flaxgpt.errors import InputError
from flaxgpt.optim import make_optimizer
from flaxgpt.run.folder import LOCK, load_config, read_metrics
from flaxgpt.run.log import RunLog
from flaxgpt.run.saved import CHECKSUMS, DamagedError, best_step, saved_steps, unfinished, val_losses, verify
from flaxgpt.run.setup import prepare
from flaxgpt.state import abstract_state
from flaxgpt.train import train

PARAMS_AND_REST = ("_METADATA", "manifest.ocdbt", "_sharding", "commit_success.txt")


def trained(cfg, out_dir, **options):
    cfg, corpus = prepare(cfg, out_dir, **options)
    with RunLog(out_dir) as log:
        return train(cfg, corpus, log, resume=options.get("resume", False))


@pytest.fixture
def run(saved, tmp_path):
    """A copy, to be damaged."""
    return shutil.copytree(saved, tmp_path / "run")


def restored(run):
    """The state that a resumed run would start from."""
    cfg = load_config(run)
    template = abstract_state(cfg, make_optimizer(cfg))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with Checkpoints(run / "checkpoints") as checkpoints:
        return checkpoints.restore(template, jax.tree.map(lambda _: here, template))


def flip(file):
    content = bytearray(file.read_bytes())
    content[random.Random(file.name).randrange(len(content))] ^= 1 << random.Random(len(content)).randrange(8)
    file.write_bytes(content)


DAMAGE = {
    "a bit flipped": flip,
    "cut in half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "removed": Path.unlink,
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "emptied": lambda file: file.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_is_noticed_and_the_checkpoint_before_is_used(saved, tmp_path, capsys, damage):
    files = sorted(file.relative_to(saved) for file in (saved / "checkpoints" / "6").rglob("*") if file.is_file())
    assert len(files) > 20, "what Orbax writes has changed: look whether all of it is covered"
    assert {path.name for path in files} > {CHECKSUMS, "_CHECKPOINT_METADATA", *PARAMS_AND_REST}
    run = shutil.copytree(saved, tmp_path / "run")
    wanted = load_run(shutil.copytree(saved, tmp_path / "older", ignore=shutil.ignore_patterns("6"))).params
    for name in files:
        DAMAGE[damage](run / name)
        with pytest.raises(DamagedError):
            verify(run / "checkpoints" / "6")
        shutil.copy2(saved / name, run / name)
    verify(run / "checkpoints" / "6")
    # What uses a checkpoint goes through `verify`, so one file of each kind is enough for it.
    for name in {path.name if len(path.name) < 32 else "data": path for path in files}.values():
        DAMAGE[damage](run / name)
        capsys.readouterr()
        assert_equal_bits(load_run(run).params, wanted)
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1, err
        assert re.search(r"checkpoints/6 is damaged \(.*; using 4$", err.strip()), err
        assert int(restored(run).step) == 4, f"{name}: a resumed run would start from what is damaged"
        assert len(capsys.readouterr().err.splitlines()) == 1
        shutil.copy2(saved / name, run / name)


def test_a_whole_checkpoint_is_used_without_a_word(run, capsys):
    assert int(restored(run).step) == 6
    assert_equal_bits(load(run).params, load_run(run).params)
    assert capsys.readouterr().err == ""


def test_a_folder_that_is_empty_or_without_checksums_is_passed_over(run, capsys):
    (run / "checkpoints" / "9").mkdir()
    shutil.copytree(run / "checkpoints" / "6", run / "checkpoints" / "8")
    (run / "checkpoints" / "8" / CHECKSUMS).unlink()
    assert int(restored(run).step) == 6
    err = capsys.readouterr().err.strip()
    assert re.fullmatch(rf"[^\n]*9 is damaged \(it is empty\); [^\n]*8 is damaged \({CHECKSUMS} is missing\); using 6", err), err


def test_what_was_being_saved_is_passed_over_and_gone_after_the_next_save(run, capsys):
    shutil.copytree(run / "checkpoints" / "6", run / "checkpoints" / "8.unfinished")
    shutil.copytree(run / "checkpoints" / "6", run / "checkpoints" / "8.unfinished.orbax-checkpoint-tmp")
    shutil.copytree(run / "checkpoints" / "6", run / "checkpoints" / "3.deleting")
    state = trained(load_config(run).replace(max_steps=8), run, resume=True)
    assert int(state.step) == 8
    assert "8.unfinished is unfinished" in capsys.readouterr().err
    assert {path.name for path in (run / "checkpoints").iterdir()} <= {"4", "6", "8"}
    assert verify(run / "checkpoints" / "8")


def test_a_run_goes_on_past_a_damaged_checkpoint_bit_for_bit_and_replaces_it(saved, run, tmp_path):
    whole = trained(load_config(saved).replace(max_steps=8), shutil.copytree(saved, tmp_path / "whole"), resume=True)
    shutil.copytree(run / "checkpoints" / "6", run / "checkpoints" / "7")
    flip(next((run / "checkpoints" / "6" / "params" / "d").iterdir()))
    flip(next((run / "checkpoints" / "7" / "params" / "d").iterdir()))
    assert_equal_bits(trained(load_config(run).replace(max_steps=8), run, resume=True), whole)
    assert "7" not in {path.name for path in (run / "checkpoints").iterdir()}, "a damaged checkpoint took the place of a whole one"
    assert verify(run / "checkpoints" / "6")
    assert verify(run / "checkpoints" / "8")


def test_scripts_use_the_newest_whole_one_or_say_in_one_line_that_there_is_none(call, run, tmp_path):
    flip(next((run / "checkpoints" / "6" / "params" / "d").iterdir()))
    arguments = ("--checkpoint", run, "--prompt", "the", "--max-new-tokens", "2", "--seed", "1")
    code, _, err = call(sample, *arguments)
    assert code == 0
    assert re.search(r"^[^\n]*6 is damaged[^\n]*; using 4$", err, re.MULTILINE), err
    (run / "checkpoints" / "4" / CHECKSUMS).write_text("{}")
    refused(call(sample, *arguments), "no whole checkpoint: .*6 is damaged.*4 is damaged")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != LOCK}
    refused(call(train_jax, "--out-dir", run, "--resume", "--max-steps", "9"), "no whole checkpoint: .*6 is damaged.*4 is damaged")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != LOCK} == before, "a refused run touched the run folder"


def test_a_checkpoint_of_an_earlier_version_is_read_and_said_to_be_unverified(call, tmp_path):
    with tarfile.open(Path(__file__).parent / "data" / "run-0.1.0.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    code, _, err = call(sample, "--checkpoint", "run", "--max-new-tokens", "2")
    assert code == 0
    assert "6 can't be verified: a version before 0.4 saved it" in err
    code, out, _ = call(checkpoints, "verify", "run")
    assert code == 0
    assert "can't be verified" in out


def test_every_file_is_under_a_checksum(saved):
    path = saved / "checkpoints" / "6"
    listed = json.loads((path / CHECKSUMS).read_text())
    assert {*listed, CHECKSUMS} == {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}


def write_losses(run, losses):
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": step, "val/loss": loss}) + "\n" for step, loss in losses.items()))


def test_the_newest_and_the_best_are_kept_also_after_a_resume(saved, tmp_path):
    run, losses, state = tmp_path / "run", {}, restored(saved)
    template, here = jax.eval_shape(lambda: state), jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: here, template)
    kept = {1: {1}, 2: {1, 2}, 3: {2, 3}, 4: {2, 3, 4}, 5: {2, 4, 5}, 6: {5, 6}, 7: {6, 7}}
    for step, loss in zip(kept, (3.0, 1.0, 2.0, 2.5, 2.2, 0.5, 0.7), strict=True):
        with Checkpoints(run / "checkpoints", keep=2) as folder:  # each time as a process of its own would
            if step > 1:
                folder.restore(template, shardings)
            folder.save(dataclasses.replace(state, step=jax.numpy.asarray(step, state.step.dtype)))
            losses[step - 1] = loss  # an evaluation comes after its save
            write_losses(run, losses)
        assert set(saved_steps(run / "checkpoints")) == kept[step], f"after update {step - 1}"


def test_the_validation_loss_of_a_checkpoint_is_that_of_its_update_or_the_next(tmp_path):
    write_losses(tmp_path / "run", {0: 4.0, 9: 3.0, 10: 2.0, 20: 1.0, 29: float("nan")})
    losses = val_losses(tmp_path / "run")
    assert losses[10] == 3.0, "the evaluation after the same update comes first"
    assert losses[20] == 1.0
    assert 30 not in losses
    assert best_step(tmp_path / "run", [10, 20, 30]) == 20
    assert best_step(tmp_path / "run", [30]) is None


@pytest.mark.parametrize("fails", ["flaxgpt.checkpoint.ocp.AsyncCheckpointer.save", "flaxgpt.checkpoint.seal", "flaxgpt.checkpoint.commit"])
def test_a_save_that_fails_deletes_nothing(run, monkeypatch, fails):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    flip(next((run / "checkpoints" / "6" / "params" / "d").iterdir()))
    monkeypatch.setattr(fails, fail)
    with pytest.raises(InputError, match="No space left"):
        trained(load_config(run).replace(max_steps=8, keep_checkpoints=1), run, resume=True)
    assert saved_steps(run / "checkpoints") == [4, 6]
    monkeypatch.undo()
    assert int(restored(run).step) == 4


def test_checkpoints_are_listed_verified_and_deleted(call, run):
    code, out, _ = call(checkpoints, "list", run)
    assert code == 0
    (loss,) = [r["val/loss"] for r in read_metrics(run) if r["step"] == 5 and "val/loss" in r]
    assert re.search(rf"^ +4 .* MB .* {val_losses(run)[4]:.4f}  whole", out, re.MULTILINE), out
    assert re.search(rf"^ +6 .*0\.\d MB  \d{{4}}-\d\d-\d\d .* {loss:.4f}  whole, newest", out, re.MULTILINE), out
    assert "best" in out
    assert call(checkpoints, "verify", run)[0] == 0
    flip(next((run / "checkpoints" / "6" / "rest" / "d").iterdir()))
    code, out, _ = call(checkpoints, "verify", run)
    assert code == 1
    assert re.search(r"checkpoints/4: whole\n.*checkpoints/6: damaged \(rest/d/\w+ is not what was saved\)", out), out
    assert re.search(r"^ +4 .* newest", call(checkpoints, "list", run)[1], re.MULTILINE)
    refused(call(checkpoints, "delete", run, "5"), "no checkpoint 5 in .*; there are 4, 6")
    refused(call(checkpoints, "delete", run, "4"), "the only checkpoint that is whole: pass --force")
    assert call(checkpoints, "delete", run, "6")[0] == 0
    assert saved_steps(run / "checkpoints") == [4]
    refused(call(checkpoints, "delete", run, "4"), "the only checkpoint that is whole: pass --force")
    assert call(checkpoints, "delete", run, "4", "--force")[0] == 0
    refused(call(checkpoints, "list", run), "no checkpoint in")
    refused(call(checkpoints, "list", run.parent), "not a run folder")


SAVES = """
import sys
from pathlib import Path
from flaxgpt.run.log import RunLog
from flaxgpt.run.folder import load_config
from flaxgpt.run.setup import prepare
from flaxgpt.train import train
run = Path(sys.argv[1])
cfg, corpus = prepare(load_config(run).replace(max_steps=100_000, decay_steps=8, checkpoint_every=1, eval_every=100_000), run, resume=True)
with RunLog(run) as log:
    train(cfg, corpus, log, resume=True)
"""


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_any_moment_of_a_save_the_run_resumes_bit_for_bit(saved, tmp_path, kills):
    """It saves after every update; it is killed when a save is seen to have begun, and a little later each time."""
    generator, run = random.Random(1), shutil.copytree(saved, tmp_path / "run")
    folder, interrupted = run / "checkpoints", 0
    for kill in range(kills):
        before = saved_steps(folder)[-1]
        process = subprocess.Popen([sys.executable, "-c", SAVES, run], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline and not (saved_steps(folder)[-1] > before and unfinished(folder)):
            time.sleep(0.001)
        time.sleep(generator.random() * 0.1 if kill else 0)
        assert process.poll() is None, "it ended by itself"
        process.send_signal(signal.SIGKILL)
        process.wait()
        interrupted += bool(unfinished(folder))
        steps = saved_steps(folder)
        for step in steps:
            assert verify(folder / str(step)), f"checkpoint {step} has a number and is not whole"
        assert steps[-1] > before, "it saved nothing"
    assert interrupted or kills == 1, "no save was interrupted: kill at other moments"
    cfg = load_config(saved).replace(max_steps=steps[-1] + 2, eval_every=100_000, checkpoint_every=100_000)
    assert_equal_bits(trained(cfg, run, resume=True), trained(cfg, shutil.copytree(saved, tmp_path / "whole"), resume=True))
